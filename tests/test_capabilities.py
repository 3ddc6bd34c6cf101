"""What the page is built from: the archive's report of what it can be asked, and the document that holds it."""

import base64
import hashlib
import html
import json
import re

import torch
from conftest import NORMALIZATION, SIZE, small_cnn

from torchserve_explain import __version__
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.methods import METHODS
from torchserve_explain.attribution.quality import QUALITIES
from torchserve_explain.serving.page import sample, try_it_page
from torchserve_explain.serving.parameters import OUTPUTS, PARAMETERS, Labels
from torchserve_explain.serving.planning import Planner
from torchserve_explain.serving.settings import Explanations


def report(defaults=None, classifier=None):
    classifier = classifier or Classifier(small_cnn(), NORMALIZATION, SIZE)
    labels = Labels([f"class {index}" for index in range(classifier.classes)])
    return Planner(classifier, labels, Explanations(defaults=defaults or {})).report({"name": "small", "version": "1.0"})


# The report


def test_the_report_tells_the_arithmetic():
    assert report()["arithmetic"] == "float32"
    narrow = Classifier(small_cnn().float(), NORMALIZATION, SIZE, narrow=torch.bfloat16)
    assert report(classifier=narrow)["arithmetic"] == "bfloat16"


def test_the_report_and_the_page_tell_the_version_of_the_code():
    assert report()["served_by"] == f"torchserve-explain {__version__}"
    assert f'<footer><p class="quiet">torchserve-explain {__version__}</p></footer>' in page_text()


def test_the_report_tells_every_method_with_what_it_takes():
    told = {method["name"]: method for method in report()["methods"]}
    assert list(told) == [name for name in METHODS if name not in report()["refused"]]
    assert told["integrated_gradients"]["parameters"] == ["baseline", "max_error", "steps", "rule", "max_map_error"]
    assert told["integrated_gradients"]["defaults"] == {"baseline": "black", "max_error": 0.05, "rule": "riemann"}
    assert told["saliency"]["parameters"] == ["backward"] and told["occlusion"]["parameters"] == ["baseline"]
    assert [name for name, method in told.items() if method["first"]] == ["integrated_gradients", "grad_cam", "occlusion"]
    assert {method["family"] for method in told.values()} == set(report()["families"]) and told["xrai"][
        "family"
    ] == "which parts"
    for name, method in told.items():
        assert method["description"].endswith(".") and "\n" not in method["description"]
        assert " ".join((METHODS[name].__doc__ or "").split()).startswith(method["description"])


def test_the_report_tells_every_parameter_with_what_is_allowed():
    told = report()["parameters"]
    assert list(told) == list(PARAMETERS)
    assert all(told[name]["description"] == field.description for name, field in PARAMETERS.items())
    assert told["baseline"]["kind"] == "choice" and told["baseline"]["allowed"] == ["black", "white", "mean", "blur", "noise"]
    assert told["colormap"]["allowed"] == list(report()["colormaps"])
    assert told["output"]["allowed"] == list(OUTPUTS)
    kinds = {"max_error": "number", "seed": "whole", "values": "flag", "target": "text", "layer": "text"}
    assert {name: told[name]["kind"] for name in kinds} == kinds
    assert told["max_error"].items() >= {"minimum": 0, "exclusive_minimum": True, "maximum": 1}.items()
    general = {name for name, parameter in told.items() if parameter["general"]}
    assert {"target", "score", "seed", "smoothing", "colormap", "overlay", "clip"} <= general
    assert not {"baseline", "layer", "gamma", "samples", "stdev"} & general
    assert [name for name, parameter in told.items() if parameter.get("with") == "smoothing"] == ["samples", "stdev"]


def test_a_list_of_known_names_is_told_as_choices():
    assert report()["parameters"]["quality"].items() >= {"kind": "choices", "allowed": list(QUALITIES), "default": []}.items()
    assert all("is better" in meaning for meaning in report()["qualities"].values())


def test_the_report_holds_the_archives_defaults_layers_labels_and_colours():
    told = report({"method": "grad_cam", "clip": 90})
    assert told["parameters"]["method"]["default"] == ["grad_cam"] and told["parameters"]["clip"]["default"] == 90
    assert told["layers"] == ["stem", "depthwise", "relu", "reduce"]
    assert told["labels"] == [f"class {index}" for index in range(5)]
    assert told["colormaps"]["gray"][0] == "#000000" and told["colormaps"]["gray"][-1] == "#ffffff"
    assert all(
        len(stops) == 16 and all(re.fullmatch("#[0-9a-f]{6}", stop) for stop in stops) for stops in told["colormaps"].values()
    )
    json.dumps(told, allow_nan=False)


# The document


def page_text(told=None, keyed=False):
    return try_it_page(told or report(), keyed).body.decode()


def test_the_policy_allows_the_very_script_and_the_very_style():
    text = page_text()
    policy = html.unescape(re.findall(r'Content-Security-Policy" content="([^"]*)"', text)[0])
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    for element, directive in (("style", "style-src"), ('script type="module"', "script-src")):
        content = re.findall(f"<{element}>(.*?)</{element.split()[0]}>", text, re.DOTALL)[0]
        assert directives[directive] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    assert directives["default-src"] == "'none'" and directives["connect-src"] == "'self'"
    assert directives["img-src"] == "data: blob:" and directives["form-action"] == "'self'"
    assert "unsafe" not in policy


def test_the_page_is_self_contained():
    text = page_text()
    assert not re.search(r"https?://|//[a-z]+\.[a-z]", re.sub(r"base64,[\w+/=]+", "", text))
    assert not re.search(r"\son\w+=|\sstyle=", text)
    assert len(text) < 120_000 and 1000 < len(base64.b64decode(sample())) < 30_000


def test_a_label_cannot_leave_its_place():
    told = report() | {"labels": ["</script><script>alert(1)</script>", "<!--"]}
    text = page_text(told)
    assert text.count("<script") == page_text().count("<script") and "<!--" not in text
    inside = re.findall(r'<script id="report" type="application/json">(.*?)</script>', text, re.DOTALL)[0]
    assert json.loads(inside)["labels"] == told["labels"]
