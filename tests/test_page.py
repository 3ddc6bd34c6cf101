"""The page as a person meets it, in a real browser against a live server."""

import base64
import io
import json
import re
import shlex
import subprocess

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import (
    PATH,
    PHOTO,
    choose,
    chromium,
    explain,
    finished,
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
from PIL import Image, ImageChops, ImageStat

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
    paths, cam = (card.text_content() for card in page.query_selector_all(".card"))
    assert "depends on that place" in cam and "adds up" not in cam
    assert "Red raised" in paths and "adds up" in paths and "passes" in paths
    assert "The gradient averaged on the straight path" in paths
    for card in page.query_selector_all(".card"):
        ends = [float(card.query_selector(end).inner_text()) for end in (".from", ".to")]
        assert ends[0] < ends[1]
        assert "gradient" in card.query_selector(".colours").evaluate("bar => getComputedStyle(bar).backgroundImage")
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
    stacks = page.query_selector_all(".card .stack")
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
    assert "Grad CAM" in failure.inner_text() and "layer: 'nowhere' is not allowed" in failure.inner_text()
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
    assert asked == [None, *3 * ["Bearer right"]]
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
    page.click(".card summary")
    card = page.inner_text(".card")
    assert "raised the score of “bee” over that of “new york, ny”" in card and "Rather than\nnew york, ny" in card
    page.fill("#field-versus", "bee")
    page.click("#explain")
    wait_for_text(page, ".failure .error", "is the target itself")


def test_what_the_report_names_appears_by_itself(server, opened):
    told = httpx.get(server + PATH, headers={"Accept": "application/json"}).json()
    told["methods"].append({"name": "brand_new", "family": "where", "first": False, "description": "Made up.",
                            "parameters": ["composite"], "defaults": {}})  # fmt: skip
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
    assert 'name="composite"\r\n\r\ngamma_box' in sent[-1] and 'name="quality"\r\n\r\ndeletion,insertion' in sent[-1]
    page.click(".card summary")
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
    finished(page)
    assert other in page.text_content(".card h3")
    tab_to(page, "input[value=integrated_gradients]")
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    tab_to(page, "#explain")
    page.keyboard.press("Enter")
    finished(page)
    (card,) = page.query_selector_all(".card h3")
    assert other in card.inner_text()
    tab_to(page, "#opacity")
    page.keyboard.press("ArrowRight")
    assert page.text_content("output") == "61 %"
    tab_to(page, ".picture")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename.endswith(".png")


def test_a_narrow_screen_does_not_scroll_sideways(opened):
    page = opened(viewport={"width": 360, "height": 740})
    give(page)
    open_settings(page)
    explain(page, "grad_cam", "integrated_gradients")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(390, 844), (1440, 900)], ids=["phone", "desk"])
def test_axe_finds_no_fault(opened, scheme, size):
    page = opened(color_scheme=scheme, reduced_motion="reduce", viewport=dict(zip(("width", "height"), size, strict=True)))
    paper = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (paper > 0.5) == (scheme == "light")
    assert faults(page) == []
    page.eval_on_selector_all("details", "all => all.forEach(fold => fold.open = true)")
    give(page)
    choose(page, "grad_cam")
    page.fill("#field-layer", "nowhere")
    explain(page, "grad_cam", "integrated_gradients", "saliency")
    assert page.query_selector(".failure") and page.is_visible("#compare")
    page.eval_on_selector_all("details", "all => all.forEach(fold => fold.open = true)")
    assert faults(page) == []


def faults(page):
    """What axe-core says of contrast, names, roles and structure."""
    return [(one["id"], [node["html"] for node in one["nodes"]]) for one in Axe().run(page).response["violations"]]


def test_three_methods_stand_in_sight_and_the_others_fold_by_family(server, opened):
    page = opened()
    in_sight = [box.get_attribute("value") for box in page.query_selector_all("input[name=method]") if box.is_visible()]
    assert in_sight == ["integrated_gradients", "grad_cam", "occlusion"]
    folds = [fold.text_content() for fold in page.query_selector_all("#methods summary") if fold.is_visible()]
    assert [fold.rstrip("0123456789 ") for fold in folds] == [
        "Where",
        "Which pixels",
        "Which parts",
        "Without gradients",
        "Not for this model",
    ]
    told = httpx.get(server + PATH, headers={"Accept": "application/json"}).json()
    listed = page.eval_on_selector_all("input[name=method]", "all => all.map(one => one.value)")
    assert sorted(listed) == sorted([*(method["name"] for method in told["methods"]), *told["refused"]])


@pytest.mark.parametrize("size", [(390, 844), (1440, 900)], ids=["phone", "desk"])
def test_the_first_explanation_comes_unasked_and_the_button_stays_in_reach(opened, size):
    width, height = size
    page = opened(viewport={"width": width, "height": height})
    give(page)
    finished(page)
    assert page.text_content(".card h3").startswith("Integrated gradients: ")
    for _ in range(2):
        box = page.locator("#explain").bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= height
        page.keyboard.press("End")


def test_a_path_tells_how_it_was_refined_and_how_far_to_trust_it(opened):
    page = opened()
    open_settings(page)
    page.fill("#field-max_error", "0.001")
    give(page)
    finished(page)
    assert re.fullmatch(r"[✓!] Completeness error [\d.]+ %", page.text_content(".badges li"))
    page.click(".card summary")
    caption = page.text_content(".curve figcaption")
    first, last = re.findall(r"([\d.]+) % after (\d+)", caption)
    assert first[1] == "9" and float(last[0]) <= float(first[0]) and last[0] in page.text_content(".badges li")
    assert len(page.get_attribute(".curve polyline", "points").split()) == 1 + (int(last[1]) - 9) / 8
    assert page.text_content(".card .unit") == "logit"


def test_two_maps_lie_over_each_other(opened):
    page = opened()
    give(page)
    finished(page)
    assert page.is_hidden("#compare")
    explain(page, "integrated_gradients", "grad_cam", "saliency")
    split = page.locator("#split")
    alts = page.eval_on_selector_all(".split .heat", "all => all.map(one => one.alt)")
    assert ["integrated gradients" in alts[0], "grad cam" in alts[1]] == [True, True]
    split.focus()
    for _ in range(50):
        page.keyboard.press("ArrowRight")
    assert split.input_value() == "100"
    left = page.locator(".split").screenshot()
    page.select_option("#right", label=page.text_content("#right option:last-child"))
    split.focus()
    assert apart(page.locator(".split").screenshot(), left) < 1
    box = split.bounding_box()
    page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
    assert split.input_value() == "0" and apart(page.locator(".split").screenshot(), left) > 5


def apart(one, other):
    """The mean difference of two pictures, in levels of 255."""
    return ImageStat.Stat(ImageChops.difference(pixels(one), pixels(other)).convert("L")).mean[0]


def test_a_link_holds_the_settings_and_nothing_else(opened):
    page = opened(permissions=["clipboard-read", "clipboard-write"])
    give(page)
    open_settings(page)
    choose(page, "grad_cam", "lime")
    page.fill("#field-target", "new york, ny")
    page.fill("#field-samples", "20")
    page.check("[data-parameter=quality] input[value=deletion]")
    page.click("#share")
    wait_for_text(page, "#status", "copied")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url and len(link) < 200
    other = opened()
    other.goto(link + "&made_up=1&method_=x")
    other.reload()
    assert other.eval_on_selector_all("input[name=method]:checked", "all => all.map(one => one.value)") == ["grad_cam", "lime"]
    assert other.is_visible("input[value=lime]")
    assert [other.input_value(f"#field-{name}") for name in ("target", "samples")] == ["new york, ny", "20"]
    assert other.is_checked("[data-parameter=quality] input[value=deletion]")


def test_what_was_answered_is_not_asked_again(opened):
    asked = []
    page = opened(route=lambda page: page.on("request", lambda request: asked.append(request.method)))
    give(page)
    finished(page)
    explain(page, "integrated_gradients", "grad_cam")
    assert asked.count("POST") == 3 and len(page.query_selector_all(".card")) == 2
    give(page, PHOTO | {"name": "another.jpg"})
    wait_for_text(page, "#preview-name", "^another.jpg$")
    finished(page)
    assert asked.count("POST") == 6


def test_a_value_that_is_not_allowed_is_shown_where_it_is_folded(opened):
    page = opened()
    give(page)
    finished(page)
    open_settings(page)
    page.fill("#field-max_error", "7")
    open_settings(page)
    page.click("#explain")
    assert page.is_visible("#field-max_error") and page.evaluate("document.activeElement.id") == "field-max_error"


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
    finished(page)
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
