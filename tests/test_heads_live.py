"""Every head from archive to page: two classes of one logit, many labels, a quantity, each served and opened."""

import base64

import httpx
import pytest
from browser import CHROMIUM, FLAGS, PHOTO
from live import CONTINUOUS, picture, served
from test_heads import archived

pytestmark = pytest.mark.live
IMAGE = picture()
MADE = {
    "binary": (1, CONTINUOUS, ("no", "yes")),
    "many": (6, CONTINUOUS + "classifier: {head: sigmoid}\n", ("ant", "bee", "cat", "dog", "emu", "fox")),
    "price": (1, CONTINUOUS + "classifier: {head: none}\n", ("euros",)),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    for name, (outputs, config, labels) in MADE.items():
        archived(tmp_path_factory.mktemp(name), outputs, config, labels, name, store)
    with served(list(MADE), store, tmp_path_factory.mktemp("run")) as running:
        yield running.inference


def asked(server, name, api="explanations", **fields):
    answer = httpx.post(f"{server}/{api}/{name}", files={"data": IMAGE}, data=fields, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer


def predicted(server, name, **fields):
    return asked(server, name, "predictions", **fields).json()


def test_two_classes_of_one_logit(server):
    told = predicted(server, "binary")
    assert told.keys() == {"no", "yes"} and sum(told.values()) == pytest.approx(1)
    no, yes = asked(server, "binary", target="no,yes", method="integrated_gradients", steps="8").json()["explanations"]
    assert no["target"]["score"] == pytest.approx(-yes["target"]["score"])
    assert no["target"]["probability"] == pytest.approx(told["no"], rel=1e-4) and yes["completeness_error"] < 1


def test_many_labels_each_by_itself(server):
    told = predicted(server, "many", top_k=6)
    bound = sorted(told.values())[2]
    assert predicted(server, "many", threshold=bound) == pytest.approx({k: v for k, v in told.items() if v > bound}, rel=1e-4)
    (one,) = asked(server, "many", target="dog", score="probability", method="saliency").json()["explanations"]
    assert one["target"]["score"] == pytest.approx(told["dog"], rel=1e-4)
    refused = httpx.post(f"{server}/predictions/many", files={"data": IMAGE}, data={"threshold": "2"}, timeout=60)
    assert refused.status_code == 400 and "a number from 0 to 1" in refused.json()["message"]


def test_a_quantity(server):
    told = predicted(server, "price")
    answer = asked(server, "price", method="integrated_gradients,grad_cam", steps="8").json()
    assert answer["predicted"]["probability"] is None and answer["predicted"]["value"] == pytest.approx(told["euros"], rel=1e-4)
    assert [one["target"]["score"] for one in answer["explanations"]] == pytest.approx([told["euros"]] * 2, rel=1e-4)


def test_heads_of_all_sorts_answer_kserve_too(server):
    for name in MADE:
        body = {"instances": [{"data": base64.b64encode(IMAGE).decode()}]}
        (one,) = httpx.post(f"{server}/v1/models/{name}:predict", json=body, timeout=60).json()["predictions"]
        assert one == pytest.approx(predicted(server, name), rel=1e-4)


@pytest.mark.parametrize(("name", "says", "explained"), [
    ("binary", "It looks like ", "%; score"), ("many", "It looks like ", "%; score"), ("price", "It answers euros", "euros, "),
])  # fmt: skip
def test_the_page_shows_it(server, name, says, explained):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine (Debian's package is 'chromium')")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page, complaints = browser.new_page(), []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"{server}/explanations/{name}")
        page.set_input_files("#file", PHOTO)
        page.wait_for_selector(".bars li")
        page.eval_on_selector_all("#methods details", "all => all.forEach(fold => fold.open = true)")
        page.uncheck("input[value=integrated_gradients]")
        page.check("input[value=saliency]")
        page.click("#explain")
        page.click(".card summary")
        assert page.inner_text("#prediction").startswith(says) and explained in page.inner_text(".card")
        assert complaints == []
        browser.close()
    assert "rather than" not in asked(server, name, output="html", method="grad_cam").text
