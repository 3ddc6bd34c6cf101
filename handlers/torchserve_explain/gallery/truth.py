"""Ground truth of a folder of pictures: where what each shows lies, by a folder of masks or a file of boxes."""

import argparse
import csv
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from torchserve_explain.attribution.localization import Mask
from torchserve_explain.errors import ArchiveError, RequestError
from torchserve_explain.serving.images import Picture, mask_seen, read_mask, read_picture
from torchserve_explain.serving.settings import Preprocessing

EDGES = ("xmin", "ymin", "xmax", "ymax", "width", "height")  # columns of a file of boxes beside `file`, in pixels


class Source(Protocol):
    """Where masks come from, by a picture's path in its folder."""

    def knows(self, path: str) -> bool:
        """Whether there is one of a picture."""

    def within(self, path: str) -> Mask:
        """Return it, [height, width] of the upright picture; raises RequestError or OSError."""


class MaskFolder:
    """A PNG for each picture, of the same path but for its suffix: what is neither black nor transparent lies within."""

    def __init__(self, folder: Path, pixel_limit: int) -> None:
        self._folder, self._limit = folder, pixel_limit

    def knows(self, path: str) -> bool:
        return self._file(path).is_file()

    def within(self, path: str) -> Mask:
        return read_mask(self._file(path).read_bytes(), self._limit)

    def _file(self, path: str) -> Path:
        return (self._folder / path).with_suffix(".png")


class BoxFile:
    """A CSV with a line for each box: `file` is the picture's path, or its name where only one has it; raises ArchiveError."""

    def __init__(self, file: Path, pixel_limit: int) -> None:
        self._boxes: dict[str, list[list[float]]] = defaultdict(list)
        with file.open(encoding="utf-8-sig", newline="") as stream:
            lines = csv.DictReader(stream)
            if missing := [name for name in ("file", *EDGES) if name not in (lines.fieldnames or ())]:
                raise ArchiveError(f"{file} has no column {missing[0]}; allowed: file, {', '.join(EDGES)}")
            for line in lines:
                self._boxes[line["file"]].append(_edges(line, f"{file}, line {lines.line_num}", pixel_limit))
        names = Counter(PurePosixPath(path).name for path in self._boxes)
        self._named = {name: path for path in self._boxes if names[name := PurePosixPath(path).name] == 1}

    def knows(self, path: str) -> bool:
        return path in self._boxes or PurePosixPath(path).name in self._named

    def within(self, path: str) -> Mask:
        boxes = self._boxes[path if path in self._boxes else self._named[PurePosixPath(path).name]]
        mask = np.zeros((int(boxes[0][5]), int(boxes[0][4])), np.bool_)
        for left, top, right, bottom, *_ in boxes:
            mask[round(top) : round(bottom), round(left) : round(right)] = True
        return mask


def _edges(line: dict[str, str], where: str, pixel_limit: int) -> list[float]:
    """Return a box's edges and its picture's size."""
    try:
        left, top, right, bottom, width, height = edges = [float(line[name]) for name in EDGES]
    except (TypeError, ValueError):
        raise ArchiveError(f"{where}: allowed: numbers as {', '.join(EDGES)}") from None
    if not (0 <= left < right <= width and 0 <= top < bottom <= height and width * height <= pixel_limit):
        allowed = f"0 <= xmin < xmax <= width, 0 <= ymin < ymax <= height, and at most {pixel_limit} pixels"
        raise ArchiveError(f"{where}: allowed: {allowed}")
    return edges


class Truth:
    """Masks of the pictures of a folder `data`, as the model sees them; `missing` holds those without one, and why."""

    def __init__(self, source: Source, data: Path, preprocessing: Preprocessing, pixel_limit: int) -> None:
        self._source, self.data, self._preprocessing, self._limit = source, data, preprocessing, pixel_limit
        self.missing: dict[str, str] = {}

    def mask(self, path: str) -> Mask | None:
        """Return the mask [H, W] of what the model sees of a picture, taken through the picture's own resize and crop."""
        try:
            if not self._source.knows(path):
                raise ArchiveError("there is none")
            within, picture = self._source.within(path), self._picture(path)
            if within.shape != (picture.height, picture.width):
                size = f"{within.shape[1]} x {within.shape[0]}"
                raise ArchiveError(f"it is of {size} pixels; allowed: the picture's {picture.width} x {picture.height}")
            seen = mask_seen(within, self._preprocessing, picture.box)
            if not seen.any():
                raise ArchiveError("the model sees nothing of it")
            return seen
        except (ArchiveError, RequestError, OSError) as reason:
            self.missing[path] = str(reason)
            return None

    def _picture(self, path: str) -> Picture:
        return read_picture((self.data / path).read_bytes(), self._preprocessing, self._limit)


def add_truth_arguments(command: argparse.ArgumentParser) -> None:
    """Add where ground truth comes from to a command line."""
    truth = command.add_mutually_exclusive_group()
    truth.add_argument("--masks", type=Path, metavar="FOLDER", help="a PNG for each picture, of its path but for the suffix")
    truth.add_argument("--boxes", type=Path, metavar="FILE", help=f"a CSV of boxes: file, {', '.join(EDGES)}")


def read_truth(
    masks: Path | None, boxes: Path | None, data: Path, paths: Iterable[str], preprocessing: Preprocessing, pixel_limit: int
) -> Truth | None:
    """Return the ground truth of pictures by their paths in `data`, None where none is given; raises ArchiveError, OSError."""
    source = MaskFolder(masks, pixel_limit) if masks else BoxFile(boxes, pixel_limit) if boxes else None
    if source is None:
        return None
    if not any(source.knows(path) for path in paths):
        allowed = "the picture's path with .png" if masks else "the picture's path or name as file"
        raise ArchiveError(f"{masks or boxes} knows none of the pictures of {data}; allowed: {allowed}")
    return Truth(source, data, preprocessing, pixel_limit)
