"""The model made ready to be explained: frozen, folded, laid out, its layers known, its passes."""

import copy
import logging
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from torchserve_explain.attribution.capture import captured, gradients_at
from torchserve_explain.attribution.compiled import COMPILER, Compiled
from torchserve_explain.attribution.functions import operations
from torchserve_explain.attribution.heads import Head, fit_head
from torchserve_explain.attribution.interruption import interrupted, is_independent, sharing_copy
from torchserve_explain.attribution.layers import Grid, find_spatial_layers
from torchserve_explain.attribution.preparation import alike, by_rule, check_rows, folded, in_packs, narrow_copy, noisy_pixels
from torchserve_explain.attribution.rows import BackwardRule, Evaluation, Form, Gradients, Layer, Rows, Score, Versus
from torchserve_explain.attribution.scores import selected
from torchserve_explain.attribution.stem import find_stem, passing
from torchserve_explain.attribution.trial import EQUAL, NEITHER, Pays, in_words, tried, weighed
from torchserve_explain.errors import Unsupported

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Normalization:
    """Per-channel `mean` and `std` that turn pixels in [0, 1] into the model's input."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise pixels [..., C, H, W] in [0, 1]."""
        mean, std = self._like(pixels)
        return (pixels - mean) / std

    def inverse(self, inputs: Tensor) -> Tensor:
        """Return the pixels [..., C, H, W] in [0, 1] of a normalised input."""
        mean, std = self._like(inputs)
        return inputs * std + mean

    def _like(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std [C, 1, 1] of the images' type and device."""
        return images.new_tensor(self.mean)[:, None, None], images.new_tensor(self.std)[:, None, None]


@dataclass(frozen=True)
class References:
    """Images that others are compared with: `inputs` [n, C, H, W], normalised, and the `logits` [n, classes] that they have."""

    inputs: Tensor
    logits: Tensor


class Classifier:
    """A classifier's passes over rows of normalised images [n, C, H, W]; the module it is given stays untouched.

    The module is copied, put into evaluation mode, frozen, its batch norms and paddings folded (exact up to rounding) and
    laid out channels-last. With `narrow` arithmetic, such as bfloat16, rows that want no gradient at the image are
    evaluated in it; predictions never are. What its outputs mean is its `head`, found where it is None and `labels` (their
    number) do not contradict. Raises ValueError where the output is not [n, classes], or is no head's.
    """

    def __init__(
        self,
        model: nn.Module,
        normalization: Normalization,
        size: tuple[int, int],
        device: torch.device | str = "cpu",
        narrow: torch.dtype | None = None,
        head: Head | None = None,
        labels: int = 0,
    ) -> None:
        self.device = torch.device(device)
        self.normalization = normalization
        noise = normalization(noisy_pixels(len(normalization.mean), size))
        self._model, self.folded = folded(model, noise)
        self._model.to(self.device).to(memory_format=torch.channels_last)
        self.dtype = next((p.dtype for p in self._model.parameters()), torch.float32)
        self.example = torch.zeros(1, len(normalization.mean), *size, device=self.device, dtype=self.dtype)
        self.head = fit_head(self._model, self.example, head, labels)
        self.classes = self.logits(self.example).shape[1]
        check_rows(self.logits, noise)
        self.compiled: Compiled | None = None
        self.pays, self.narrow_pays = NEITHER, Pays(one=True, many=True)
        self._narrow = None if narrow is None else narrow_copy(self._model, self.example, narrow)
        self.narrow = None if self._narrow is None else narrow
        self._stem = find_stem(self._model, self._placed(noise))
        self.spatial_layers: dict[str, Grid] = find_spatial_layers(self._model, self.example)
        self.spatial_layers = self._layers_with_gradient(noise[:1])
        self.operations = operations(self._model, self.example)
        self._changed = by_rule(self._model)
        self.references: References | None = None

    def compare_with(self, inputs: Tensor) -> None:
        """Keep images [n, C, H, W] as the references, and their logits; raises ValueError naming one that has none."""
        placed = inputs.to(self.device, self.dtype)
        logits = torch.cat([self.logits(placed[start : start + 8]) for start in range(0, len(placed), 8)])
        if broken := [number for number, row in enumerate(logits) if not row.isfinite().all()]:
            raise ValueError(f"the model's logits of reference {broken[0] + 1} are not finite numbers")
        self.references = References(placed, logits)

    @cached_property
    def aside(self) -> "Classifier | None":
        """The same classifier with modules of its own, for passes while one of this is interrupted; None where it has none."""
        models = [self._model] if self._narrow is None else [self._model, self._narrow]
        copies = [sharing_copy(model) for model in models]
        if not all(is_independent(copied, model, self.example) for copied, model in zip(copies, models, strict=True)):
            log.warning("passes are not interrupted: a copy of the model calls the model itself")
            return None
        other = copy.copy(self)
        other._model, other._narrow = copies[0], copies[1] if len(copies) > 1 else None
        other._changed = by_rule(other._model)
        return other

    def shuffled(self, seed: int = 0) -> "Classifier":
        """Return a classifier of the same layers in each of whose parameters the values have changed places."""
        model, random = copy.deepcopy(self._model), torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            places = torch.randperm(parameter.numel(), generator=random).to(parameter.device)
            parameter.data = parameter.data.flatten()[places].view(parameter.shape).contiguous()
        height, width = self.example.shape[-2:]
        return Classifier(model, self.normalization, (height, width), self.device, head=self.head)

    def compile(self, picture: Tensor, pack: int, seconds: float, known: Pays | None = None) -> Pays | None:
        """Compile the forward pass, and use it where it answers equally and is faster; return for which rows it is.

        It is tried on `picture` [C, H, W], a normalised photo, beside passes of `pack` rows; what is `known` is not measured
        again. None where it cannot be compiled, does not answer equally, or takes more seconds to find out; the log says so.
        """
        if self.device.type != "cpu" or self.dtype != torch.float32:
            return None
        if known == NEITHER:
            return known
        deadline = time.monotonic() + seconds
        try:
            model = sharing_copy(self._model)  # it may keep what it is traced with
            compiled = Compiled(model, self.example, self.last_layer)
            pays = tried(lambda rows: in_packs(self.logits, rows, pack), compiled, picture, deadline, known)
            self.compiled = compiled if pays.one or pays.many else None
            self._check_layer(picture[None])
        except Exception as error:  # it is the user's own forward that is traced here
            self.compiled = None
            log.warning("passes stay PyTorch's: the model is not compiled: %s", in_words(error))
            return None
        self.pays = pays
        return pays

    def weigh_narrow(self, picture: Tensor, pack: int, seconds: float, known: Pays | None = None) -> Pays | None:
        """Keep narrow arithmetic where it is faster than what else runs; return for which rows that is.

        It is tried as `compile` tries. None where its maps are others, or it takes more seconds to find out; the log says so.
        """
        if self._narrow is None:
            return None

        def wide(rows: Tensor) -> Tensor:
            compiled = self.compiled if self.pays.of(len(rows)) else None
            return in_packs(compiled or self.logits, rows, pack)

        narrow = partial(self.logits, model=self._narrow)
        pays = weighed(wide, lambda rows: in_packs(narrow, rows, pack), picture.to(self.device), seconds, known)
        if pays in (None, NEITHER):
            self.stay_wide()
        else:
            self.narrow_pays = pays
        return pays

    def stay_wide(self) -> None:
        """Use no narrow arithmetic."""
        self._narrow = self.narrow = None

    def _check_layer(self, inputs: Tensor) -> None:
        """Give the compiled layer up where its output, or the predicted class's gradient there, is not the same."""
        if self.compiled is None or (layer := self.compiled.layer) is None:
            return
        asked: dict[str, Any] = {"inputs": inputs, "targets": [None], "scores": [Score.LOGIT], "layers": [layer]}
        try:
            ours, expected = self.evaluate_compiled(**asked).layers[layer], self.evaluate(**asked, precise=True).layers[layer]
            same = alike(expected.activation, ours.activation, EQUAL) and alike(expected.gradient, ours.gradient, EQUAL)
        except RuntimeError:  # what is traced may know no way back
            same = False
        if not same:
            log.warning("passes to %s stay PyTorch's: compiled, it does not answer the same", layer)
            self.compiled.layer = None

    def form(self, rows: Rows) -> Form:
        """Return which form of the model evaluates rows: the same whoever shares their pass, so that they answer the same."""
        pays = self.narrow_pays.one if rows.alone else self.narrow_pays.many
        if self._narrow is not None and pays and not rows.gradient and not rows.precise:
            return Form.NARROW
        if self.compiled is None or not self.pays.of(rows.count) or rows.gradient or rows.rule is not None:
            return Form.MODULE
        return Form.COMPILED if {*rows.layers, *rows.activations} <= {self.compiled.layer} else Form.MODULE

    @property
    def arithmetic(self) -> str:
        """The arithmetic of rows that want no gradient at the image, or of those of them for which it pays."""
        return str(self.narrow or torch.float32).removeprefix("torch.")

    @property
    def runtimes(self) -> dict[str, str]:
        """What runs the passes: of rows asked for alone, such as predictions, of many, to the last layer, and back."""
        layer = None if self.compiled is None else self.compiled.layer
        one, many = self.pays.one, self.pays.many
        compiled = {"one_row": one, "many_rows": many, "last_layer": one and layer is not None, "gradient": False}
        return {kind: COMPILER if pays else "torch" for kind, pays in compiled.items()}

    @property
    def last_layer(self) -> str | None:
        """The last layer with a spatial output larger than 1 x 1, or None where the model has none."""
        return next(reversed(self.spatial_layers), None)

    def grid_layer(self, name: str) -> str:
        """Return the dotted name of a spatial layer (`last` is the last of them); raises Unsupported naming some that are."""
        resolved = self.last_layer if name == "last" else name
        if resolved is None:
            raise Unsupported("the model has no layer with a spatial output larger than 1x1")
        if resolved not in self.spatial_layers:
            some = ", ".join(list(self.spatial_layers)[-8:])
            raise Unsupported(f"the model has no spatial layer of that name; the last ones are {some}")
        return resolved

    def logits(self, inputs: Tensor, model: nn.Module | None = None) -> Tensor:
        """Return the logits [n, classes] of inputs [n, C, H, W], without a gradient, of a `model` other than its own if any."""
        with torch.no_grad():
            output: Tensor = (model or self._model)(self._placed(inputs).clone())
        return output

    def evaluate(
        self,
        inputs: Tensor,
        targets: Sequence[int | None],
        scores: Sequence[Score],
        *,
        gradient: bool = False,
        each: bool = True,
        layers: Sequence[str] = (),
        activations: Sequence[str] = (),
        rule: BackwardRule | None = None,
        precise: bool = False,
        versus: Sequence[Versus | None] = (),
        pause: Callable[[], None] | None = None,
    ) -> Evaluation:
        """Run one pass: each row's score of its target, and, where asked, the gradients to the input and to layers.

        A target None is the predicted class; `versus` is what each row's score is compared with, if anything. `precise`
        rows are never evaluated in low precision. Without `each` the gradients to the input are known as weighted sums
        only. With layers alone the backward pass goes no further than the first of them; `activations` are layers whose
        output alone is wanted. `pause` is called between layers, but for a pass under a rule, and may run passes of `aside`.
        """
        model = self._model if rule is None else self._changed(rule)
        if not precise and self._narrow is not None and rule is None and not gradient:
            model = self._narrow
        stem = self._stem if rule is None and gradient and not each else None
        x = self._placed(inputs).detach().requires_grad_(gradient)
        with (
            torch.set_grad_enabled(gradient or bool(layers)),
            passing(model, stem) as edges,
            captured(model, {*layers, *activations}) as outputs,
            interrupted(model, pause if rule is None else None),
        ):
            logits = model(x.clone())  # a clone, should the model work in place
            explained = selected(self.head, logits, targets, scores, versus)
        early, *to_layers = gradients_at(explained, [edges[0] if edges else x, *(outputs[name] for name in layers)])
        found = None
        if gradient and stem is not None and early is not None:
            found = Gradients(None, early, stem.pull)
        elif gradient:
            to_input = torch.zeros_like(x) if early is None else early
            found = Gradients(to_input, to_input, lambda gradient: gradient)
        return Evaluation(
            logits.detach(),
            explained.detach(),
            found,
            {name: self._layer(name, outputs[name], to_layer) for name, to_layer in zip(layers, to_layers, strict=True)},
            {name: self._grid(name, outputs[name]) for name in activations},
        )

    def evaluate_compiled(
        self,
        inputs: Tensor,
        targets: Sequence[int | None],
        scores: Sequence[Score],
        versus: Sequence[Versus | None] = (),
        pause: Callable[[], None] | None = None,
        layers: Sequence[str] = (),
        activations: Sequence[str] = (),
    ) -> Evaluation:
        """Run one pass of the compiled model for scores and its one layer; see `evaluate`. `pause` is called between rows."""
        assert self.compiled is not None
        if not layers and not activations:
            logits = self.compiled(inputs, pause)
            return Evaluation(logits, selected(self.head, logits, targets, scores, versus), None, {}, {})
        logits, features = self.compiled.with_layer(inputs, pause)
        with torch.enable_grad():
            again = self.compiled.tail(features.requires_grad_())
            again = again + (logits - again).detach()  # the same numbers, with a gradient
            explained = selected(self.head, again, targets, scores, versus)
        (gradient,) = gradients_at(explained, [features])
        return Evaluation(
            logits,
            explained.detach(),
            None,
            {name: self._layer(name, features, gradient) for name in layers},
            {name: self._grid(name, features) for name in activations},
        )

    def _layer(self, name: str, output: Tensor, gradient: Tensor | None) -> Layer:
        return Layer(self._grid(name, output), self._grid(name, torch.zeros_like(output) if gradient is None else gradient))

    def _grid(self, name: str, tensor: Tensor) -> Tensor:
        """Return a layer's output, or a gradient there, as [n, channels, h, w]; that of a rule's own layer as it is."""
        grid = self.spatial_layers.get(name)
        return (tensor.detach() if grid is None else grid.channels_first(tensor.detach())).to(self.dtype)

    def refusal(self, rule: BackwardRule, rows: Tensor, unwanted: Set[str] = frozenset()) -> str | None:
        """Return why the model cannot run rows under a rule, or None where it can.

        `unwanted` are operations that the rule replaces: one that is left was called in a way that it does not see.
        """
        try:
            left = sorted(operations(self._changed(rule), rows) & unwanted)
            self.evaluate(rows, [0], [], gradient=True, rule=rule)
        except Unsupported as reason:
            return str(reason)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # it is the user's own forward that runs here
            log.warning("a model cannot run under %s", rule, exc_info=error)
            return f"it cannot run under the method's rules: {error}"
        return f"it calls {', '.join(left)} in a way that no rule reaches" if left else None

    def _placed(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)

    def _layers_with_gradient(self, noise: Tensor) -> dict[str, Grid]:
        """Return the layers whose grid the logits depend on: not a transformer's tokens once only the class token counts."""
        layers = self.spatial_layers
        found = self.evaluate(noise, [0], [Score.LOGIT], layers=list(layers)).layers
        reached = {name: grid for name, grid in layers.items() if bool(found[name].gradient.any())}
        return reached or layers  # a head of zeros, before any training, has no gradient to any
