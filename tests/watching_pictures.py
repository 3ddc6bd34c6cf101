"""Draws docs/watching.png: what Prometheus' own page shows of a server under load, whose worker is killed meanwhile.

`make pictures` runs it.
"""

import io
import os
import signal
import tempfile
import time
from pathlib import Path
from urllib.parse import urlencode

from browser import CHROMIUM, FLAGS
from conftest import ROOT
from PIL import Image
from playwright.sync_api import sync_playwright
from watch import Composed, composed

OUT = ROOT / "docs" / "watching.png"
QUERIES = (
    "sum by (Method) (rate(ExplainSeconds_count[15s]))",
    "histogram_quantile(0.99, sum by (Kind, le) (rate(RequestSeconds_bucket[15s])))",
    "sum by (ModelName) (RequestsInFlight)",
    "max by (WorkerName) (WorkerLoadTime)",
)
COLOURS, WIDTH = 128, 800  # pixels of a graph
# What a picture needs not: the controls around query and graph.
PLAIN = ".query-history, .form-inline, .text-right, .nav-tabs, .graph_container > .clearfix, .eval_stats {display: none}"


def pictures(everything: Composed, minutes: int) -> list[Image.Image]:
    """Return Prometheus' graph of each query, over the last minutes."""
    shots = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": WIDTH, "height": 900})
        for query in QUERIES:
            asked = {"g0.expr": query, "g0.tab": 0, "g0.range_input": f"{minutes}m", "g0.step_input": 1}
            page.goto(f"{everything.watcher.address}/classic/graph?{urlencode(asked)}")
            page.wait_for_selector(".rickshaw_legend .line")
            page.add_style_tag(content=PLAIN)
            shots.append(Image.open(io.BytesIO(page.locator(".graph_wrapper").screenshot())).convert("RGB"))
        browser.close()
    return shots


def side_by_side(shots: list[Image.Image]) -> Image.Image:
    """Return the pictures in two columns."""
    width, height = (max(shot.size[axis] for shot in shots) for axis in (0, 1))
    sheet = Image.new("RGB", (2 * width, height * (len(shots) // 2)), "white")
    for place, shot in enumerate(shots):
        sheet.paste(shot, (width * (place % 2), height * (place // 2)))
    return sheet


def main() -> None:
    """Ask, kill the worker, ask again, and write the picture."""
    with tempfile.TemporaryDirectory() as folder, composed(Path(folder)) as everything:
        began = time.time()
        with everything.asked():
            time.sleep(60)
            os.kill(killed := everything.worker(), signal.SIGKILL)
            everything.worker(killed)
            time.sleep(40)
        shots = pictures(everything, 1 + int((time.time() - began) / 60))
    side_by_side(shots).quantize(COLOURS).save(OUT, optimize=True)
    print(OUT, OUT.stat().st_size)


if __name__ == "__main__":
    main()
