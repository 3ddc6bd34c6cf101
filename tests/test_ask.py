"""The command that asks: its numbers, its picture, and what it draws in a terminal."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from live import CONTINUOUS, build_small, picture, served
from PIL import Image, ImageShow
from test_client import explained

from torchserve_explain import cli
from torchserve_explain.ask import sentence
from torchserve_explain.client import Client
from torchserve_explain.terminal import half_blocks, printable

CELL = re.compile(r"\x1b\[38;2;(\d+);(\d+);(\d+)m\x1b\[48;2;(\d+);(\d+);(\d+)m▀")


def pixels(text):
    """Return the pixels that half blocks stand for."""
    rows = []
    for line in text.splitlines():
        cells = np.array(CELL.findall(line), dtype=np.uint8)
        assert line.endswith("\x1b[0m") and CELL.sub("", line) == "\x1b[0m"
        rows += [cells[:, :3], cells[:, 3:]]
    return np.stack(rows)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    build_small(tmp_path_factory.mktemp("small"), store, CONTINUOUS)
    with served(["small"], store, tmp_path_factory.mktemp("run"), TS_DISABLE_TOKEN_AUTHORIZATION="false") as running:
        yield running


@pytest.fixture
def asked(server, tmp_path, monkeypatch):
    """The command line of a question, without its options."""
    key = server.authorization()["Authorization"].removeprefix("Bearer ")
    monkeypatch.setenv("TORCHSERVE_EXPLAIN_KEY", key)
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(picture())
    return ["ask", str(photo), "--url", server.inference, "--model", "small"]


@pytest.mark.live
def test_it_prints_the_prediction_and_the_numbers(asked, server, capsys):
    with Client(server.inference, os.environ["TORCHSERVE_EXPLAIN_KEY"], model="small") as client:
        prediction = client.predict(picture())
        (one,) = client.explain(picture(), method="grad_cam", target="bee", layer="layer3").explanations
    options = ["--method", "grad_cam", "--target", "bee", "-F", "layer=layer3"]
    assert cli.main([*asked, *options]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == ", ".join(f"{label} {probability:.1%}" for label, probability in prediction.root.items())
    assert second.startswith(
        f"grad_cam at layer3 of bee {one.target.probability:.1%}: score {one.target.score:.4g}, evaluations 1"
    )
    assert cli.main([*asked, "--target", "bee", "-F", "method=saliency"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("saliency of bee")


@pytest.mark.live
def test_it_saves_the_picture_of_one_map_and_a_sheet_of_several(asked, tmp_path):
    assert cli.main([*asked, "--method", "grad_cam", "--out", str(tmp_path / "one.png")]) == 0
    assert cli.main([*asked, "--method", "grad_cam,saliency", "--out", str(tmp_path / "two.png")]) == 0
    assert Image.open(tmp_path / "one.png").size == (224, 224)
    assert Image.open(tmp_path / "two.png").width > 2 * 224


@pytest.mark.live
def test_it_draws_in_a_terminal(asked, tmp_path):
    master, slave = os.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT / "handlers"), "COLUMNS": "60", "LINES": "20"}
    command = [sys.executable, "-m", "torchserve_explain", *asked, "--method", "grad_cam,saliency", "--show"]
    process = subprocess.Popen(command, stdout=slave, env=environment, cwd=tmp_path)
    os.close(slave)
    shown = b""
    try:
        while part := os.read(master, 65536):
            shown += part
    except OSError:  # the terminal has ended
        pass
    os.close(master)
    assert process.wait() == 0
    lines = shown.decode().splitlines()
    assert len(lines) == 1 + 2 * (1 + 18)
    assert lines[1].startswith("grad_cam") and lines[20].startswith("saliency")
    first, second = pixels("\n".join(lines[2:20])), pixels("\n".join(lines[21:39]))
    assert first.shape == second.shape == (36, 36, 3) and (first != second).any()


@pytest.mark.live
def test_without_a_terminal_it_opens_the_picture_or_says_why_not(asked, monkeypatch, capsys):
    shown = []

    def show(image, title):
        shown.append(image.size)
        return True

    monkeypatch.setattr(ImageShow, "show", show)
    assert cli.main([*asked, "--method", "grad_cam", "--show"]) == 0 and shown == [(224, 224)]
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setattr(ImageShow, "show", lambda image, title: False)
    assert cli.main([*asked, "--method", "grad_cam", "--show"]) == 1
    assert "--out FILE" in capsys.readouterr().err


@pytest.mark.live
def test_what_is_refused_is_told(asked, capsys, monkeypatch):
    assert cli.main([*asked, "--method", "gradcam"]) == 1 and "ask: method: 'gradcam' is unknown" in capsys.readouterr().err
    assert cli.main([*asked, "--method", "grad_cam", "--out", "picture.none"]) == 1 and ".none" in capsys.readouterr().err
    monkeypatch.delenv("TORCHSERVE_EXPLAIN_KEY")
    assert cli.main(asked) == 1 and "Token" in capsys.readouterr().err
    assert cli.main(["ask", "nowhere.jpg"]) == 1 and "nowhere.jpg" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*asked, "-F", "layer"])
    assert "NAME=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(5, 4), (4, 3), (1, 1)])
def test_half_blocks_are_the_pictures_pixels(size):
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    text = half_blocks(Image.fromarray(drawn), size[0], -(-size[1] // 2))
    found = pixels(text)
    assert found.shape[0] == size[1] + size[1] % 2 and text.count("\n") == (size[1] - 1) // 2
    np.testing.assert_array_equal(found[: size[1]], drawn)
    np.testing.assert_array_equal(found[-1], drawn[-1])


def test_a_picture_is_fitted_into_the_terminal_with_its_sides_in_proportion():
    wide, high = Image.new("RGB", (200, 100), "red"), Image.new("L", (100, 200))
    assert pixels(half_blocks(wide, 80, 24)).shape == (40, 80, 3)
    assert pixels(half_blocks(high, 80, 24)).shape == (48, 24, 3)
    assert (pixels(half_blocks(wide, 10, 10)) == (255, 0, 0)).all()


def test_a_label_commands_no_terminal():
    assert printable("caf\u00e9 \u732b\x1b[2J\r\n\x07") == "caf\u00e9 \u732b?[2J???"
    (one,) = explained().explanations
    assert "\x1b" not in sentence(one.model_copy(update={"method": "\x1b[2J"}))


def test_asking_imports_nothing_of_what_serves():
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'torchvision', 'skimage', 'ts', 'jinja2'))\n"
        "from torchserve_explain.cli import main; main(['ask', '--help'])"
    )
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "handlers")}, check=True, capture_output=True)
