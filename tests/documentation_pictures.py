"""Draws the documentation's pictures that show the product, by the product: why.png, page.jpg, study/montage.png.

PYTHONPATH=.:tests:handlers python -m documentation_pictures
"""

import tempfile
from pathlib import Path

import httpx
from browser import CHROMIUM, FLAGS, explain
from conftest import ROOT
from PIL import Image
from playwright.sync_api import sync_playwright

from study.__main__ import draw
from study.measure import PACK
from torchserve_explain.archiver import load_archive
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.paths import STORE
from torchserve_explain.photo import photo_path
from torchserve_explain.servers.torchserve import free_ports, serving
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.pictures import small_png

DOCS, NAME = ROOT / "docs", "imagenet"
WIDTH, HEIGHT, QUALITY = 1200, 860, 80


def draw_why(address: str) -> None:
    """Draw what README.md asks for: every method on one sheet."""
    fields = {"method": "all", "samples": "100", "output": "png"}
    answer = httpx.post(address, files={"data": photo_path().read_bytes()}, data=fields, timeout=600)
    (DOCS / "why.png").write_bytes(answer.raise_for_status().content)
    reduce(DOCS / "why.png")


def reduce(path: Path) -> None:
    """Give a picture a palette, which quarters what readers load."""
    path.write_bytes(small_png(Image.open(path)))


def draw_page(address: str) -> None:
    """Draw the page after two explanations of its sample."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(address)
        page.click("#sample")
        page.wait_for_selector(".bars li")
        explain(page, "integrated_gradients", "grad_cam")
        page.eval_on_selector_all("#methods details", "all => all.forEach(fold => fold.open = false)")
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=DOCS / "page.jpg", type="jpeg", quality=QUALITY)
        browser.close()


def main() -> None:
    """Serve the default classifier and draw."""
    archive = load_archive(NAME)
    seen = read_picture(photo_path().read_bytes(), archive.settings.preprocessing, 10**8)
    montage = DOCS / "study" / "montage.png"
    draw(Engine(archive.classifier, PACK), seen, montage)
    reduce(montage)
    with tempfile.TemporaryDirectory() as folder, serving([NAME], STORE, free_ports(), Path(folder)) as running:
        address = f"{running.inference}/explanations/{NAME}"
        draw_why(address)
        draw_page(address)


if __name__ == "__main__":
    main()
