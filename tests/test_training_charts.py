"""Charts of a training's report: round numbers at the axes, and points where they belong."""

import re
from xml.etree import ElementTree

import pytest

import training  # noqa: F401
from training.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, chart, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1, 10, [2, 4, 6, 8, 10]),
        (0, 2.42, [0, 0.5, 1, 1.5, 2]),
        (0, 0.003, [0, 0.001, 0.002, 0.003]),
        (3, 3, [3]),
    ],
)
def test_the_numbers_at_an_axis_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_points_lie_where_the_axes_say():
    tree = ElementTree.fromstring(chart([Line("one", [1, 3], [0, 2]), Line("two", [1, 2], [1, 2])], "epoch", "loss <b>"))
    first, second = tree.findall("polyline")
    assert first.get("class") == "first" and second.get("class") == "second"
    bottom = HEIGHT - BOTTOM
    assert first.get("points") == f"{LEFT:.1f},{bottom:.1f} {WIDTH - RIGHT:.1f},{TOP:.1f}"
    assert second.get("points") == f"{LEFT:.1f},{(bottom + TOP) / 2:.1f} {(LEFT + WIDTH - RIGHT) / 2:.1f},{TOP:.1f}"
    texts = [text.text for text in tree.findall("text")]
    assert {"epoch", "loss <b>", "0", "2"} <= set(texts)


def test_the_upper_axis_reaches_over_the_line_and_epochs_are_whole():
    assert ticks(0, 0.99, beyond=True) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(0, 2, beyond=True) == pytest.approx([0, 0.5, 1, 1.5, 2]) and ticks(0, 0.99)[-1] < 0.99
    tree = ElementTree.fromstring(chart([Line("one", range(1, 3), [0.5, 0.99])], "epoch", "accuracy"))
    assert [text.text for text in tree.findall("text")] == ["0", "0.2", "0.4", "0.6", "0.8", "1", "1", "2", "epoch", "accuracy"]
    (line,) = tree.findall("polyline")
    _, (_, height) = (map(float, point.split(",")) for point in line.attrib["points"].split())
    assert height == pytest.approx(HEIGHT - BOTTOM - 0.99 * (HEIGHT - BOTTOM - TOP), abs=0.06)


def test_a_flat_line_and_a_single_point_are_drawn():
    for line in (Line("flat", [0, 1], [0, 0]), Line("point", [1], [0.5])):
        assert not re.search("nan|inf", chart([line], "x", "y"))
