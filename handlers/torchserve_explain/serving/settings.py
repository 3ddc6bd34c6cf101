"""An archive's settings: the sections that model-config.yaml holds for the handler, beside TorchServe's own keys."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from torch import Tensor
from torchvision import transforms

from torchserve_explain.attribution.classifier import Normalization
from torchserve_explain.attribution.heads import Head
from torchserve_explain.attribution.methods import METHODS, Method
from torchserve_explain.errors import ArchiveError
from torchserve_explain.serving.errors import shown

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by the number of channels
# What preprocess.py defines: from a picture, pixels [C, H, W] and the part of the picture that they show (None: all).
Prepare = Callable[[Image.Image], tuple[Tensor, tuple[float, float, float, float] | None]]
Size = PositiveInt | tuple[PositiveInt, PositiveInt]


EXPLANATIONS_SHARE = 0.75  # of the places in flight


class Section(BaseModel):
    """Settings are read-only, and a misspelt key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Preprocessing(Section):
    """How an image becomes the model's input: resize (shorter side, or [height, width]), centre crop, normalise.

    An image has as many channels as `mean`: 1 (grey), 3 (colours) or 4 (with alpha). With `code` the archive's preprocess.py
    takes the place of resize and crop, of which only the size remains, and may make any number of channels.
    """

    resize: Size | None = 256
    crop: Size | None = 224
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    mean: Annotated[tuple[float, ...], Field(min_length=1, max_length=64)] = (0.485, 0.456, 0.406)
    std: Annotated[tuple[PositiveFloat, ...], Field(min_length=1, max_length=64)] = (0.229, 0.224, 0.225)
    code: Literal["preprocess.py"] | None = None
    _prepare: Prepare | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _fixed_size(self) -> "Preprocessing":
        if len(self.mean) != len(self.std) or (self.code is None and len(self.mean) not in MODES):
            raise ValueError(
                "mean and std hold three numbers each, or one for a greyscale model, or four with an alpha channel"
            )
        if self.crop is None and not isinstance(self.resize, tuple):
            raise ValueError("without a crop, resize must be [height, width], so that images can share a batch")
        return self

    @property
    def mode(self) -> str:
        """What Pillow calls a picture of as many channels as the model sees, or of colours where it calls that nothing."""
        return MODES.get(len(self.mean), "RGB")

    @property
    def prepare(self) -> Prepare | None:
        """The function of preprocess.py; raises RuntimeError where it is to be used and has not been loaded."""
        if self.code is not None and self._prepare is None:
            raise RuntimeError("preprocess.py has not been loaded: take the settings of Archive.load")
        return self._prepare

    def prepared_by(self, prepare: Prepare) -> "Preprocessing":
        """Return the same with the function of preprocess.py."""
        loaded = self.model_copy()
        loaded._prepare = prepare
        return loaded

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        size = self.resize if self.crop is None else self.crop
        return size if isinstance(size, tuple) else (size or 0, size or 0)

    @property
    def normalization(self) -> Normalization:
        """Mean and std as the engine wants them."""
        return Normalization(self.mean, self.std)

    @property
    def interpolation_mode(self) -> transforms.InterpolationMode:
        """The interpolation as torchvision names it."""
        return transforms.InterpolationMode(self.interpolation)


class Limits(Section):
    """What one request may ask for (422 or 413 beyond it), and what the worker spends on it."""

    evaluations: PositiveInt = 4000  # rows a request
    path_evaluations: Annotated[int, Field(ge=9)] = 400  # rows one adaptive path takes at most
    sampling_evaluations: PositiveInt = 2000  # rows one map takes at most whose draws go on until max_sampling_error
    methods: PositiveInt = 30
    targets: PositiveInt = 5
    layers: PositiveInt = 5
    instances: PositiveInt = 16  # images in one KServe request
    explanations: PositiveInt = 100  # maps in one request
    pixels: PositiveInt = 50_000_000  # of a decoded image
    answer_bytes: PositiveInt = 6_000_000  # TorchServe's max_response_size kills the worker beyond 6,553,500
    pack: PositiveInt = 16  # rows a pass; halved where memory does not suffice
    quantum: PositiveInt = 25  # milliseconds after which TorchServe may hand over what has arrived meanwhile
    seconds: PositiveFloat = 60.0  # a request, from its arrival in the worker; below responseTimeout, which kills the worker

    def most(self, method: Method) -> int:
        """Return how many rows a method may take for one map that decides for itself."""
        return self.sampling_evaluations if method.draws else self.path_evaluations


class Explanations(Section):
    """The archive's own defaults of a client's parameters, its limits, and how rows without a gradient are computed.

    `methods` are those that it serves, None all that the classifier can; the others are neither listed nor served.
    In bfloat16 those rows take half the time where the processor has it, and maps move a little; elsewhere, and for
    predictions and gradients, it stays float32. `arithmetic: auto` takes it where it is measured to be faster. With
    `runtime: auto` passes without a gradient are compiled where that answers equally and is faster. With `audit: log`
    each explanation's audit record goes to the log.
    """

    audit: Literal["log"] | None = None
    arithmetic: Literal["float32", "bfloat16", "auto"] = "float32"
    runtime: Literal["auto", "torch"] = "auto"
    methods: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    defaults: dict[str, Any] = {}
    limits: Limits = Limits()

    @field_validator("methods")
    @classmethod
    def _known(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if unknown := [name for name in names or () if name not in METHODS]:
            raise ValueError(f"{shown(unknown[0])} is no method; allowed: {', '.join(METHODS)}")
        return names


class ClassifierSettings(Section):
    """The network: a torchvision name, or `model.py` of the archive; what its outputs mean, None where that is found."""

    architecture: str
    head: Head | None = None


class Settings(BaseModel):
    """What the handler reads of model-config.yaml; TorchServe's keys stand beside it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    classifier: ClassifierSettings
    preprocessing: Preprocessing = Preprocessing()
    explanations: Explanations = Explanations()
    responseTimeout: PositiveInt = 120  # noqa: N815 (TorchServe's name and default)
    startupTimeout: PositiveInt = 120  # noqa: N815
    continuousBatching: bool = False  # noqa: N815 (absent: whole batches are answered)
    minWorkers: PositiveInt = 1  # noqa: N815
    maxWorkers: PositiveInt = 1  # noqa: N815
    batchSize: PositiveInt = 1  # noqa: N815
    useJobTicket: bool = False  # noqa: N815
    asyncCommunication: bool = False  # noqa: N815
    sequenceBatching: bool = False  # noqa: N815

    @property
    def explanation_places(self) -> int | None:
        """How many of the places in flight explanations may hold, so that predictions find one; None: all of a batch."""
        return max(1, int(EXPLANATIONS_SHARE * self.batchSize)) if self.continuousBatching else None

    @model_validator(mode="after")
    def _deadline_before_timeout(self) -> "Settings":
        if self.explanations.limits.seconds > 0.9 * self.responseTimeout:
            raise ValueError("explanations.limits.seconds must be at most 0.9 of responseTimeout, which kills the worker")
        return self

    @model_validator(mode="after")
    def _continuous_alone(self) -> "Settings":
        """In TorchServe an idle worker keeps the lock that a busy one needs after each step of a continuous batch."""
        if not self.continuousBatching:
            return self
        if (workers := max(self.minWorkers, self.maxWorkers)) > 1:
            raise ValueError(
                f"{workers} workers hang with continuousBatching: an idle one keeps what a busy one waits for; allowed: "
                "minWorkers and maxWorkers 1, continuousBatching: false, or the archive served under a second name"
            )
        for key in ("useJobTicket", "asyncCommunication", "sequenceBatching"):
            if getattr(self, key):
                raise ValueError(f"{key} breaks continuousBatching; allowed: one of them alone")
        return self


def read_settings(config: dict[str, Any]) -> Settings:
    """Check the sections of a model-config.yaml; raises ArchiveError with one line for each key that is wrong."""
    try:
        return Settings.model_validate(config)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'model-config.yaml'}: {e['msg']}" for e in error.errors()]
        raise ArchiveError("model-config.yaml: " + "; ".join(lines)) from None
