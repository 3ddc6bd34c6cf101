"""The audit record of an answer: what made its maps, so that they can be computed anew and compared."""

import base64
import hashlib
import io
import json
import logging
import platform
import re
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict

from torchserve_explain import __version__
from torchserve_explain.attribution.compiled import openvino_version
from torchserve_explain.serving.answers import Explanation, Report
from torchserve_explain.serving.pictures import Map

log = logging.getLogger(__name__)
MARK = "AUDIT "  # what a line of the log begins with; deploy/log4j2.xml writes such lines to a file of their own
HEADER = 33  # bytes of a PNG before its second chunk
SCRIPT = '<script type="application/json" id="audit">', "</script>"  # of a page; a browser runs nothing of it
PROJECTIONS = 64  # of a map's sketch: one for each bit of a random word


class AuditPart(BaseModel):
    """A part of a record; what a later version may add is kept."""

    model_config = ConfigDict(extra="allow", frozen=True)


class MapRecord(AuditPart):
    """What made one map, with its values' SHA-256 and a sketch of them that tells how far another map is away.

    `parameters` are the method's, resolved; `budget` is how many rows an adaptive method might take.
    """

    method: str
    target: int
    score: float
    parameters: dict[str, Any]
    budget: int
    evaluations: int
    sha256: str
    sketch: str


class AuditRecord(AuditPart):
    """What made the maps of one image: archive, image, versions, device, arithmetic, and each map's own."""

    time: str
    request: str
    model: dict[str, str]
    digest: str
    image_sha256: str
    versions: dict[str, str]
    device: str
    arithmetic: str = "float32"
    explanations: list[MapRecord]


class Auditor:
    """Writes the records of an archive with this digest, as it is served under this name."""

    def __init__(self, digest: str, model: Mapping[str, str], device: torch.device, arithmetic: str) -> None:
        self._digest, self._model, self._device, self._arithmetic = digest, dict(model), str(device), arithmetic

    def record(self, image: bytes, report: Report, request: str) -> dict[str, Any]:
        """Return the record of an image's explanations, ready for JSON; `request` is the server's name of the request."""
        record = AuditRecord(
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            request=request,
            model=self._model,
            digest=self._digest,
            image_sha256=sha256(image),
            versions=versions(),
            device=self._device,
            arithmetic=self._arithmetic,
            explanations=[_map_record(explanation) for explanation in report.explanations],
        )
        return record.model_dump(mode="json")


def write(record: Mapping[str, Any]) -> None:
    """Write a record to the log as one line of JSON behind the mark; it is ASCII."""
    log.info("%s%s", MARK, json.dumps(record, allow_nan=False))


def put_into(body: bytes, content_type: str, record: Mapping[str, Any]) -> bytes:
    """Return a PNG picture or a page with a record inside; another body comes back as it was.

    A PNG has it as the text `audit`, a page as JSON that a reader does not see. It is ASCII.
    """
    text = json.dumps(record, allow_nan=False)
    if content_type == "image/png":
        chunk = b"tEXtaudit\0" + text.encode()
        sealed = (len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
        return body[:HEADER] + sealed + body[HEADER:]
    if content_type.startswith("text/html"):
        end = body.rindex(b"</body>")
        return body[:end] + text.replace("<", r"\u003c").join(SCRIPT).encode() + body[end:]
    return body


def taken_from(data: bytes) -> bytes:
    """Return the record inside a PNG picture or a page as JSON, or nothing; other bytes come back as they are."""
    if data.startswith(b"\x89PNG"):
        with Image.open(io.BytesIO(data)) as picture:
            return str(picture.info.get("audit", "")).encode()
    if data.lstrip()[:14].lower() == b"<!doctype html":
        found = re.search("(.*)".join(SCRIPT).encode(), data)
        return found[1] if found else b""
    return data


def versions() -> dict[str, str]:
    """Return the versions of what maps depend on, OpenVINO's where it is installed."""
    compiler = openvino_version()
    return ({} if compiler is None else {"openvino": compiler}) | {
        "torchserve-explain": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
    }


def sha256(data: bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sketch(values: Map) -> NDArray[np.float32]:
    """Return the sums [64] of a map's values [H, W] under random signs, the same for all maps of a size.

    The length of the difference of two sketches estimates 8 times that of the maps', to a tenth (Johnson and Lindenstrauss;
    random signs: 10.1016/S0022-0000(03)00025-4). The signs are the bits of a generator whose raw words never change.
    """
    flat = np.ascontiguousarray(values, "<f4").ravel()
    words = np.random.PCG64(0).random_raw(len(flat)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8).reshape(len(flat), 8), axis=1)
    sums: NDArray[np.float32] = (2 * (flat.astype(np.float64) @ bits) - flat.sum(dtype=np.float64)).astype("<f4")
    return sums


def _map_record(explanation: Explanation) -> MapRecord:
    values = np.ascontiguousarray(explanation.values, "<f4")
    return MapRecord(
        method=explanation.method,
        target=explanation.job.case.target,
        score=explanation.job.case.known_score,
        parameters=explanation.used(),
        budget=explanation.job.case.budget,
        evaluations=explanation.explained.evaluations,
        sha256=sha256(values.tobytes()),
        sketch=base64.b64encode(sketch(values).tobytes()).decode(),
    )
