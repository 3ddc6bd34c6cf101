"""The page as a person meets it, in a real browser against a live server."""

import base64
import io
import json
import re
import shlex
import subprocess

import httpx
import pytest
from browser import (
    PATH,
    PHOTO,
    choose,
    chromium,
    explain,
    give,
    heat_of,
    hidden,
    luminance,
    open_settings,
    opened,
    server,
    tab_to,
    wait_for_text,
    with_key,
)
from live import SMALL_LABELS
from PIL import Image

from torchserve_explain.serving.page import try_it_page

__all__ = ["chromium", "opened", "server"]  # fixtures
pytestmark = pytest.mark.live


def test_a_program_gets_the_report_and_a_browser_the_page(server):
    told = httpx.get(server + PATH, headers={"Accept": "application/json"})
    assert told.headers["content-type"] == "application/json"
    assert told.json()["model"] == {"name": "small", "version": "1.0"} and told.json()["labels"] == SMALL_LABELS
    page = httpx.get(server + PATH, headers={"Accept": "text/html,*/*;q=0.8"})
    assert page.headers["content-type"].startswith("text/html") and "<script" in page.text


def test_an_upload_shows_its_prediction(server, opened):
    page = opened()
    give(page)
    expected = httpx.post(f"{server}/predictions/small", files={"data": PHOTO["buffer"]}).json()
    shown = [row.inner_text().split("\n") for row in page.query_selector_all(".bars li")]
    assert [label for label, _ in shown] == list(expected)
    for (_, text), probability in zip(shown, expected.values(), strict=True):
        assert float(text.removesuffix(" %")) == pytest.approx(100 * probability, abs=0.051)
    assert page.text_content("#preview-name") == PHOTO["name"]


def test_the_sample_and_two_methods_side_by_side(opened):
    page = opened(viewport={"width": 1200, "height": 900})
    page.click("#sample")
    page.wait_for_selector(".bars li")
    explain(page, "grad_cam", "integrated_gradients")
    first, second = (card.bounding_box() for card in page.query_selector_all(".card"))
    assert first["y"] == second["y"] and first["x"] + first["width"] < second["x"]
    paths, cam = (card.inner_text() for card in page.query_selector_all(".card"))
    assert "depends on that place" in cam and "adds up" not in cam
    assert "Red raised" in paths and "adds up" in paths and "model passes" in paths
    assert "The gradient averaged on the straight path" in paths
    for card in page.query_selector_all(".card"):
        ends = [float(card.query_selector(end).inner_text()) for end in (".from", ".to")]
        assert ends[0] < ends[1]
        assert "gradient" in card.query_selector(".bar").evaluate("bar => getComputedStyle(bar).backgroundImage")
        assert all(image.get_attribute("alt") for image in card.query_selector_all("img"))


def test_the_seen_part_of_the_photo_lies_under_the_map(server, opened):
    page = opened()
    give(page)
    explain(page, "grad_cam")
    seen = page.evaluate("document.querySelector('canvas').toDataURL('image/png')").split(",")[1]
    drawn = pixels(base64.b64decode(seen))
    left, top, right, bottom = httpx.post(server + PATH, files={"data": PHOTO["buffer"]}).json()["image"]["crop"]
    expected = pixels(PHOTO["buffer"]).crop((left, top, right, bottom)).resize(drawn.size, Image.Resampling.BILINEAR)
    difference = [abs(a - b) for a, b in zip(drawn.tobytes(), expected.tobytes(), strict=True)]
    assert sum(difference) / len(difference) < 3


def pixels(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_the_slider_changes_every_drawing(opened):
    page = opened()
    give(page)
    explain(page, "grad_cam", "saliency")
    page.emulate_media(reduced_motion="reduce")
    stacks = page.query_selector_all(".stack")
    before = [stack.screenshot() for stack in stacks]
    page.locator("#opacity").fill("10")
    assert all(stack.screenshot() != old for stack, old in zip(stacks, before, strict=True))
    assert page.text_content("output") == "10 %"
    page.locator("#opacity").fill("60")
    assert [stack.screenshot() for stack in stacks] == before


def test_an_error_is_shown_beside_its_method_and_the_others_go_on(opened):
    page = opened()
    give(page)
    open_settings(page)
    choose(page, "grad_cam", "saliency")
    page.fill("#field-layer", "nowhere")
    page.click("#explain")
    wait_for_text(page, "#status", "^Finished")
    assert page.text_content("#status") == "Finished; 1 of 2 failed."
    (failure,) = page.query_selector_all(".failure")
    assert "Grad cam" in failure.inner_text() and "layer: 'nowhere' is not allowed" in failure.inner_text()
    assert len(heat_of(page)) == 1


def test_what_is_no_image_is_told(opened):
    page = opened()
    page.set_input_files("#file", {"name": "text.jpg", "mimeType": "image/jpeg", "buffer": b"no image at all"})
    page.wait_for_selector("#prediction .error")
    assert "not an image that can be decoded" in page.text_content("#prediction .error")


def test_the_curl_command_makes_the_same_request(opened, tmp_path):
    page = opened(permissions=["clipboard-read", "clipboard-write"])
    give(page)
    open_settings(page)
    choose(page, "grad_cam")
    page.fill("#field-target", "new york, ny")
    page.fill("#field-layer", "layer3")
    page.select_option("#field-colormap", "viridis")
    explain(page, "grad_cam")
    page.click(".curl")
    wait_for_text(page, "#status", "copied")
    command = page.evaluate("navigator.clipboard.readText()")
    (tmp_path / PHOTO["name"]).write_bytes(PHOTO["buffer"])
    answer = subprocess.run(["sh", "-c", command + " -s"], cwd=tmp_path, capture_output=True, check=True).stdout
    (told,) = json.loads(answer)["explanations"]
    assert [told["heatmap"]["heatmap_png"]] == heat_of(page)
    assert told["parameters"]["layer"] == "layer3" and told["target"]["label"] == "new york, ny"
    assert "Authorization" not in command


def test_a_key_is_asked_for_and_sent(opened):
    asked = []
    page = opened(route=lambda page: with_key(page, asked), permissions=["clipboard-read", "clipboard-write"])
    assert page.is_hidden("#key")
    page.set_input_files("#file", PHOTO)
    page.wait_for_selector("#prediction .error")
    assert page.is_visible("#key") and page.get_attribute("#key", "type") == "password"
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("right")
    page.keyboard.press("Enter")
    page.wait_for_selector(".bars li")
    explain(page, "saliency")
    assert asked == [None, "Bearer right", "Bearer right"]
    page.click(".curl")
    wait_for_text(page, "#status", "copied")
    command = page.evaluate("navigator.clipboard.readText()")
    assert "Authorization: Bearer $KEY" in shlex.split(command) and "right" not in command
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_a_page_opened_with_a_key_asks_for_it(opened):
    assert opened(extra_http_headers={"Authorization": "Bearer any"}).is_visible("#key")


def test_fields_follow_the_methods(opened):
    page = opened()
    open_settings(page)
    choose(page, "grad_cam")
    assert not hidden(page, "layer") and hidden(page, "baseline") and hidden(page, "gamma") and hidden(page, "samples")
    assert not hidden(page, "score") and not hidden(page, "seed") and not hidden(page, "target")
    choose(page, "biased_layer", "integrated_gradients")
    assert not hidden(page, "gamma") and not hidden(page, "baseline") and hidden(page, "layer")
    assert page.get_attribute("#field-max_error", "placeholder") == "0.05"
    page.select_option("#field-smoothing", "vargrad")
    assert not hidden(page, "samples") and not hidden(page, "stdev")
    labels = page.eval_on_selector_all("#field-target-list option", "options => options.map(o => [o.value, o.label])")
    assert ["new york, ny", ""] in labels and ["2", "cat"] in labels and ["5", "cat"] in labels


def test_a_class_is_explained_rather_than_another(opened):
    page = opened()
    give(page)
    assert page.is_visible("#field-versus") and page.text_content("label[for=field-versus]") == "Rather than"
    offered = page.eval_on_selector_all("#field-versus-list option", "options => options.map(o => [o.value, o.label])")
    assert [value for value, _ in offered[:2]] == ["runner_up", "rest"] and ["5", "cat"] in offered
    page.fill("#field-target", "bee")
    page.fill("#field-versus", "new york, ny")
    explain(page, "integrated_gradients")
    assert page.text_content(".card h3") == "Integrated gradients: bee rather than new york, ny"
    card = page.inner_text(".card")
    assert "raised the score of “bee” over that of “new york, ny”" in card and "Rather than\nnew york, ny" in card
    page.fill("#field-versus", "bee")
    page.click("#explain")
    wait_for_text(page, ".failure .error", "is the target itself")


def test_what_the_report_names_appears_by_itself(server, opened):
    told = httpx.get(server + PATH, headers={"Accept": "application/json"}).json()
    told["methods"].append({"name": "brand_new", "description": "Made up.", "parameters": ["composite"], "defaults": {}})
    told["refused"]["too_much"] = "it has no such layer"
    common = {"description": "any of them", "default": None}
    told["parameters"]["composite"] = {"kind": "choice", "allowed": ["epsilon", "gamma_box"], "general": False, **common}
    told["parameters"]["quality"] = {"kind": "choices", "allowed": ["deletion", "insertion"], "general": True, **common}
    sent = []

    def answer(route):
        sent.append(route.request.post_data_buffer.decode("latin-1"))
        (explanation,) = (response := route.fetch(post_data=form_with("saliency"))).json()["explanations"]
        explanation |= {"method": "brand_new", "quality": {"deletion": 0.25}}
        explanation["quality_details"] = {"deletion": {"curve": [1, 0.5, 0]}}
        route.fulfill(response=response, json=response.json() | {"explanations": [explanation]})

    def form_with(method):
        return re.sub(rb"brand_new", method.encode(), sent_bytes(sent[-1]))

    def sent_bytes(text):
        content = text.encode("latin-1")
        for name in (b"composite", b"quality"):  # what this server does not know yet
            content = re.sub(
                rb'--[^\r]+\r\nContent-Disposition: form-data; name="' + name + rb'"\r\n\r\n[^\r]*\r\n', b"", content
            )
        return content

    def route(page):
        document = try_it_page(told, keyed=False).body.decode()
        page.route("**" + PATH, lambda route: (
            answer(route) if route.request.method == "POST" else route.fulfill(content_type="text/html", body=document)
        ))  # fmt: skip

    page = opened(route=route)
    assert page.is_disabled("input[value=too_much]") and "it has no such layer" in page.text_content("#about-too_much")
    give(page)
    open_settings(page)
    choose(page, "saliency")
    assert hidden(page, "composite") and not hidden(page, "quality")
    choose(page, "brand_new")
    page.select_option("#field-composite", "gamma_box")
    page.check("[data-parameter=quality] input[value=deletion]")
    page.check("[data-parameter=quality] input[value=insertion]")
    explain(page, "brand_new")
    assert 'name="composite"\r\n\r\ngamma_box' in sent[0] and 'name="quality"\r\n\r\ndeletion,insertion' in sent[0]
    card = page.inner_text(".card")
    assert "Made up." in card and "Deletion\n0.25" in card
    assert page.get_attribute(".curve polyline", "points") == "0,0 50,25 100,50"


def test_a_running_round_can_be_cancelled(opened):
    def route(page):
        page.route("**" + PATH, lambda route: None if route.request.method == "POST" else route.continue_())

    page = opened(route=route)
    give(page)
    choose(page, "saliency", "grad_cam")
    page.click("#explain")
    wait_for_text(page, "#elapsed", "^1 of 2: ")
    page.click("#cancel")
    wait_for_text(page, "#status", "^Cancelled.$")
    assert page.is_hidden("#progress") and not page.query_selector(".card")


def test_photos_are_dropped_and_pasted(opened):
    page = opened()
    for event, carrier in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(
            """([event, carrier, name, base64]) => {
                const carried = new DataTransfer();
                carried.items.add(new File([Uint8Array.from(atob(base64), c => c.charCodeAt(0))], name));
                const kind = event === "drop" ? DragEvent : ClipboardEvent;
                document.body.dispatchEvent(new kind(event, { [carrier]: carried, bubbles: true, cancelable: true }));
            }""",
            [event, carrier, f"{event}.jpg", base64.b64encode(PHOTO["buffer"]).decode()],
        )
        wait_for_text(page, "#preview-name", f"^{event}.jpg$")
        page.wait_for_selector(".bars li")


def test_the_keyboard_is_enough(opened):
    page = opened()
    tab_to(page, "#file")
    tab_to(page, "#sample")
    page.keyboard.press("Enter")
    page.wait_for_selector(".bars li")
    tab_to(page, ".bars li ~ li button")
    page.keyboard.press("Enter")
    other = page.evaluate("document.activeElement.value")
    assert page.input_value("#field-target") == other
    tab_to(page, "input[value=integrated_gradients]")
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    tab_to(page, "#explain")
    page.keyboard.press("Enter")
    wait_for_text(page, "#status", "^Finished")
    (card,) = page.query_selector_all(".card h3")
    assert other in card.inner_text()
    tab_to(page, "#opacity")
    page.keyboard.press("ArrowRight")
    assert page.text_content("output") == "61 %"
    tab_to(page, ".picture")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename.endswith(".png")


def test_every_control_has_a_name(opened):
    page = opened()
    open_settings(page)
    unnamed = page.eval_on_selector_all(
        "main input, main select",
        "all => all.filter(e => !e.labels.length && !e.getAttribute('aria-labelledby')).map(e => e.id)",
    )
    assert unnamed == []


def test_a_narrow_screen_does_not_scroll_sideways(opened):
    page = opened(viewport={"width": 360, "height": 740})
    give(page)
    open_settings(page)
    explain(page, "grad_cam", "integrated_gradients")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(opened, scheme):
    page = opened(color_scheme=scheme)
    paper = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (paper > 0.5) == (scheme == "light")
    for selector in ("body", "small", ".quiet", "button.main"):
        ink, own = page.eval_on_selector(selector, "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]")
        under = paper if own.startswith("rgba(0, 0, 0, 0") else luminance(own)
        darker, lighter = sorted((luminance(ink), under))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, selector


def test_the_address_behind_a_proxy_and_with_a_version_is_kept(server, opened):
    seen = []

    def route(page):
        def pass_on(route):
            seen.append((route.request.method, route.request.url.removeprefix(server)))
            route.continue_(url=route.request.url.replace("/behind/a/proxy", ""))

        page.route("**/behind/a/proxy/**", pass_on)

    page = opened(route=route)
    page.goto(f"/behind/a/proxy{PATH}/1.0")
    give(page)
    explain(page, "saliency")
    assert seen == [
        ("GET", "/behind/a/proxy/explanations/small/1.0"),
        ("POST", "/behind/a/proxy/predictions/small/1.0"),
        ("POST", "/behind/a/proxy/explanations/small/1.0"),
    ]


def test_without_script_the_plain_form_works(opened):
    page = opened(java_script_enabled=False)
    assert page.is_hidden("main")
    page.set_input_files("#plain-data", PHOTO)
    page.select_option("#plain-method", "grad_cam")
    page.click("noscript button")
    page.wait_for_selector("h2")
    assert "grad_cam" in page.text_content("h2")
