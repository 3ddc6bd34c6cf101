"""The forward pass compiled for this processor by OpenVINO."""

import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from torchserve_explain.attribution.tail import tail_of, traced_with

COMPILER = "openvino"


class Compiled:
    """A model's forward pass for inputs like `example` [1, C, H, W], in as many threads as torch has now.

    It takes a row at a time, which is as fast here as several and makes a row's logits the same whoever shares its pass.
    The output of `layer` comes with the logits, where all that they need of the image passes through it. Raises ImportError
    without OpenVINO, and whatever tracing and conversion raise, where control flow depends on the image among them. The
    model's own code runs once, on the shapes alone.
    """

    def __init__(self, model: nn.Module, example: Tensor, layer: str | None = None) -> None:
        core = _core()
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

        graph = traced_with(model, layer, example)  # OpenVINO misreads what is written in place (Swin's masks)
        self.layer, self._tail = layer, None if layer is None else tail_of(graph)
        if self._tail is None:
            self.layer, graph = None, traced_with(model, None, example)
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchFXPythonDecoder(graph, dynamic_shapes=False)  # which must live until it is converted
        network = frontend.convert(frontend.load(decoder))
        network.reshape(list(example.shape))
        options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,  # workers would all be pinned to the same cores
        }
        self._request = core.compile_model(network, "CPU", options).create_infer_request()

    def __call__(self, inputs: Tensor, pause: Callable[[], None] | None = None) -> Tensor:
        """Return the logits [n, classes] of inputs [n, C, H, W]; `pause` is called after each row, and may call this."""
        return torch.cat([logits for logits, *_ in self._rows(inputs, pause)])

    def with_layer(self, inputs: Tensor, pause: Callable[[], None] | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits and the output [n, ...] of the layer that comes with them."""
        logits, features = zip(*self._rows(inputs, pause), strict=True)
        return torch.cat(logits), torch.cat(features)

    def tail(self, features: Tensor) -> Tensor:
        """Return the logits [n, classes] of the layer's output, by PyTorch, which knows their gradient."""
        assert self._tail is not None
        return torch.cat([self._tail(row) for row in torch.split(features, 1)])

    def _rows(self, inputs: Tensor, pause: Callable[[], None] | None) -> Iterator[list[Tensor]]:
        for row in inputs.detach().float().contiguous():
            self._request.infer([row[None].numpy()], share_inputs=True)
            yield [torch.from_numpy(one.data.copy()) for one in self._request.output_tensors]
            if pause is not None:
                pause()


@cache
def _core() -> Any:
    """Return OpenVINO's core, one for as long as the process lives.

    It gives the thread a stack for its signal handlers. Where one of two cores goes, the thread may be left with the stack
    of the one that is gone, and the next signal ends the process.
    """
    # The mere import would report itself to OpenVINO's makers; without this package it has nothing to do so with.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino.Core()


def openvino_version() -> str | None:
    """Return the version of OpenVINO, None where it is not installed."""
    try:
        return version(COMPILER)
    except ImportError:
        return None
