"""The whole round in one go: serve, predict and explain a photo with every method, write demo/, stop."""

import argparse
import base64
import io
import json
import os
import sys
from pathlib import Path

import httpx
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from torchserve_explain.archiver import ensure_archive
from torchserve_explain.errors import ExplainError, ServerError
from torchserve_explain.paths import ROOT, STORE
from torchserve_explain.photo import photo_path
from torchserve_explain.servers.torchserve import Server, free_ports, serving
from torchserve_explain.serving.pictures import Cell, Scale, contact_sheet, png


def ask(server: Server, kind: str, **fields: str) -> httpx.Response:
    """Send the photo; raises ServerError where the answer is not a success."""
    url = f"{server.inference}/{kind}/{server.names[0]}"
    answer = httpx.post(
        url, files={"data": photo_path().read_bytes()}, data=fields, headers=server.authorization(), timeout=120
    )
    if answer.status_code != 200:
        raise ServerError(f"{url} answered {answer.status_code}: {answer.text}")
    return answer


def methods_of(server: Server) -> list[str]:
    """Return the methods that serve the server's first model; raises httpx.HTTPError."""
    url = f"{server.inference}/explanations/{server.names[0]}"
    report = httpx.get(url, headers={**server.authorization(), "Accept": "application/json"}, timeout=60).raise_for_status()
    return [method["name"] for method in report.json()["methods"]]


def show(server: Server, out: Path, console: Console) -> None:
    """Ask for everything and write it down; the sheet is made of the methods' own pictures."""
    predictions = ask(server, "predictions").json()
    (out / "predictions.json").write_text(json.dumps(predictions, indent=1))
    console.print(*(f"{label}: {probability:.1%}" for label, probability in predictions.items()), sep=", ")
    table = Table("method", "target", "score", "evaluations", "completeness error", "ms")
    cells: list[Cell] = []
    for method in track(methods_of(server), "explaining", console=console):
        answer = ask(server, "explanations", method=method).json()
        (out / f"{method}.json").write_text(json.dumps(answer, indent=1))
        one = answer["explanations"][0]
        overlay = base64.b64decode(one["heatmap"]["overlay_png"])
        (out / f"{method}.png").write_bytes(overlay)
        scale, error = one["heatmap"]["scale"], one["completeness_error"]
        told_error = "-" if error is None else f"{error:.1%}"
        cells.append(
            Cell(
                Image.open(io.BytesIO(overlay)),
                method,
                "" if error is None else f"completeness error {told_error}",
                Scale(scale["colormap"], scale["to"], scale["unit"]),
            )
        )
        cost = (f"{one['target']['score']:.2f}", str(one["evaluations"]), told_error, f"{one['milliseconds']:.0f}")
        table.add_row(method, one["target"]["label"], *cost)
    (out / "contact_sheet.png").write_bytes(png(contact_sheet(cells)))
    (out / "report.html").write_bytes(
        ask(server, "explanations", method="integrated_gradients,grad_cam", output="html").content
    )
    console.print(table)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add where the demo writes to a command line."""
    command.add_argument("--out", type=Path, default=ROOT / "demo", help="where everything goes (default: demo)")


def main(options: argparse.Namespace) -> int:
    """Run the demo; its ports are free ones unless TS_* variables name others."""
    console, out = Console(), options.out
    environment = free_ports() | {key: value for key, value in os.environ.items() if key.startswith("TS_")}
    try:
        ensure_archive("imagenet")
        out.mkdir(parents=True, exist_ok=True)
        console.print("starting TorchServe")
        with serving(["imagenet"], STORE, environment, ROOT / "run" / "demo") as server:
            show(server, out, console)
    except (ExplainError, OSError) as reason:
        print(f"demo: {reason}", file=sys.stderr)
        return 1
    console.print(f"written: {', '.join(sorted(path.name for path in out.iterdir()))} in {out}")
    return 0
