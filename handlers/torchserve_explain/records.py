"""What goes over many pictures without a server: names of pictures, a bar, records line by line."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from torchserve_explain.errors import ArchiveError
from torchserve_explain.serving.images import FORMATS

SUFFIXES = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}

EVERY = 30.0  # seconds between two lines where there is no terminal

Record = dict[str, Any]


class _Lines(Progress):
    """A bar that says how far it is in a line now and then, where there is no terminal to draw on."""

    _told = -EVERY

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Advance a task."""
        super().advance(task_id, advance)
        if not self.console.is_terminal and time.monotonic() - self._told >= EVERY:
            self._told = time.monotonic()
            self.console.print(*self.get_renderables())


def progress() -> Progress:
    """Return a bar that tells what is at work, how far it is, and for how long."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return _Lines(*columns)


def read_records(path: Path) -> list[Record]:
    """Read a file of one JSON object a line; a last line that was never finished is none, and is cut off."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def add_record(path: Path, record: Record) -> None:
    """Add a line."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Replace a file of records in one step."""
    with in_one_step(path) as unfinished:
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """Give another path to write to, which becomes `path` once it is whole, whoever else writes that meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    yield unfinished
    unfinished.replace(path)


def readable(path: Path | str) -> str:
    """Return a path as text that can be written, its bytes escaped where they are no UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def check_apart(data: Path, out: Path) -> None:
    """Raise ArchiveError where what is written would lie among what is read."""
    if out.resolve().is_relative_to(data.resolve()):
        raise ArchiveError(f"{out} lies inside {data}, and would be read as a part of it; allowed: a folder elsewhere")
