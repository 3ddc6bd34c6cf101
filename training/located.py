"""The maps of the test images against masks or boxes."""

from collections.abc import Iterator

from torch import Tensor

from torchserve_explain.attribution.engine import Engine
from torchserve_explain.errors import ArchiveError, TrainingError
from torchserve_explain.gallery.located import Located, Scores, measure, summary
from torchserve_explain.gallery.truth import Truth, read_truth
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.settings import Preprocessing
from training.data import PIXELS, Data
from training.experiment import Experiment
from training.maps import explain, job_of


def ground_truth(experiment: Experiment, data: Data) -> Truth | None:
    """Return the masks of the test images, None where none are given; raises TrainingError."""
    paths = [sample.path.relative_to(experiment.folder).as_posix() for sample in data.splits["test"]]
    try:
        return read_truth(experiment.masks, experiment.boxes, experiment.folder, paths, experiment.preprocessing, PIXELS)
    except (ArchiveError, OSError) as error:
        raise TrainingError(str(error)) from None


def locate(
    engine: Engine, data: Data, logits: Tensor, preprocessing: Preprocessing, method: str, truth: Truth
) -> list[Located]:
    """Measure a method's maps of the test images that are predicted right and have a mask, one at a time."""

    def measured() -> Iterator[tuple[str, dict[str, Scores]]]:
        for sample, predicted in zip(data.splits["test"], logits.argmax(1).tolist(), strict=True):
            path = sample.path.relative_to(truth.data).as_posix()
            if predicted == sample.label and (mask := truth.mask(path)) is not None:
                picture = read_picture(sample.path.read_bytes(), preprocessing, PIXELS)
                (values,) = explain(engine, [job_of(engine, picture, predicted, method)])
                yield data.classes[sample.label], measure({method: values}, mask)

    return summary(measured())
