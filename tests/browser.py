"""A real browser on a live server, and what a person does with the page."""

import json
import re
import shutil

import pytest
from live import build_small, picture, served
from playwright.sync_api import FilePayload

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
PHOTO: FilePayload = {"name": 'it\'s a "photo"; mine.jpg', "mimeType": "image/jpeg", "buffer": picture()}
PATH = "/explanations/small"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine (Debian's package is 'chromium')")
    store = tmp_path_factory.mktemp("store")
    build_small(tmp_path_factory.mktemp("small"), store)
    with served(["small"], store, tmp_path_factory.mktemp("run")) as running:
        yield running.inference


@pytest.fixture(scope="module")
def chromium(server):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(server, chromium):
    """Open the page with options of the browser's context; nothing may be complained about on its console."""
    contexts, complaints = [], []

    def open_page(route=None, **options):
        context = chromium.new_context(base_url=server, **options)
        contexts.append(context)
        context.set_default_timeout(60_000)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        if route:
            route(page)
        page.goto(PATH)
        return page

    yield open_page
    for context in contexts:
        context.close()
    # An answer above 399 is told on the console too; the page tells it to the person.
    assert [text for text in complaints if not text.startswith("Failed to load resource: the server responded")] == []


def wait_for_text(page, selector, pattern):
    """Wait as a person does; the page's policy lets no test evaluate a condition inside it again and again."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_text(re.compile(pattern), timeout=60_000)


def give(page, photo=PHOTO):
    page.set_input_files("#file", photo)
    page.wait_for_selector(".bars li")


def choose(page, *methods):
    page.eval_on_selector_all("#methods details", "all => all.forEach(fold => fold.open = true)")
    for box in page.query_selector_all("input[name=method]:checked"):
        box.uncheck()
    for method in methods:
        page.check(f"input[value={method}]")


def explain(page, *methods):
    choose(page, *methods)
    page.click("#explain")
    finished(page)


def finished(page):
    wait_for_text(page, "#status", "^Finished")


def heat_of(page):
    return [element.get_attribute("src").split(",")[1] for element in page.query_selector_all(".card .heat")]


def hidden(page, parameter):
    return page.is_hidden(f"[data-parameter={parameter}]")


def open_settings(page):
    page.click("details:has(#fields) summary")


def tab_to(page, selector):
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            outline = page.evaluate(
                "getComputedStyle(document.activeElement.closest('.drop') ?? document.activeElement).outlineStyle"
            )
            assert outline != "none"
            return
    raise AssertionError(f"no tab leads to {selector}")


def luminance(colour):
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def with_key(page, asked):
    """Refuse requests as TorchServe does unless they come with the key."""

    def answer(route):
        asked.append(route.request.headers.get("authorization"))
        if asked[-1] == "Bearer right":
            return route.continue_()
        body = {"code": 400, "type": "InvalidKeyException", "message": "Token Authentication failed."}
        return route.fulfill(status=400, content_type="application/json", body=json.dumps(body))

    page.route(re.compile("/(predictions|explanations)/small$"), lambda route: (
        answer(route) if route.request.method == "POST" else route.continue_()
    ))  # fmt: skip
