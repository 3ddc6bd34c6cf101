"""The learning part of a network is trained: epoch by epoch, going on where it was stopped, the best epoch kept."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchserve_explain.errors import TrainingError
from torchserve_explain.records import in_one_step
from training.data import mixed
from training.features import Source, in_order, shuffled
from training.recipe import Recipe

OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter], Recipe], torch.optim.Optimizer]] = {
    "adamw": lambda parameters, recipe: torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay),
    "sgd": lambda parameters, recipe: torch.optim.SGD(
        parameters, recipe.learning_rate, momentum=0.9, weight_decay=recipe.weight_decay
    ),
}


@dataclass(frozen=True)
class Epoch:
    """An epoch's mean losses and accuracies: of the training images while they were learnt from, of the others after it."""

    loss: float
    accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float


class Training:
    """A training under way; all that it depends on is in `path` after each epoch, so that it can go on from there."""

    def __init__(self, trained: nn.Module, recipe: Recipe, weights: Tensor, seed: int, path: Path) -> None:
        self.trained, self.recipe, self.weights, self.seed, self.path = trained, recipe, weights, seed, path
        self.optimizer = OPTIMIZERS[recipe.optimizer](trained.parameters(), recipe)
        self.scaler = torch.amp.GradScaler(enabled=weights.is_cuda)
        self.epochs: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        if path.exists():
            self._go_on()

    @property
    def over(self) -> bool:
        """Whether all epochs are trained, or none of the last few was better than one before."""
        waited = len(self.epochs) - 1 - self.epochs.index(max(self.epochs, key=_worth)) if self.epochs else 0
        return len(self.epochs) >= self.recipe.epochs or waited >= self.recipe.patience

    def epoch(self, train: Source, val: Source, progress: Progress) -> None:
        """Train an epoch, evaluate it, keep it if it is the best; raises TrainingError where the loss is not finite."""
        began, number = time.perf_counter(), len(self.epochs)
        torch.manual_seed(mixed(self.seed, number))  # dropout's draws, also where training goes on
        order = shuffled(len(train.labels), self.recipe.batch, self.seed, number)
        loss, right = 0.0, 0.0
        self.trained.train()
        batches = progress.track(train.batches(order, number), len(order), description=f"epoch {number + 1}")
        for inputs, labels in batches:
            batch_loss, logits = self._step(inputs, labels)
            loss += batch_loss * len(labels)
            right += int((logits.argmax(1) == labels).sum())
        seen = sum(map(len, order))
        logits, labels = predict(self.trained, val)
        val_loss = float(cross_entropy(logits, labels, self.weights.cpu()))
        accuracy = float((logits.argmax(1) == labels).float().mean())
        if not isfinite(loss + val_loss):
            raise TrainingError(f"the loss of epoch {number + 1} is not finite; allowed: a --learning-rate that is lower")
        self.epochs.append(Epoch(loss / seen, right / seen, val_loss, accuracy, time.perf_counter() - began))
        if max(self.epochs, key=_worth) is self.epochs[-1]:
            self.best = {name: tensor.clone() for name, tensor in self.trained.state_dict().items()}
        self._keep()
        if not progress.disable:
            progress.console.print(_line(number + 1, self.recipe.epochs, self.epochs[-1]), soft_wrap=True)

    def _step(self, inputs: Tensor, labels: Tensor) -> tuple[float, Tensor]:
        """Learn from a batch; return its loss and logits."""
        with torch.autocast(inputs.device.type, torch.float16, enabled=inputs.is_cuda):
            logits = self.trained(inputs)
            loss = cross_entropy(logits, labels, self.weights)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(loss.detach()), logits.detach()

    def _keep(self) -> None:
        """Write the state; the file is the old or the new one, whenever training is stopped."""
        state = {
            "trained": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best": self.best,
        }
        with in_one_step(self.path) as unfinished:
            torch.save(state, unfinished)

    def _go_on(self) -> None:
        try:
            state: dict[str, Any] = torch.load(self.path, map_location=self.weights.device, weights_only=True)
        except Exception as error:  # torch.load stumbles on a broken file in many ways
            raise TrainingError(f"{self.path} is no state of a training ({error}); remove it to begin anew") from None
        self.trained.load_state_dict(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self.best = state["best"]


def fit(training: Training, train: Source, val: Source, progress: Progress) -> list[Epoch]:
    """Train until it is over, and leave the best epoch's parameters in the network; return all epochs."""
    while not training.over:
        training.epoch(train, val, progress)
    training.trained.load_state_dict(training.best)
    training.trained.eval()
    return training.epochs


def _line(number: int, epochs: int, epoch: Epoch) -> str:
    """Return what is said of an epoch, where a bar can be drawn and where it cannot."""
    trained = f"loss {epoch.loss:.3f}, accuracy {epoch.accuracy:.3f}"
    held_out = f"validation loss {epoch.val_loss:.3f}, accuracy {epoch.val_accuracy:.3f}"
    return f"epoch {number}/{epochs}: {trained}; {held_out}; {epoch.seconds:.1f} s"


def _worth(epoch: Epoch) -> tuple[float, float]:
    """Order epochs by accuracy, equals by loss: the loss of an overfitting network grows while it still gets better."""
    return epoch.val_accuracy, -epoch.val_loss


def balanced(counts: Sequence[int]) -> Tensor:
    """Return the classes' weights in the loss, so that each class weighs the same however many images it has."""
    return torch.tensor([sum(counts) / (len(counts) * count) for count in counts])


@torch.no_grad()
def predict(trained: nn.Module, source: Source) -> tuple[Tensor, Tensor]:
    """Return the logits [n, classes] and labels [n] of a split, on the CPU, without mixed precision."""
    trained.eval()
    parts = [(trained(inputs).cpu(), labels.cpu()) for inputs, labels in source.batches(in_order(len(source.labels)), 0)]
    logits, labels = zip(*parts, strict=True)
    return torch.cat(logits), torch.cat(labels)
