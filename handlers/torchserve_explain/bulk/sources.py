"""What lies in a place to be explained: pictures, or Parquet with an encoded picture in each row."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs, parquet

from torchserve_explain.bulk.lake import LakePlace
from torchserve_explain.errors import ArchiveError
from torchserve_explain.gallery.question import check_label
from torchserve_explain.records import SUFFIXES

PORTION = 32  # pictures that are read together
READERS = 8  # threads that wait for a distant store
COLUMNS = "path (text), image (bytes, or a struct that holds bytes), and label (text) where there is one"
# A picture that can be explained. Those of Parquet are known by their file, row group and row in it.
ITEMS = pa.schema(dict.fromkeys(("path", "label", "stamp", "file"), pa.string()) | {"group": pa.int64(), "row": pa.int64()})
Read = tuple[int, bytes | OSError]  # a picture's index in its portion, and its content or why it cannot be read


@dataclass(frozen=True)
class PictureSource:
    """A place's pictures, a table of ITEMS; and why they have no labels, where they have none."""

    items: pa.Table
    unlabelled: str | None


def find(place: LakePlace, labels: Sequence[str]) -> PictureSource:
    """List a place; raises ArchiveError where there is no picture, or not one kind of thing."""
    files = {name: info for name, info in _files(place) if not any(part.startswith(".") for part in name.split("/"))}
    pictures = sorted(name for name in files if PurePosixPath(name).suffix.lower() in SUFFIXES)
    tables = sorted(name for name, info in files.items() if info.base_name.endswith(".parquet"))
    if bool(pictures) == bool(tables):
        held = f"{pictures[0]} and {tables[0]}" if pictures else "neither"
        raise ArchiveError(
            f"{place.shown} holds {held}; allowed: names that end in {', '.join(sorted(SUFFIXES))}, or else in .parquet"
        )
    return _rows(place, [(name, files[name]) for name in tables], labels) if tables else _pictures(pictures, files, labels)


def portions(items: pa.Table) -> Iterator[pa.Table]:
    """Yield items that are read together: of one file where they lie in one, and of one row group of it."""
    if items["file"].null_count:
        yield from (items.slice(start, PORTION) for start in range(0, items.num_rows, PORTION))
        return
    keys = list(zip(items["file"].to_pylist(), items["group"].to_pylist(), strict=True))
    start = 0
    for end in range(1, len(keys) + 1):
        if end == len(keys) or keys[end] != keys[start]:
            yield items.slice(start, end - start)
            start = end


def read(place: LakePlace, portion: pa.Table) -> Iterator[Read]:
    """Yield the contents of a portion's pictures, a few at a time in memory."""
    if portion["file"].null_count:
        with ThreadPoolExecutor(READERS) as readers:
            yield from enumerate(readers.map(lambda path: _content(place, path), portion["path"].to_pylist()))
        return
    wanted = {row: index for index, row in enumerate(portion["row"].to_pylist())}
    with _opened(place, portion["file"][0].as_py()) as table:
        start = 0
        for batch in table.iter_batches(PORTION, row_groups=[portion["group"][0].as_py()], columns=["image"]):
            images = batch.column("image")
            for row in range(start, start + batch.num_rows):
                if row in wanted:
                    yield wanted[row], _bytes(images[row - start].as_py())
            start += batch.num_rows


def _files(place: LakePlace) -> Iterator[tuple[str, fs.FileInfo]]:
    """Yield the files of a place by their path in it, or the one file that it is; raises ArchiveError."""
    try:
        (own,) = place.system.get_file_info([place.path()])
        if own.type == fs.FileType.File:
            yield "", own
            return
        for info in place.files(recursive=True):
            yield info.path.removeprefix(place.path()).lstrip("/"), info
    except UnicodeDecodeError as error:
        raise ArchiveError(f"{place.shown} holds {error.object!r}; allowed: names in UTF-8") from None
    except OSError as error:
        raise ArchiveError(f"{place.shown} cannot be listed: {error}") from None


def _pictures(names: Sequence[str], files: dict[str, fs.FileInfo], labels: Sequence[str]) -> PictureSource:
    """Return pictures, labelled where every subfolder is a label."""
    folders = sorted({name.partition("/")[0] if "/" in name else "" for name in names})
    try:
        for folder in folders:
            check_label("subfolder", folder, labels)
        unlabelled = None
    except ArchiveError as reason:
        unlabelled = "they do not lie in subfolders" if folders == [""] else str(reason)
    given = [None if unlabelled else name.partition("/")[0] for name in names]
    stamps, count = [_stamp(files[name]) for name in names], len(names)
    columns = [names, given, stamps, [None] * count, [0] * count, [0] * count]
    return PictureSource(pa.table(columns, schema=ITEMS), unlabelled)


def _rows(place: LakePlace, files: Sequence[tuple[str, fs.FileInfo]], labels: Sequence[str]) -> PictureSource:
    """Return the rows of Parquet files; reads their paths and labels alone."""
    parts = []
    for name, info in files:
        with _opened(place, name) as table:
            has_label = _check_columns(name or place.shown, table.schema_arrow)
            for group in range(table.num_row_groups):
                part = table.read_row_group(group, columns=["path", "label"] if has_label else ["path"])
                count = part.num_rows
                label = part["label"].to_pylist() if has_label else [None] * count
                same = [_stamp(info)] * count, [name] * count, [group] * count
                parts.append(pa.table([part["path"].to_pylist(), label, *same, list(range(count))], schema=ITEMS))
    items = pa.concat_tables(parts)
    if items["path"].null_count or len(items["path"].unique()) < items.num_rows:
        raise ArchiveError(f"{place.shown}: paths are missing or occur twice; allowed: a path of its own for each row")
    known = items["label"].drop_null().unique().to_pylist()
    for label in known:
        check_label("label", label, labels)
    return PictureSource(items, None if items.num_rows and not items["label"].null_count else "not every row has one")


def _check_columns(name: str, schema: pa.Schema) -> bool:
    """Raise ArchiveError where a Parquet file has not what is read; return whether it has labels."""
    kinds = {field.name: field.type for field in schema}
    image = kinds.get("image", pa.null())
    if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
        image = image.field("bytes").type
    fits = {"path": _is_text(kinds.get("path", pa.null())), "label": _is_text(kinds.get("label", pa.string()))}
    fits["image"] = pa.types.is_binary(image) or pa.types.is_large_binary(image)
    if not all(fits.values()):
        wrong = next(column for column, good in fits.items() if not good)
        raise ArchiveError(f"{name}: the column {wrong} is missing or of another type; allowed: {COLUMNS}")
    return "label" in kinds


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _opened(place: LakePlace, name: str) -> Any:
    return parquet.ParquetFile(place.system.open_input_file(place.path(name)))


def _content(place: LakePlace, path: str) -> bytes | OSError:
    try:
        return place.read(path)
    except OSError as error:
        return error


def _bytes(value: Any) -> bytes | OSError:
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else OSError("the row holds no image")


def _stamp(info: fs.FileInfo) -> str:
    """Return what changes with a file, as far as its size and time tell."""
    return f"{info.size}-{info.mtime_ns}"
