"""What Ray's workers do with a table: read and decode pictures, explain them, write their rows."""

import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import ray
import torch
from PIL import Image
from torch import Tensor

from torchserve_explain.archive import Archive
from torchserve_explain.attribution.computation import Outcome
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.memory import keep_freed_memory
from torchserve_explain.attribution.methods import Attribution
from torchserve_explain.bulk.lake import SCHEMA, Lake, LakePlace
from torchserve_explain.bulk.sources import PORTION, read
from torchserve_explain.errors import AttributionError, ExplainError, NotFinite, RequestError
from torchserve_explain.gallery.pages import FAILED, QUALITY
from torchserve_explain.gallery.planned import Due, Planned, explained, facts, plan
from torchserve_explain.gallery.question import GallerySample, Question, ask, digest_of
from torchserve_explain.records import Record
from torchserve_explain.serving.images import Picture, as_input, read_picture
from torchserve_explain.serving.pictures import compact
from torchserve_explain.serving.settings import Settings

TEXTS = ("path", "label", "stamp", "digest", FAILED)
PIXELS = {"pixels": pa.binary(), "width": pa.int32(), "height": pa.int32(), "crop": pa.list_(pa.int32())}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Ray shows an actor the GPU that it has
DECODED = pa.schema(dict.fromkeys(TEXTS, pa.string()) | PIXELS | {"maps": pa.list_(pa.string())})
WRITTEN = pa.schema({"rows": pa.int64(), "failed": pa.int64(), "example": pa.string()})


@dataclass(frozen=True)
class LakeQuestion:
    """What is asked of every picture, as the command line has it."""

    methods: str | None
    target: str
    versus: str
    given: Mapping[str, str]
    overlays: bool

    def of(self, archive: Archive) -> Question:
        """Return the question to an archive; raises as `ask` does."""
        return ask(archive, self.methods, self.target, self.given, self.versus)


@dataclass(frozen=True)
class Decoder:
    """Reads and decodes the pictures of a portion."""

    place: LakePlace
    settings: Settings

    def __call__(self, portion: pa.Table) -> Iterator[pa.Table]:
        """Yield what the model sees of pictures, or why it can see nothing."""
        rows, decoded = portion.select(["path", "label", "stamp", "maps"]).to_pylist(), []
        for index, content in read(self.place, portion):
            decoded.append(rows[index] | self._decode(content))
            if len(decoded) == PORTION:
                yield pa.Table.from_pylist(decoded, DECODED)
                decoded = []
        yield pa.Table.from_pylist(decoded, DECODED)

    def _decode(self, content: bytes | OSError) -> Record:
        """Return what a picture's content tells; `pixels` is what the model sees, 8 bits a channel."""
        if isinstance(content, OSError):
            return {FAILED: f"it cannot be read: {content}"}
        record: Record = {"digest": digest_of(content)}
        try:
            picture = read_picture(content, self.settings.preprocessing, self.settings.explanations.limits.pixels)
        except (RequestError, MemoryError) as reason:
            return record | {FAILED: str(reason) or "out of memory"}
        seen = {"pixels": picture.seen.tobytes(), "width": picture.width, "height": picture.height, "crop": picture.crop}
        return record | seen


class LakeExplainer:
    """An actor that explains what has been decoded, on its own GPU or core; what fails is a row that says why."""

    def __init__(self, archive: ray.ObjectRef, asked: LakeQuestion) -> None:
        keep_freed_memory()
        torch.backends.cudnn.allow_tf32 = False  # a gradient loses too much in ten bits
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "archive.mar")
            path.write_bytes(ray.get(archive))
            self._archive = Archive.load(path, DEVICE)
        self._question, self._overlays = asked.of(self._archive), asked.overlays
        self._engine = Engine(self._archive.classifier, self._archive.settings.explanations.limits.pack)

    def __call__(self, pictures: pa.Table) -> pa.Table:
        """Return a row of each picture's every map."""
        decoded = pictures.to_pylist()
        rows = self._explained([one for one in decoded if one[FAILED] is None])
        rows += [row for one in decoded if one[FAILED] is not None for row in self._failures(one, one[FAILED])]
        return pa.Table.from_pylist(rows, SCHEMA)

    def _explained(self, decoded: Sequence[Record]) -> list[Record]:
        """Explain pictures together."""
        if not decoded:
            return []
        due = [self._due(one) for one in decoded]
        try:
            logits: Sequence[Tensor] = list(self._engine.logits([one.picture.input for one in due]))
        except AttributionError as reason:
            return [row for one in decoded for row in self._failures(one, str(reason))]
        rows: list[Record] = []
        planned: list[tuple[Record, Planned]] = []
        for one, its, own in zip(decoded, due, logits, strict=True):
            try:
                planned += [(one, job) for job in plan(self._question, its, own)]
            except NotFinite as reason:
                rows += self._failures(one, str(reason))
        outcomes = self._engine.run([job.job for _, job in planned])
        return rows + [self._row(one, job, outcome) for (one, job), outcome in zip(planned, outcomes, strict=True)]

    def _due(self, one: Record) -> Due:
        preprocessing = self._archive.settings.preprocessing
        height, width = preprocessing.size
        seen = Image.frombytes("L" if len(preprocessing.mean) == 1 else "RGB", (width, height), one["pixels"])
        picture = Picture(as_input(seen, preprocessing), seen, one["width"], one["height"], tuple(one["crop"]))
        return Due(GallerySample(one["path"], one["label"]), one["digest"], picture, one["maps"])

    def _row(self, one: Record, planned: Planned, outcome: Outcome[Attribution]) -> Record:
        """Return the row of a map."""
        if isinstance(outcome, ExplainError):
            return self._common(one) | facts(self._question, planned) | {FAILED: str(outcome)}
        record, explanation = explained(self._question, planned, outcome)
        values = compact(explanation.values)
        stored = {"values": values.tobytes(), "dtype": values.dtype.name, "shape": values.shape}
        pictures = {}
        if self._overlays:
            pictures = {"overlay": webp(explanation.drawn.overlay), "seen": webp(explanation.drawn.seen.convert("RGB"))}
        return self._common(one) | record | {"parameters": json.dumps(record["parameters"])} | stored | pictures

    def _failures(self, one: Record, why: str) -> list[Record]:
        """Return a row of each of a picture's maps, none of which can be made."""
        settings, methods = self._question.settings, self._question.methods
        maps = [{"map": name, "method": methods[name].name, "settings": settings[name], FAILED: why} for name in one["maps"]]
        return [self._common(one) | row for row in maps]

    def _common(self, one: Record) -> Record:
        names = ("path", "label", "stamp", "digest", "width", "height", "crop")
        return {name: one[name] for name in names} | {"archive": self._archive.digest}


@dataclass(frozen=True)
class Writer:
    """Writes rows into a lake."""

    place: LakePlace

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Write, and return how many there were, how many of them failed, and why one of them did."""
        Lake(self.place).add(rows)
        reasons = rows[FAILED].drop_null()
        example = reasons[0].as_py() if len(reasons) else None
        return pa.table([[rows.num_rows], [len(reasons)], [example]], schema=WRITTEN)


def webp(image: Image.Image) -> bytes:
    """Encode a picture."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=QUALITY)
    return stream.getvalue()
