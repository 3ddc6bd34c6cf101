"""The forward pass compiled for this processor by OpenVINO, and whether that answers equally and pays."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from torchserve_explain.attribution.tail import tail_of, traced_with

COMPILER = "openvino"
Forward = Callable[[Tensor], Tensor]  # [n, C, H, W] to logits [n, classes]
SLOWER = 0.9  # of the module's seconds, which compiled passes may take at most
EQUAL, SAME_MAP = 1e-4, 0.9999  # largest difference of logits over their range; least cosine of maps
ROUNDING = 16 * torch.finfo(torch.float32).eps
WINDOWS = 4  # hidden one after another, so many side by side: the rows of a map
ROUNDS = 3


@dataclass(frozen=True)
class Pays:
    """Whether compiled passes are worth it for rows that a request asks for alone, and for each of many."""

    one: bool
    many: bool


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


def tried(module: Forward, compiled: Forward, picture: Tensor, deadline: float, known: Pays | None) -> Pays:
    """Return what compiled passes are worth beside the module's, as known or as measured until `deadline`.

    Raises ValueError where they do not answer equally: the picture [C, H, W], it with windows hidden, noise, and black.
    """
    hidden = _hidden(picture)
    noise = torch.randn(2, *picture.shape, generator=torch.Generator().manual_seed(0)).to(picture)
    rows = torch.cat([picture[None], hidden, noise, torch.zeros_like(noise[:1])])
    if known is None:
        began = time.monotonic()
        module(rows[:1])
        ahead = 2 * (len(rows) + 1 + len(hidden)) * (time.monotonic() - began)  # the comparison, and a round of each
        if began + ahead > deadline:
            raise ValueError("its measurement takes longer than startup may")
    if difference := _difference(module(rows), compiled(rows), len(hidden)):
        raise ValueError(difference)
    if known is not None:
        return known
    return Pays(_pays(module, compiled, hidden[:1], deadline), _pays(module, compiled, hidden, deadline))


def _hidden(picture: Tensor) -> Tensor:
    """Return copies [n, C, H, W] of a picture, a window of each made zero."""
    height, width = (-(-side // WINDOWS) for side in picture.shape[1:])
    copies = picture.repeat(WINDOWS * WINDOWS, 1, 1, 1)
    for number, copied in enumerate(copies):
        top, left = number // WINDOWS * height, number % WINDOWS * width
        copied[:, top : top + height, left : left + width] = 0
    return copies


def _difference(expected: Tensor, found: Tensor, hidden: int) -> str | None:
    """Return how logits [rows, classes] differ, of a picture and of it with windows hidden and more, or None."""
    scale = float(expected.max() - expected.min())
    if expected.shape != found.shape or not torch.allclose(expected, found, rtol=0, atol=EQUAL * scale):
        return f"its logits, over a range of {scale:.3g}, differ by {float((expected - found).abs().max()):.1e}"
    top = int(expected[0].argmax())
    ours = expected[0, top] - expected[1 : hidden + 1, top]
    for whole in (found[0, top], expected[0, top]):  # a single row may have the other form
        theirs = whole - found[1 : hidden + 1, top]
        if torch.allclose(ours, theirs, rtol=0, atol=ROUNDING * scale):  # to it, and what is hidden may matter as little
            continue
        if not (cosine := float(torch.cosine_similarity(ours, theirs, 0))) >= SAME_MAP:
            return f"its maps differ: cosine {cosine:.5f}"
    return None


def _pays(module: Forward, compiled: Forward, rows: Tensor, deadline: float) -> bool:
    """Whether compiled passes of these rows are faster by a tenth; raises ValueError where no round is over in time."""
    forms, best = (module, compiled), [float("inf")] * 2
    for done in range(ROUNDS):
        for place, form in enumerate(forms):
            began = time.monotonic()
            form(rows)
            best[place] = min(best[place], time.monotonic() - began)
        if time.monotonic() > deadline:
            if not done:
                raise ValueError("its measurement takes longer than startup may")
            break
    return best[1] <= SLOWER * best[0]
