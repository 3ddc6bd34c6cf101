"""Maps as rows of Parquet, in a folder or under an S3 prefix: their columns, and files that are whole or not there."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import dataset, fs, parquet

from torchserve_explain.errors import ArchiveError
from torchserve_explain.gallery.pages import FAILED

ABOUT, MAPS = "about.json", "maps"  # what was asked; the folder of the Parquet files
DONE, FAILURES = "maps", "failed"  # what a file's name starts with
# A row is a picture's map. `stamp` changes with the picture's file, `settings` with all else that a map depends on.
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("path", "map", "method", "label", "predicted")),
        ("probability", pa.float64()),
        ("label_probability", pa.float64()),
        ("correct", pa.bool_()),
        ("target", pa.string()),
        ("target_probability", pa.float64()),
        ("versus", pa.string()),  # what the target is explained rather than
        ("parameters", pa.string()),  # JSON
        ("signed", pa.bool_()),
        ("evaluations", pa.int64()),
        ("completeness_error", pa.float64()),
        ("values", pa.binary()),  # the map [H, W] in C order
        ("dtype", pa.string()),  # float16, or float32 where that would lose it
        ("shape", pa.list_(pa.int32())),
        ("width", pa.int32()),  # of the upright original, in pixels
        ("height", pa.int32()),
        ("crop", pa.list_(pa.int32())),  # the part of it that the model saw: left, top, right, bottom
        ("overlay", pa.binary()),  # WebP
        ("seen", pa.binary()),  # WebP
        *((name, pa.string()) for name in ("digest", "archive", "settings", "stamp", FAILED)),
    ]
)
LARGE = ("values", "overlay", "seen")  # columns of many bytes


@dataclass(frozen=True)
class LakePlace:
    """A folder, or a bucket and prefix such as s3://bucket/prefix, as a command line names it."""

    name: str

    @property
    def shown(self) -> str:
        """The name without keys and options that a URI may hold."""
        return re.sub(r"//[^/@]*@", "//", self.name).partition("?")[0] if "://" in self.name else self.name

    @cached_property
    def opened(self) -> tuple[fs.FileSystem, str]:
        """The file system, and the path in it; raises ArchiveError."""
        if "://" not in self.name:
            return fs.LocalFileSystem(), str(Path(self.name).resolve())
        try:
            system, base = fs.FileSystem.from_uri(self.name)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ArchiveError(f"{self.shown} cannot be opened: {error}; allowed: a folder, or s3://BUCKET/PREFIX") from None
        return system, base

    @property
    def system(self) -> fs.FileSystem:
        """The file system."""
        return self.opened[0]

    @property
    def local(self) -> bool:
        """Whether it lies on this machine's disks."""
        return isinstance(self.system, fs.LocalFileSystem)

    def path(self, name: str = "") -> str:
        """Return the path of what has a name below it."""
        return f"{self.opened[1]}/{name}" if name else self.opened[1]

    def files(self, below: str = "", recursive: bool = False) -> list[fs.FileInfo]:
        """Return the files in a folder, none where it does not exist."""
        selector = fs.FileSelector(self.path(below), allow_not_found=True, recursive=recursive)
        return [info for info in self.system.get_file_info(selector) if info.type == fs.FileType.File]

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        with self.system.open_input_file(self.path(name)) as stream:
            content: bytes = stream.read()
        return content

    @contextmanager
    def written(self, name: str) -> Iterator[pa.NativeFile]:
        """Give a stream whose file is there once it is whole: S3 does so itself."""
        folder, _, last = name.rpartition("/")
        self.system.create_dir(self.path(folder), recursive=True)
        path = self.path(f"{folder}/.{last}".lstrip("/")) if self.local else self.path(name)
        with self.system.open_output_stream(path) as stream:
            yield stream
        if self.local:
            self.system.move(path, self.path(name))


class Lake:
    """Maps that have been made, and what they were made of."""

    def __init__(self, place: LakePlace) -> None:
        self.place = place

    def about(self) -> dict[str, Any]:
        """Return what was asked; raises ArchiveError where there is none."""
        try:
            about: dict[str, Any] = json.loads(self.place.read(ABOUT))
        except FileNotFoundError:
            raise ArchiveError(f"{self.place.shown} holds no {ABOUT}; allowed: what explain --engine ray has written") from None
        return about

    def write_about(self, about: Mapping[str, Any]) -> None:
        """Write what is asked; raises ArchiveError where something else lies in the place."""
        system, found = self.place.system, fs.FileSelector(self.place.path(), allow_not_found=True)
        names = {info.base_name for info in system.get_file_info(found)}
        if names and ABOUT not in names:
            raise ArchiveError(f"--out: {self.place.shown} holds something else; allowed: a new folder, or one of this command")
        with self.place.written(ABOUT) as stream:
            stream.write(json.dumps(about, indent=1).encode())

    def keys(self, settings: Mapping[str, str], stamps: Mapping[str, str]) -> set[tuple[str, str]]:
        """Return the paths and maps that are there.

        What failed is tried again, and what is asked otherwise or of another picture is made anew: those rows are dropped.
        """
        known: set[tuple[str, str]] = set()
        for info in self.place.files(MAPS):
            if info.base_name.startswith((".", FAILURES)):
                self.place.system.delete_file(info.path)
                continue
            table = self._read(info.path, ["path", "map", "settings", "stamp"])
            rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
            kept = [settings.get(name, was) == was and stamps.get(path, at) == at for path, name, was, at in rows]
            if not all(kept):
                self._keep(info, kept)
            known |= {(row[0], row[1]) for row, whether in zip(rows, kept, strict=True) if whether}
        return known

    def add(self, rows: pa.Table) -> None:
        """Write rows; the same rows twice are one file, so that who was interrupted may repeat it."""
        for name, part in ((DONE, rows.filter(_failed(rows, False))), (FAILURES, rows.filter(_failed(rows, True)))):
            if part.num_rows:
                key = hashlib.sha256(repr(part.select(["path", "map", "settings", "stamp"]).to_pylist()).encode()).hexdigest()
                with self.place.written(f"{MAPS}/{name}-{key[:32]}.parquet") as stream:
                    _write(part, stream)

    def rows(self, columns: list[str], condition: Any = None) -> Iterator[dict[str, Any]]:
        """Yield rows, a few at a time in memory."""
        files = [info.path for info in self.place.files(MAPS) if not info.base_name.startswith(".")]
        found = dataset.dataset(files, schema=SCHEMA, filesystem=self.place.system, format="parquet")
        for batch in found.to_batches(
            columns=columns, filter=condition, batch_size=64, batch_readahead=1, fragment_readahead=1
        ):
            yield from batch.to_pylist()

    def _read(self, path: str, columns: list[str] | None = None) -> pa.Table:
        return parquet.read_table(path, columns=columns, filesystem=self.place.system)

    def _keep(self, info: fs.FileInfo, kept: list[bool]) -> None:
        """Replace a file by those rows of it that are kept."""
        if any(kept):
            rows = self._read(info.path).filter(pa.array(kept))
            with self.place.written(f"{MAPS}/{info.base_name}") as stream:
                _write(rows, stream)
        else:
            self.place.system.delete_file(info.path)


def _failed(rows: pa.Table, whether: bool) -> pa.Array:
    column = rows[FAILED]
    return column.is_valid() if whether else column.is_null()


def _write(rows: pa.Table, stream: pa.NativeFile) -> None:
    text = [field.name for field in SCHEMA if field.name not in LARGE]
    parquet.write_table(rows, stream, compression="zstd", use_dictionary=text, row_group_size=64)
