"""Letters of any script: drawn where a font has them, said to be missing where none has."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from torchserve_explain.serving import lettering
from torchserve_explain.serving.lettering import drawable, length, write

DEJAVU = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")  # Latin, Cyrillic, Arabic; no Chinese


@pytest.fixture
def fonts(monkeypatch):
    """Let the system have these fonts."""

    def have(*names):
        monkeypatch.setattr(lettering, "SYSTEM_FONTS", names)
        for cached in (lettering._fonts, lettering._font):
            cached.cache_clear()

    yield have
    monkeypatch.undo()
    have(*lettering.SYSTEM_FONTS)


def drawn(text):
    picture = Image.new("RGB", (200, 30))
    write(picture, (0, 0), text, 13, (255, 255, 255))
    return np.asarray(picture)[..., 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("espresso, 95.1%", "espresso, 95.1%"),
        ("caf\u00e9", "cafe"),
        ("cafe\u0301", "cafe"),
        ("\u72ac\u5c0f rather than \u732b", "[2 letters without a font] rather than [1 letter without a font]"),
        ("\u0643\u0644\u0628, 95%", "[3 letters without a font], 95%"),
        ("\U0001f98a\ufe0f fox", "[1 letter without a font] fox"),
        ("\u0915\u094d\u0937", "[2 letters without a font]"),
        ("", ""),
    ],
)
def test_what_no_font_has_is_said_to_be_missing(fonts, text, expected):
    fonts()
    assert drawable(text, 13) == expected


@pytest.mark.parametrize(
    "text", ["caf\u00e9 \u0142\u00f3d\u017a", "\u0441\u043e\u0431\u0430\u043a\u0430", "\u0643\u0644\u0628, 95%"]
)
def test_a_systems_font_draws_what_the_own_one_lacks(fonts, text):
    fonts("no such font.ttf", DEJAVU)
    assert drawable(text, 13) == text and drawn(text).any() and length(text, 13) > 20


def test_ascii_looks_the_same_whatever_fonts_there_are(fonts):
    fonts()
    alone = drawn("espresso")
    fonts(DEJAVU)
    assert (drawn("espresso") == alone).all()


def test_arabic_letters_are_joined_from_right_to_left(fonts):
    fonts(DEJAVU)
    beh = "\u0628"
    assert length(2 * beh, 13) != 2 * length(beh, 13)
    word, last = drawn("\u0643\u0644\u0628"), drawn("\u0643\u0644")
    assert word.any() and not (word[:, : last.shape[1]] == last).all()


def test_without_raqm_no_letter_is_set_from_right_to_left(fonts, monkeypatch):
    fonts(DEJAVU)
    monkeypatch.setattr("PIL.features.check", lambda feature: feature != "raqm")
    assert drawable("\u0643\u0644\u0628 \u0431", 13) == "[3 letters without a font] \u0431"


def test_texts_follow_each_other_as_wide_as_they_are(fonts):
    fonts(DEJAVU)
    text = "ab \u0431\u0432 cd"
    columns = np.flatnonzero(drawn(text).any(0))
    assert columns.max() < length(text, 13) <= columns.max() + 4
