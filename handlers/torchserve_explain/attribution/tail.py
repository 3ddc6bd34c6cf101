"""The tail of a network: what leads from a layer's output to the logits, cut out of the network's traced graph."""

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from torchserve_explain.attribution.capture import captured


def traced(forward: Callable[[Tensor], object], example: Tensor) -> fx.GraphModule:
    """Return the graph of a forward pass for inputs like `example`; its own code runs once, on the shapes alone.

    Nothing in the graph is written in place. Raises whatever tracing does, where control flow depends on the image among it.
    """
    with torch.no_grad():
        written_once = functionalize(forward, remove="mutations")
        return make_fx(written_once, tracing_mode="fake", _allow_non_fake_inputs=True)(example.clone())


def traced_with(model: nn.Module, layer: str | None, example: Tensor) -> fx.GraphModule:
    """Return the graph of the logits, or of the logits and a layer's output."""

    def both(inputs: Tensor) -> tuple[Tensor, Tensor]:
        with captured(model, {str(layer)}) as outputs:
            logits = model(inputs)
        return logits, outputs[str(layer)].clone()

    return traced(model if layer is None else both, example)


def tail_of(graph: fx.GraphModule) -> fx.GraphModule | None:
    """Return what leads from the layer's output to the logits in a graph of both; None where more of the image is needed."""
    (output,) = graph.graph.find_nodes(op="output")
    logits, kept = output.args[0]
    layer = kept.args[0]  # of which a copy is kept
    needed, waiting = {layer}, [logits]
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            return None
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    tail = fx.Graph()
    copies = {layer: tail.placeholder("features")}
    for node in graph.graph.nodes:
        if node in needed and node is not layer:
            copies[node] = tail.node_copy(node, copies.__getitem__)
    tail.output(copies[logits])
    return fx.GraphModule(graph, tail)
