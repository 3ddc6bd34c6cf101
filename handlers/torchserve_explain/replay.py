"""Computes an audited explanation anew, and says whether it is the same.

RECORD is an answer that was asked for with audit=true (JSON, a picture or a page), or a log of audit records, of which
those of the image count. The exit status is 0 where every map is the same to rounding, and 1 where one is not, or image or
archive are others.
"""

import argparse
import base64
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from torchserve_explain.archive import Archive
from torchserve_explain.attribution.computation import Piece
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.memory import keep_freed_memory
from torchserve_explain.errors import ArchiveError, ExplainError
from torchserve_explain.options import positive
from torchserve_explain.paths import STORE
from torchserve_explain.servers.host import DEVICE
from torchserve_explain.serving.audit import MARK, AuditRecord, MapRecord, sha256, taken_from, versions
from torchserve_explain.serving.service import RawRequest, Service
from torchserve_explain.serving.settings import Settings

TOLERANCE = 1e-3  # of the map's length; rows that shared a pass with others' move it by 3e-6
UNLIMITED = 10**9


@dataclass(frozen=True)
class Comparison:
    """A map as it was recorded, and as it is now."""

    then: MapRecord
    now: MapRecord

    @property
    def identical(self) -> bool:
        """Whether every value is the same, to the last bit."""
        return self.then.sha256 == self.now.sha256

    @property
    def difference(self) -> float:
        """The length of the maps' difference as a fraction of the recorded map's, by their sketches."""
        before, after = _sketch(self.then), _sketch(self.now)
        return 0.0 if self.identical else float(np.linalg.norm(after - before) / (np.linalg.norm(before) or 1e-30))

    @property
    def cosine(self) -> float:
        """The cosine of the maps, by their sketches."""
        before, after = _sketch(self.then), _sketch(self.now)
        return float(before @ after / (np.linalg.norm(before) * np.linalg.norm(after) or 1e-30))

    def sentence(self, tolerance: float) -> str:
        """Say in a line how the map is now."""
        name = f"{self.then.method} of class {self.then.target}"
        if self.identical:
            return f"{name}: the same, to the last bit"
        apart = f"differs by {self.difference:.2g} of the map, cosine {self.cosine:.6f}"
        rows = f"{self.then.evaluations} evaluations then, {self.now.evaluations} now"
        return f"{name}: {'the same to rounding' if self.difference <= tolerance else 'NOT THE SAME'}: {apart}; {rows}"


def read_audit(path: Path) -> list[AuditRecord]:
    """Return the records of a file: an answer's, or those of a log, a line each; raises ArchiveError."""
    try:
        text = taken_from(path.read_bytes()).decode()
        try:
            contents = [json.loads(text)]
        except ValueError:
            contents = [json.loads(line.partition(MARK)[2] or line) for line in text.splitlines() if line.strip()]
    except (ValueError, OSError):  # OSError: a picture that cannot be read
        raise ArchiveError(f"{path} is no record: allowed: a JSON, PNG or HTML answer, or a log of one record a line") from None
    try:
        records = [AuditRecord.model_validate(found) for content in contents for found in _audits(content)]
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ArchiveError(f"{path}: a record's {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from None
    if not records:
        raise ArchiveError(f"{path} holds no audit record; ask for the explanation with audit=true")
    return records


def of_image(records: list[AuditRecord], image: bytes) -> list[AuditRecord]:
    """Return the records of this image; raises ArchiveError where there is none."""
    digest = sha256(image)
    found = [record for record in records if record.image_sha256 == digest]
    if not found:
        known = ", ".join(sorted({record.image_sha256 for record in records})[:3])
        raise ArchiveError(f"the image is another one: its SHA-256 is {digest}, recorded is {known}")
    return found


def of_archive(records: list[AuditRecord], digest: str) -> list[AuditRecord]:
    """Return the records of this archive; raises ArchiveError where there is none."""
    found = [record for record in records if record.digest == digest]
    if not found:
        recorded = ", ".join(sorted({record.digest for record in records})[:3])
        raise ArchiveError(f"the archive is another one: its digest is {digest}, recorded is {recorded}")
    return found


def replay(record: AuditRecord, image: bytes, archive: Archive) -> list[Comparison]:
    """Make the maps of a record anew, as the server made them; raises ExplainError where one cannot be made."""
    engine = Engine(archive.classifier, archive.settings.explanations.limits.pack)
    return [Comparison(then, _remade(then, image, archive, engine)) for then in record.explanations]


def _remade(then: MapRecord, image: bytes, archive: Archive, engine: Engine) -> MapRecord:
    settings = _as_recorded(archive.settings, then.budget)
    service = Service(archive.classifier, archive.labels, settings, {"name": "replay", "version": "0"}, archive.digest)
    fields = then.parameters | {"data": image, "method": then.method, "target": then.target, "audit": True}
    raw = RawRequest(fields, {"explain": "True"})
    answer = engine.results([Piece(service.answer(raw))])[0].value
    body: dict[str, Any] = json.loads(answer.body)
    if answer.status != 200:
        raise ExplainError(f"{then.method} of class {then.target} cannot be made anew: {body['message']}")
    (now,) = AuditRecord.model_validate(body["audit"]).explanations
    return now


def _as_recorded(settings: Settings, budget: int) -> Settings:
    """Return settings under which a record's parameters mean what they meant, and nothing else is limited."""
    free = {"evaluations": UNLIMITED, "answer_bytes": UNLIMITED, "seconds": float(UNLIMITED)}
    limits = settings.explanations.limits.model_copy(update=free | {"path_evaluations": budget, "sampling_evaluations": budget})
    explanations = settings.explanations.model_copy(update={"defaults": {}, "audit": None, "limits": limits})
    return settings.model_copy(update={"explanations": explanations, "continuousBatching": False})


def _audits(content: object) -> Iterator[object]:
    """Yield the records in JSON: one itself, an answer's, or those of a KServe answer's instances."""
    if isinstance(content, dict):
        if "image_sha256" in content:
            yield content
        elif "audit" in content:
            yield content["audit"]
        else:
            for inner in content.get("explanations") or ():
                yield from _audits(inner)


def _sketch(record: MapRecord) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.frombuffer(base64.b64decode(record.sketch), "<f4").astype(np.float64)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add what is replayed to a command line."""
    command.add_argument("record", type=Path, metavar="RECORD", help="a JSON, PNG or HTML answer, or a log of audit records")
    command.add_argument("--image", type=Path, required=True, help="the image as it was sent")
    command.add_argument("--archive", type=Path, help="the archive (default: that of the model's name in model_store)")
    command.add_argument(
        "--device", default=DEVICE, help="what the model runs on, such as cuda:0 or cpu (default: %(default)s)"
    )
    command.add_argument(
        "--tolerance", type=positive, default=TOLERANCE,
        help="how far a map that is the same may be away, as a fraction of it (default: %(default)s)",
    )  # fmt: skip


def main(options: argparse.Namespace) -> int:
    """Replay the records that the command line names, and say what came of it."""
    keep_freed_memory()
    try:
        image = options.image.read_bytes()
        records = of_image(read_audit(options.record), image)
        path = options.archive or STORE / f"{Path(records[0].model.get('name', '')).name}.mar"
        if not path.exists():
            raise ArchiveError(f"{path} does not exist; allowed: --archive and a .mar, or the folder of an unpacked one")
        archive = Archive.load(path, options.device)
        records = of_archive(records, archive.digest)
        print(f"image and archive are those of the record{'s' if len(records) > 1 else ''}")
        compared = [one for record in records for one in _replayed(record, image, archive, options)]
    except (ExplainError, OSError, UnicodeDecodeError) as reason:
        print(f"replay: {reason}", file=sys.stderr)
        return 1
    return 0 if all(one.difference <= options.tolerance for one in compared) else 1


def _replayed(record: AuditRecord, image: bytes, archive: Archive, options: argparse.Namespace) -> list[Comparison]:
    """Replay one record and print what came of it, and first what else is not as it was."""
    here = versions() | {"device": options.device, "arithmetic": archive.classifier.arithmetic}
    for name, then in (record.versions | {"device": record.device, "arithmetic": record.arithmetic}).items():
        if here.get(name) != then:
            print(f"{name} was {then} and is {here.get(name, 'unknown')}")
    compared = replay(record, image, archive)
    for one in compared:
        print(one.sentence(options.tolerance))
    return compared
