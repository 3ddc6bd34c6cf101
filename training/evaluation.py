"""What is measured of a trained classifier: accuracy, confusion, and each class by itself."""

from collections.abc import Sequence
from dataclasses import dataclass

from sklearn.metrics import balanced_accuracy_score, confusion_matrix, precision_recall_fscore_support
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class ClassScore:
    """How well one class is told from the others; 0 where it was never predicted."""

    label: str
    images: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Scores:
    """A split's scores; `confusion` counts images by true class (row) and predicted class (column)."""

    accuracy: float
    balanced_accuracy: float
    loss: float
    confusion: list[list[int]]
    classes: list[ClassScore]


def evaluate(logits: Tensor, labels: Tensor, names: Sequence[str]) -> Scores:
    """Score logits [n, classes] against labels [n]."""
    truth, predicted = labels.numpy(), logits.argmax(1).numpy()
    indices = list(range(len(names)))
    each = precision_recall_fscore_support(truth, predicted, labels=indices, zero_division=0)
    return Scores(
        float((truth == predicted).mean()),
        float(balanced_accuracy_score(truth, predicted)),
        float(cross_entropy(logits, labels)),
        confusion_matrix(truth, predicted, labels=indices).tolist(),
        [
            ClassScore(name, int(images), float(precision), float(recall), float(f1))
            for name, precision, recall, f1, images in zip(names, *each, strict=True)
        ],
    )
