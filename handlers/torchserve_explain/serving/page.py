"""The page to try the model in a browser: template, style and script put together, nothing else allowed to run."""

import base64
import hashlib
import io
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from torchserve_explain.serving.answers import Answer, html_answer

HERE = Path(__file__).parent
SCRIPTS = ("page_fields.js", "page_maps.js", "page.js")
SAMPLE_SIDE, SAMPLE_QUALITY = 448, 80  # under 30 kB


def try_it_page(report: Mapping[str, Any], keyed: bool) -> Answer:
    """Answer the page for what `capability_report` tells; `keyed`: it was opened with a key, so requests need one."""
    style, script = (HERE / "page.css").read_text("utf-8"), "\n".join((HERE / name).read_text("utf-8") for name in SCRIPTS)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {}  # methods and parameters in their own order
    html = environment.get_template("page.html").render(
        report=report, keyed=keyed, sample=sample(), policy=policy(style, script), style=Markup(style), script=Markup(script)
    )
    return html_answer(html)


def policy(style: str, script: str) -> str:
    """Return the content security policy that runs this very script, this very style, and nothing else."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "img-src data: blob:",
            "connect-src 'self'",
            "form-action 'self'",
            "base-uri 'none'",
        )
    )


@cache
def sample() -> str:
    """Return a photo to try, a cup of espresso (by Rachel Michetti, CC0), as base64."""
    stream = io.BytesIO()
    with Image.open(str(files("skimage") / "data" / "coffee.png")) as photo:
        small = photo.convert("RGB")
        small.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
        small.save(stream, "JPEG", quality=SAMPLE_QUALITY)
    return base64.b64encode(stream.getvalue()).decode()


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
