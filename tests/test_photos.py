"""Real photos, where a folder of them lies beside the checkout: the classifier is right, and its paths err little."""

import io
import json

import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from torchvision import transforms

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Case
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.settings import read_settings

PHOTOS = ROOT.parent / "shared" / "data" / "photos"
pytestmark = pytest.mark.skipif(not PHOTOS.exists(), reason="there is no folder of photos beside the checkout")


@pytest.fixture(scope="module")
def served(lite0):
    settings = read_settings(yaml.safe_load((ROOT / "classifiers/imagenet/model-config.yaml").read_text()))
    preprocessing = settings.preprocessing
    return Engine(Classifier(lite0, preprocessing.normalization, preprocessing.size), 16), preprocessing


def photos():
    labels = json.loads((PHOTOS / "labels.json").read_text())
    return {name: ((PHOTOS / name).read_bytes(), label["class_index"]) for name, label in labels.items()}


def test_every_prediction_is_the_models_own_and_nine_in_ten_are_right(served, lite0):
    engine, preprocessing = served
    by_hand = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.498] * 3, [0.502] * 3),
        ]
    )
    right = 0
    for name, (data, index) in photos().items():
        logits = engine.logits([read_picture(data, preprocessing, 10**8).input])[0]
        with torch.no_grad():
            expected = lite0(by_hand(Image.open(io.BytesIO(data)).convert("RGB"))[None])[0]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3, msg=name)
        right += int(logits.argmax()) == index
    assert right >= 36


@pytest.mark.live
def test_bisected_paths_reach_their_error_with_few_rows(served):
    """Uniform Gauss-Legendre steps leave a completeness error of 7 % with 50 rows, in the median of such photos."""
    engine, preprocessing = served
    for name, (data, _) in list(photos().items())[::5]:
        image = read_picture(data, preprocessing, 10**8).input
        logits = engine.logits([image])[0]
        case = Case(engine.classifier, image, int(logits.argmax()), known_score=float(logits.max()))
        (explained,) = engine.run([Job(IntegratedGradients(max_error=0.05), case)])
        assert explained.value.completeness_error <= 0.05 and explained.evaluations <= 73, name
