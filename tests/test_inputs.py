"""Inputs of any kind: grey, coloured, with alpha, and what a preprocess.py of one's own makes of a picture."""

import base64
import io
import json
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from live import picture, served
from PIL import Image
from safetensors.torch import save_file
from test_service import answers
from test_service import explain as asked
from torch import nn

from torchserve_explain.archive import Archive
from torchserve_explain.archiver import build_archive, parser
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.errors import ArchiveError, RequestError
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.pictures import png
from torchserve_explain.serving.service import Service
from torchserve_explain.serving.settings import ClassifierSettings, Preprocessing, Settings

SIDE = 32


def preprocessing(channels, **options):
    return Preprocessing(resize=SIDE, crop=SIDE, mean=(0.5,) * channels, std=(0.25,) * channels, **options)


def network(channels):
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_method_explains_images_of_so_many_channels(channels):
    settings = Settings(classifier=ClassifierSettings(architecture="model.py"), preprocessing=preprocessing(channels))
    classifier = Classifier(network(channels), settings.preprocessing.normalization, settings.preprocessing.size)
    service = Service(classifier, [], settings, {"name": "small", "version": "1"}, "0" * 64)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    image = Image.open(io.BytesIO(picture(0, (60, 40)))).convert(mode)
    fields = {
        "data": png(image),
        "method": b"all",
        "samples": b"20",
        "quality": b"deletion,road,infidelity",
        "region": b"image",
    }
    (answer,) = answers(service, asked(fields))
    told = json.loads(answer.body)
    assert answer.status == 200, told
    assert len(told["explanations"]) >= 19 and all(one["heatmap"]["width"] == SIDE for one in told["explanations"])
    assert all(None not in one["quality"].values() for one in told["explanations"])


def test_four_channels_are_colours_and_alpha_as_the_file_has_them():
    """Colours under alpha zero are the model's to see: neither put on white nor lost when they are resized."""
    colours = np.zeros((64, 64, 4), dtype=np.uint8)
    colours[..., :3], colours[:, :32, 3] = (200, 100, 50), 255
    read = read_picture(png(Image.fromarray(colours)), preprocessing(4), 10**6)
    pixels = read.input * 0.25 + 0.5
    assert pixels.shape == (4, SIDE, SIDE)
    expected = torch.tensor([200.0, 100, 50])[:, None, None] / 255
    torch.testing.assert_close(pixels[:3], expected.expand(3, SIDE, SIDE), atol=1e-6, rtol=0)
    assert pixels[3, :, :14].min() == 1 and pixels[3, :, 18:].max() == 0
    opaque = read_picture(picture(0, (64, 64)), preprocessing(4), 10**6)
    assert (opaque.input[3] * 0.25 + 0.5 == 1).all() and opaque.seen.mode == "RGBA"


@pytest.mark.parametrize("channels", [2, 5])
def test_other_numbers_of_channels_are_code_of_ones_own(channels):
    with pytest.raises(ValueError, match="four with an alpha channel"):
        preprocessing(channels)
    assert preprocessing(channels, code="preprocess.py").normalization.mean == (0.5,) * channels


MODEL = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(CHANNELS, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
"""
# The whole picture letterboxed, as edges and brightness: two channels, black above and below or at the sides.
LETTERBOX = """
import torch
from torchvision.transforms.functional import center_crop, to_tensor

def preprocess(image):
    side = max(image.size)
    grey = image.convert("L").resize((32 * image.width // side, 32 * image.height // side))
    pixels = center_crop(to_tensor(grey), [32, 32])
    across, down = (side - image.width) / 2, (side - image.height) / 2
    box = (-across, -down, image.width + across, image.height + down)
    return torch.cat([pixels, pixels.diff(dim=2, append=pixels[..., -1:]).abs()]), box
"""


@pytest.fixture
def archive(tmp_path):
    """Archive a network of two channels with a preprocess.py; return its path."""

    def build(code, size=(32, 32), option=True):
        folder = tmp_path / "parts"
        folder.mkdir()
        model = MODEL.replace("CHANNELS", "2")
        (folder / "model.py").write_text(model)
        (folder / "preprocess.py").write_text(code)
        prepared = {"crop": list(size), "mean": [0, 0], "std": [1, 1], "code": "preprocess.py"}
        (folder / "config.yaml").write_text(yaml.safe_dump({"preprocessing": prepared}))
        namespace: dict[str, Any] = {"__name__": "model"}
        exec(model, namespace)
        torch.manual_seed(0)
        save_file(namespace["Net"]().state_dict(), folder / "w.safetensors")
        options = ["--model", "model.py", "--weights", "w.safetensors", "--config", "config.yaml"]
        options += ["--preprocess", "preprocess.py"] if option else []
        (folder / "references").mkdir()
        for number in range(2):
            (folder / "references" / f"{number}.jpg").write_bytes(picture(number + 1))
        options += ["--references", "references"]
        paths = [one if one.startswith("--") else str(folder / one) for one in options]
        return build_archive("own", parser().parse_args(["own", *paths, "--store", str(tmp_path / "store")]))

    return build


def test_a_preprocessing_of_ones_own_is_served_and_its_maps_lie_where_it_looked(archive):
    loaded = Archive.load(archive(LETTERBOX))
    service = Service(loaded.classifier, loaded.labels, loaded.settings, {"name": "own", "version": "1"}, loaded.digest)
    data, namespace = picture(0, (320, 160)), {}
    exec(LETTERBOX, namespace)
    pixels, box = namespace["preprocess"](Image.open(io.BytesIO(data)))
    assert box == (0, -80, 320, 240)
    read = read_picture(data, loaded.settings.preprocessing, 10**6)
    torch.testing.assert_close(read.input, pixels)
    assert read.crop == (0, 0, 320, 160) and read.seen.size == (32, 32) and read.seen.getpixel((5, 2)) == (0, 0, 0)
    fields = {"data": data, "method": b"all", "samples": b"10", "region": b"image", "target": b"1"}
    (answer,) = answers(service, asked(fields))
    told = json.loads(answer.body)
    assert answer.status == 200, told
    expected = float(loaded.classifier.logits(pixels[None])[0, 1])
    assert all(one["target"]["score"] == pytest.approx(expected) for one in told["explanations"])
    assert len(told["explanations"]) >= 19


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def prepare(image):\n    return image\n", "must define preprocess"),
        ("import torch\ndef preprocess(image):\n    return torch.zeros(3, 32, 32), None\n", r"makes \[3, 32.*\[2, 32"),
        ("def preprocess(image):\n    return image, None\n", "makes Image of this image; allowed: a tensor"),
        ("def preprocess(image):\n    return image\n", "preprocess.py cannot take this image"),
        ("def preprocess(image):\n    raise KeyError('spectrum')\n", "cannot take this image: KeyError: .*spectrum"),
        ("import torch\ndef preprocess(image):\n    return torch.zeros(2, 32, 32), (400, 0, 500, 9)\n", "a part of it"),
    ],
    ids=["name", "channels", "no tensor", "no part", "raises", "outside"],
)
def test_code_that_does_not_fit_is_refused_when_it_is_archived(archive, code, reason):
    with pytest.raises(ArchiveError, match=reason):
        archive(code)


def test_code_that_is_named_and_missing_is_refused(archive):
    with pytest.raises(ArchiveError, match=r"preprocess\.py does not exist"):
        archive(LETTERBOX, option=False)


def test_settings_that_did_not_load_the_code_cannot_prepare():
    with pytest.raises(RuntimeError, match="has not been loaded"):
        read_picture(picture(), preprocessing(2, code="preprocess.py"), 10**6)


def test_a_picture_that_the_code_cannot_take_is_a_400_of_its_own():
    def refusing(image):
        raise ValueError(f"{image.width} pixels are too few")

    with pytest.raises(RequestError, match="too few") as refused:
        read_picture(picture(0, (20, 20)), preprocessing(3, code="preprocess.py").prepared_by(refusing), 10**6)
    assert refused.value.status == 400


def test_a_panorama_that_the_code_pads_takes_no_memory_for_what_is_not_there():
    namespace = {}
    exec(LETTERBOX, namespace)
    own = preprocessing(2, code="preprocess.py").prepared_by(namespace["preprocess"])
    seen = read_picture(picture(0, (20_000, 640)), own, 10**8).seen
    assert seen.size == (32, 32) and seen.getpixel((5, 2)) == (0, 0, 0)


def test_a_picture_that_the_code_changes_stays_as_it_was():
    def thumbnail(image):
        image.thumbnail((32, 32))
        return torch.zeros(2, 32, 32), None

    read = read_picture(picture(0, (320, 160)), preprocessing(2, code="preprocess.py").prepared_by(thumbnail), 10**6)
    assert (read.width, read.height) == (320, 160) and read.crop == (0, 0, 320, 160)


@pytest.mark.live
def test_a_live_server_reads_as_the_archive_says_and_compares_with_its_references(archive, tmp_path):
    path = archive(LETTERBOX)
    loaded, data = Archive.load(path), picture(0, (320, 160))
    read = read_picture(data, loaded.settings.preprocessing, 10**6).input
    fields = {"method": "integrated_gradients,occlusion", "baseline": "references", "region": "image", "values": "true"}
    (tmp_path / "run").mkdir()
    with served(["own"], path.parent, tmp_path / "run") as server:
        answer = httpx.post(f"{server.inference}/explanations/own", files={"data": data}, data=fields, timeout=120)
        told = answer.json()
        assert answer.status_code == 200, told
        references = loaded.classifier.references
        assert references is not None
        logits = loaded.classifier.logits(torch.cat([read[None], references.inputs]))
        top = told["predicted"]["index"]
        path, hidden = told["explanations"]
        assert path["target"]["score"] == pytest.approx(float(logits[0, top]), rel=1e-4)
        assert path["baseline_score"] == pytest.approx(float(logits[1:, top].mean()), rel=1e-4)
        assert hidden["parameters"]["baseline"] == "references"
        overlay = Image.open(io.BytesIO(base64.b64decode(path["heatmap"]["overlay_png"])))
        assert told["image"]["crop"] == [0, 0, 320, 160] and overlay.width == 2 * overlay.height
        crop = httpx.post(
            f"{server.inference}/explanations/own", files={"data": data}, data=fields | {"output": "npy"}, timeout=120
        )
        values = np.load(io.BytesIO(crop.content))
        assert values.shape == (2, SIDE, SIDE)
        assert values[0].sum() == pytest.approx(path["target"]["score"] - path["baseline_score"], rel=0.1)
