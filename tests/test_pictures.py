"""Maps drawn: colours, scales, overlays and contact sheets say what the map says."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from skimage.color import rgb2lab

from torchserve_explain.serving.colormaps import COLORMAPS, DIVERGING, DIVERGING_DEFAULT, SEQUENTIAL_DEFAULT, table
from torchserve_explain.serving.pictures import (
    INK,
    LARGEST_SIDE,
    PAPER,
    SHADE,
    SMALLEST_SIDE,
    STRIP,
    Cell,
    Scale,
    contact_sheet,
    draw_heatmap,
    draw_overlay,
    draw_scale,
    fitted,
    png,
    small_png,
    with_scale,
)

SEQUENTIAL = [name for name in COLORMAPS if name not in DIVERGING]
NUMBERS = st.floats(2**-20, 2**20, width=32)
MAPS = arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.just(0.0) | NUMBERS | NUMBERS.map(lambda v: -v)
)


def values(*rows):
    return np.array(rows, dtype=np.float32)


def photo(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def colours(image):
    return np.asarray(image.convert("RGB"), dtype=int)


def luminance(colour):
    return np.asarray(colour, dtype=float) @ (0.299, 0.587, 0.114)


# Colour maps


@pytest.mark.parametrize("name", COLORMAPS)
def test_a_colour_map_has_256_bytes_of_each_channel(name):
    assert table(name).shape == (256, 3) and table(name).dtype == np.uint8


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("inferno", (0, 0, 4), (252, 255, 164)),
        ("magma", (0, 0, 4), (252, 253, 191)),
        ("viridis", (68, 1, 84), (253, 231, 37)),
        ("gray", (0, 0, 0), (255, 255, 255)),
    ],
)
def test_a_known_colour_map_has_its_known_ends(name, first, last):
    assert (tuple(table(name)[0]), tuple(table(name)[-1])) == (first, last)


@pytest.mark.parametrize(
    ("name", "middle"),
    [("inferno", (188, 55, 84)), ("magma", (183, 55, 121)), ("viridis", (33, 145, 140)), ("gray", (128,) * 3)],
)
def test_a_known_colour_map_has_its_known_middle(name, middle):
    assert np.abs(table(name)[128].astype(int) - middle).max() <= 3


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_sequential_colour_map_grows_brighter(name):
    assert (np.diff(luminance(table(name))) > -0.5).all() and luminance(table(name)[-1]) - luminance(table(name)[0]) > 150


@pytest.mark.parametrize("name", COLORMAPS)
def test_a_colour_map_has_no_jump(name):
    assert np.abs(np.diff(table(name).astype(int), axis=0)).max() <= 12


@pytest.mark.parametrize("name", DIVERGING)
def test_a_diverging_colour_map_is_blue_white_and_red(name):
    (low, middle, high) = table(name)[[0, 128, 255]].astype(int)
    assert low[2] > low[0] + 100 and high[0] > high[2] + 100 and middle.min() > 240


def test_there_is_a_diverging_and_a_sequential_default():
    assert DIVERGING_DEFAULT in DIVERGING and SEQUENTIAL_DEFAULT in SEQUENTIAL


# What colour-blind readers see: Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
BLIND = {
    "none": np.eye(3).tolist(),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(name, blindness):
    """CIE L*a*b* [256, 3] of a colour map as a reader with such eyes sees it."""
    coded = table(name) / 255
    linear = np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.transpose(BLIND[blindness])).clip(0, 1)
    return rgb2lab(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)[None])[0]


@pytest.mark.parametrize("blindness", BLIND)
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_sequential_colour_map_grows_brighter_for_colour_blind_readers(name, blindness):
    lightness = lab(name, blindness)[:, 0]
    assert (np.diff(lightness) > -0.3).all() and lightness[-1] - lightness[0] > 60


@pytest.mark.parametrize("blindness", BLIND)
@pytest.mark.parametrize("name", DIVERGING)
def test_a_diverging_colour_map_tells_the_signs_apart_for_colour_blind_readers(name, blindness):
    seen = lab(name, blindness)
    low, high = seen[127::-1], seen[128:]  # from zero on
    for arm in (low, high):
        assert (np.diff(arm[:, 0]) < 0.3).all() and arm[0, 0] - arm[-1, 0] > 25
    assert np.linalg.norm(high - low, axis=1)[32:].min() > 20


# Scale


@pytest.mark.parametrize(("signed", "name"), [(True, DIVERGING_DEFAULT), (False, SEQUENTIAL_DEFAULT)])
def test_a_signed_map_gets_a_diverging_colour_map(signed, name):
    assert Scale.of(values([1, 2]), signed, None, 100).colormap == name


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", COLORMAPS)
def test_the_colour_map_asked_for_is_taken(name, signed):
    assert Scale.of(values([1, 2]), signed, name, 100).colormap == name


@pytest.mark.parametrize("name", COLORMAPS)
def test_the_largest_value_has_full_colour_without_clipping(name):
    assert Scale.of(values([-1, 4]), True, name, 100).limit == 4


@pytest.mark.parametrize(
    ("name", "signed", "meaning"),
    [
        ("red_blue", True, "Red raised the score, blue lowered it"),
        ("orange_blue", True, "Orange raised the score, blue lowered it"),
        ("gray", True, "The brighter, the more it raised the score"),
        ("gray", False, "The brighter, the more the score depends on it"),
    ],
)
def test_a_scale_says_what_its_colours_mean(name, signed, meaning):
    assert Scale(name, 1).meaning(signed) == meaning


def test_a_scales_unit_is_drawn_and_told():
    plain, with_unit = Scale("gray", 2), Scale("gray", 2, "logit")
    assert with_unit.as_json() == {"colormap": "gray", "from": 0, "to": 2, "unit": "logit"}
    widths = [(colours(draw_scale(one, 224))[2] != PAPER).any(1).sum() for one in (plain, with_unit)]
    assert widths[1] < widths[0] - 15


def test_a_large_negative_value_widens_a_diverging_scale():
    scale = Scale.of(values([-8, 4]), True, "red_blue", 100)
    assert (scale.lowest, scale.limit) == (-8, 8)


def test_a_large_negative_value_does_not_widen_a_sequential_scale():
    scale = Scale.of(values([-8, 4]), True, "viridis", 100)
    assert (scale.lowest, scale.limit) == (0, 4)


@pytest.mark.parametrize("name", COLORMAPS)
def test_the_percentile_gets_full_colour(name):
    ramp = np.arange(101, dtype=np.float32)[None]
    scale = Scale.of(ramp, False, name, 90)
    assert scale.limit == pytest.approx(90)
    assert (scale.indices(ramp)[0, 90:] == 255).all() and scale.indices(ramp)[0, 89] < 255


@pytest.mark.parametrize("name", COLORMAPS)
def test_a_sparse_map_is_scaled_by_its_largest_value(name):
    sparse = np.zeros((100, 100), np.float32)
    sparse[3, 4] = 5
    assert Scale.of(sparse, True, name, 99).limit == 5


@pytest.mark.parametrize("name", COLORMAPS)
def test_a_map_of_zeros_has_no_scale(name):
    scale = Scale.of(np.zeros((3, 3), np.float32), True, name, 99)
    assert scale.limit == 0 and (scale.strength(np.zeros((3, 3), np.float32)) == 0).all()


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_sequential_colour_map_shows_a_negative_map_as_nothing(name):
    negative = values([-1, -5])
    assert (Scale.of(negative, True, name, 99).indices(negative) == 0).all()


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_sequential_colour_map_shows_the_positive_part(name):
    signed = values([-3, 0, 2, 4])
    scale = Scale.of(signed, True, name, 100)
    assert scale.indices(signed).tolist() == [[0, 0, 128, 255]]


@pytest.mark.parametrize("name", DIVERGING)
def test_a_diverging_colour_map_has_zero_in_its_middle(name):
    signed = values([-4, 0, 2])
    assert Scale.of(signed, True, name, 100).indices(signed).tolist() == [[0, 128, 191]]


@pytest.mark.parametrize("name", DIVERGING)
@given(MAPS)
def test_a_diverging_colour_map_is_symmetric_around_zero(name, drawn):
    scale = Scale.of(drawn, True, name, 99)
    assert scale == Scale.of(-drawn, True, name, 99)
    assert np.abs(scale.indices(drawn).astype(int) + scale.indices(-drawn) - 255).max() <= 1


@given(MAPS, st.sampled_from(COLORMAPS), st.floats(1, 100))
def test_a_larger_value_never_has_a_lower_colour(drawn, name, clip):
    indices = Scale.of(drawn, True, name, clip).indices(drawn).ravel()[np.argsort(drawn, axis=None)]
    assert (np.diff(indices.astype(int)) >= 0).all()


@given(MAPS, st.sampled_from(COLORMAPS))
def test_colours_do_not_depend_on_the_maps_size(drawn, name):
    scale, larger = Scale.of(drawn, True, name, 99), Scale.of(4 * drawn, True, name, 99)
    assert (scale.indices(drawn) == larger.indices(4 * drawn)).all()


# Heat map


@pytest.mark.parametrize("name", COLORMAPS)
def test_a_heat_map_has_the_colours_of_its_table(name):
    signed = values([-4, 0, 1], [2, 3, 4])
    scale = Scale.of(signed, True, name, 100)
    assert (colours(draw_heatmap(signed, scale)) == table(name)[scale.indices(signed)]).all()


@pytest.mark.parametrize(("name", "index"), [*((name, 0) for name in SEQUENTIAL), *((name, 128) for name in DIVERGING)])
def test_a_heat_map_of_zeros_has_the_colour_of_zero(name, index):
    zeros = np.zeros((4, 5), np.float32)
    heatmap = draw_heatmap(zeros, Scale.of(zeros, True, name, 99)).convert("RGB")
    assert heatmap.getcolors() == [(20, tuple(table(name)[index].tolist()))]


def test_a_heat_maps_rows_are_the_maps_rows():
    assert draw_heatmap(np.zeros((3, 7), np.float32), Scale("gray", 1)).size == (7, 3)


# Overlay


@pytest.mark.parametrize("name", COLORMAPS)
def test_opacity_zero_leaves_the_image_alone(name):
    seen = photo(6, 4)
    drawn = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    overlay = draw_overlay(drawn, Scale.of(drawn, True, name, 99), seen, 0)
    assert (colours(overlay) == colours(seen)).all()


@pytest.mark.parametrize("name", COLORMAPS)
def test_full_opacity_hides_the_image_where_the_map_is_strongest(name):
    drawn = np.full((4, 6), 3, np.float32)
    overlay = draw_overlay(drawn, Scale.of(drawn, True, name, 99), photo(6, 4), 1)
    assert overlay.getcolors() == [(24, tuple(table(name)[255].tolist()))]


@pytest.mark.parametrize("name", DIVERGING)
def test_a_negative_value_is_blue_on_the_image(name):
    drawn = values([-1, 1])
    blue, red = colours(draw_overlay(drawn, Scale.of(drawn, True, name, 100), Image.new("RGB", (2, 1), "gray"), 0.5))[0]
    assert blue[2] > blue[0] + 50 and red[0] > red[2] + 50


@pytest.mark.parametrize("name", COLORMAPS)
@pytest.mark.parametrize("opacity", [0.5, 1])
def test_a_map_of_zeros_only_darkens_the_image(name, opacity):
    zeros, seen = np.zeros((4, 6), np.float32), photo(6, 4)
    overlay = draw_overlay(zeros, Scale.of(zeros, True, name, 99), seen, opacity)
    under = seen.convert("L").convert("RGB") if name in DIVERGING else seen
    assert np.abs(colours(overlay) - colours(under) * (1 - SHADE * opacity)).max() <= 0.501


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_sequential_overlay_only_darkens_where_the_map_is_negative(name):
    drawn, seen = values([-9, 1]), photo(2, 1)
    overlay = draw_overlay(drawn, Scale.of(drawn, True, name, 100), seen, 0.5)
    assert np.abs(colours(overlay)[0, 0] - colours(seen)[0, 0] * (1 - SHADE / 2)).max() <= 0.501


def test_a_stronger_value_hides_more_of_the_image():
    drawn = np.linspace(0, 1, 9, dtype=np.float32)[None]
    scale = Scale("inferno", 1)
    dark, bright = (draw_overlay(drawn, scale, Image.new("RGB", (9, 1), colour), 0.5) for colour in ("black", "white"))
    left = np.abs(colours(bright) - colours(dark)).sum(2)[0]
    assert (np.diff(left) < 0).all() and left[-1] == 0


def test_a_grey_image_is_overlaid_in_colour():
    overlay = draw_overlay(values([1]), Scale("inferno", 1), Image.new("L", (1, 1), 100), 1)
    assert overlay.getpixel((0, 0)) == tuple(table("inferno")[255].tolist())


@settings(max_examples=50)
@given(MAPS, st.booleans(), st.sampled_from([None, *COLORMAPS]), st.floats(0.001, 100), st.floats(0, 1))
@pytest.mark.filterwarnings("error")
def test_any_map_is_drawn_without_overflow(drawn, signed, name, clip, opacity):
    height, width = drawn.shape
    scale = Scale.of(drawn, signed, name, clip)
    draw_heatmap(drawn, scale)
    darkened = Image.new("RGB", (width, height))
    overlay = colours(draw_overlay(drawn, scale, darkened, opacity))
    assert (overlay[scale.strength(drawn) == 0] == 0).all()


# The scale's strip


@pytest.mark.parametrize("width", [1, 5, 30, 60, 224, 1000])
@pytest.mark.parametrize("limit", [0.0, 1.0, 123456789.0, 1.2e-30])
def test_a_scale_has_the_size_asked_for(width, limit):
    assert draw_scale(Scale("red_blue", limit), width).size == (width, STRIP)


@pytest.mark.parametrize("name", [*SEQUENTIAL, *DIVERGING])
def test_a_scale_shows_every_colour_in_order(name):
    strip = colours(draw_scale(Scale(name, 1.5), 400))[STRIP // 2]
    columns = [int(np.abs(strip - colour).sum(1).argmin()) for colour in table(name)[[20, 60, 100, 160, 200, 240]].astype(int)]
    assert columns == sorted(columns) and len(set(columns)) == 6


def inked(strip):
    """How many pixels of the strip's ends are neither paper nor colours."""
    image = colours(strip)
    return [int((np.abs(part - INK).max(2) < 60).sum()) for part in (image[:, :20], image[:, -20:])]


def test_a_scale_tells_both_its_ends():
    left, right = inked(draw_scale(Scale("viridis", 1.5), 200))
    assert left > 3 and right > 3


def test_a_scale_tells_its_limit():
    one, other = (colours(draw_scale(Scale("viridis", limit), 200))[:, -20:] for limit in (1.5, 2.8))
    assert (one != other).any()


def test_a_diverging_scale_tells_a_negative_end():
    one, other = (colours(draw_scale(Scale("red_blue", limit), 200))[:, :20] for limit in (1.5, 2.8))
    assert (one != other).any()


def test_a_scale_too_narrow_for_colours_shows_none():
    strip = colours(draw_scale(Scale("viridis", 1.5), 24))
    assert np.ptp(strip, axis=2).max() <= 4


def test_a_picture_with_its_scale_keeps_its_size_and_its_other_rows():
    seen = photo(200, 100)
    shown = with_scale(seen, Scale("viridis", 1))
    assert shown.size == seen.size
    assert (colours(shown)[:-STRIP] == colours(seen)[:-STRIP]).all()


def test_a_pictures_last_rows_are_its_scale():
    scale = Scale("viridis", 1)
    assert (colours(with_scale(photo(200, 100), scale))[-STRIP:] == colours(draw_scale(scale, 200))).all()


def test_a_picture_too_small_for_a_scale_is_left_alone():
    seen = photo(30, 4 * STRIP)
    assert (colours(with_scale(seen, Scale("viridis", 1))) == colours(seen)).all()


def test_a_picture_given_a_scale_is_not_changed_itself():
    seen = photo(200, 100)
    before = colours(seen)
    with_scale(seen, Scale("viridis", 1))
    assert (colours(seen) == before).all()


# Contact sheet

PAINTS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255), (128, 0, 0), (0, 128, 0)]


def painted(count, size=(170, 90), title="title", **rest):
    return [Cell(Image.new("RGB", size, paint), title, "subtitle", **rest) for paint in PAINTS[:count]]


def places(sheet, paint):
    """The rows and columns [n, 2] of a sheet's pixels of one paint."""
    return np.argwhere((colours(sheet) == paint).all(2))


@pytest.mark.parametrize("size", [(170, 90), (20, 30), (1, 300)])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 8])
def test_every_picture_stands_whole_on_the_sheet(count, size):
    sheet = contact_sheet(painted(count, size))
    assert [len(places(sheet, paint)) for paint in PAINTS[:count]] == [size[0] * size[1]] * count


def test_pictures_of_different_sizes_do_not_overlap():
    sizes = [(300, 20), (20, 200)] * 3
    sheet = contact_sheet([Cell(Image.new("RGB", size, paint), "", "") for size, paint in zip(sizes, PAINTS[:6], strict=True)])
    assert [len(places(sheet, paint)) for paint in PAINTS[:6]] == [6000, 4000] * 3


def test_pictures_stand_in_reading_order():
    sheet = contact_sheet(painted(4))
    corners = [tuple(places(sheet, paint).min(0)) for paint in PAINTS[:4]]
    assert corners == sorted(corners)
    assert [row for row, _ in corners] == sorted([corners[0][0]] * 2 + [corners[2][0]] * 2)


@pytest.mark.parametrize(("count", "across", "down"), [(1, 1, 1), (2, 2, 1), (4, 2, 2), (5, 3, 2), (8, 3, 3)])
def test_a_sheet_is_about_square_and_has_no_empty_row(count, across, down):
    size, single = (contact_sheet(cells).size for cells in (painted(count), painted(1)))
    step, margin = (170 + 8, single[1] - 8), 8
    assert size == (across * step[0] + margin, down * step[1] + margin)


def head(sheet, paint, width):
    """The part of a sheet above a picture, as wide as its cell."""
    top, left = places(sheet, paint).min(0)
    return colours(sheet)[top - 34 : top, left : left + width]


def test_a_title_stands_above_its_picture():
    sheet = contact_sheet([Cell(Image.new("RGB", (170, 90), PAINTS[0]), "a title", "")])
    assert (head(sheet, PAINTS[0], 170)[:17] != PAPER).any() and (head(sheet, PAINTS[0], 170)[17:] == PAPER).all()


def test_a_subtitle_stands_below_the_title():
    sheet = contact_sheet([Cell(Image.new("RGB", (170, 90), PAINTS[0]), "", "said")])
    assert (head(sheet, PAINTS[0], 170)[:17] == PAPER).all() and (head(sheet, PAINTS[0], 170)[17:] != PAPER).any()


TITLES = {
    "long": "title " * 60,
    "wide": "\u72ac" * 90,
    "accents": "\u00e9\u00df\u0142 " * 60,
    "emoji": "\U0001f98a" * 60,
    "right to left": "\u05d0\u0628" * 60,
    "zero": "\0",
    "surrogate": "\ud800",
    "tab": "a\tb",
    "line break": "a\nb",
}


@pytest.mark.parametrize("title", TITLES.values(), ids=TITLES)
def test_any_title_stays_in_its_own_column(title):
    pictures = [Image.new("RGB", (170, 90), paint) for paint in PAINTS[:2]]
    sheet = contact_sheet([Cell(pictures[0], title, title), Cell(pictures[1], "", "")])
    assert (head(sheet, PAINTS[1], 170) == PAPER).all()


def test_a_long_title_is_shortened_and_not_left_out():
    sheet = contact_sheet([Cell(Image.new("RGB", (170, 90), PAINTS[0]), TITLES["long"], "")])
    columns = np.flatnonzero((head(sheet, PAINTS[0], 170) != PAPER).any((0, 2)))
    assert columns.max() > 150


def test_a_cells_scale_stands_below_its_picture():
    scale = Scale("viridis", 2)
    sheet = contact_sheet(painted(1, scale=scale))
    (bottom, left) = places(sheet, PAINTS[0]).max(0)[0] + 1, places(sheet, PAINTS[0]).min(0)[1]
    assert (colours(sheet)[bottom : bottom + STRIP, left : left + 170] == colours(draw_scale(scale, 170))).all()


def test_a_cell_without_a_scale_has_paper_below_its_picture():
    sheet = contact_sheet(painted(1))
    bottom = places(sheet, PAINTS[0]).max(0)[0] + 1
    assert (colours(sheet)[bottom:] == PAPER).all()


# Large maps


@pytest.mark.parametrize("size", [(LARGEST_SIDE, LARGEST_SIDE), (SMALLEST_SIDE, LARGEST_SIDE), (SMALLEST_SIDE, SMALLEST_SIDE)])
def test_a_map_of_an_ordinary_size_stays_as_it_is(size):
    drawn, seen = np.ones(size[::-1], np.float32), photo(*size)
    fit, picture = fitted(drawn, seen)
    assert fit is drawn and picture is seen


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (256, 256)),
        ((512, 384), (256, 192)),
        ((300, 600), (128, 256)),
        ((5000, 1), (256, 1)),
        ((1, 5000), (1, 256)),
    ],
)
def test_a_large_map_and_its_image_shrink_alike(size, expected):
    smaller, picture = fitted(np.zeros(size[::-1], np.float32), photo(*size))
    assert smaller.shape == expected[::-1] and picture.size == expected


def test_a_large_map_is_averaged_and_not_sampled():
    drawn = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    smaller, _ = fitted(drawn, photo(512, 512))
    assert np.allclose(smaller, drawn.reshape(256, 2, 256, 2).mean((1, 3)), atol=1e-6)


def test_a_large_image_is_averaged_and_not_sampled():
    seen = photo(512, 512)
    _, picture = fitted(np.zeros((512, 512), np.float32), seen)
    assert np.abs(colours(picture) - colours(seen).reshape(256, 2, 256, 2, 3).mean((1, 3))).max() <= 1


def test_a_reduced_map_can_be_drawn():
    drawn = np.zeros((400, 600), np.float32)
    drawn[:200] = 1
    smaller, picture = fitted(drawn, photo(600, 400))
    overlay = colours(draw_overlay(smaller, Scale.of(smaller, False, "gray", 99), picture, 1))
    assert (overlay[:80] == 255).all() and (overlay[90:] < 255).any()


# Small maps


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((32, 32), (224, 224)),
        ((28, 28), (224, 224)),
        ((64, 48), (320, 240)),
        ((168, 160), (336, 320)),
        ((169, 169), (224, 224)),
        ((223, 200), (250, 224)),
        ((1, 1), (224, 224)),
        ((256, 2), (336, 3)),
        ((2, 100), (6, 300)),
    ],
)
def test_a_small_map_and_its_image_grow_alike_and_by_a_whole_factor_where_one_fits(size, expected):
    larger, picture = fitted(np.zeros(size[::-1], np.float32), photo(*size))
    assert larger.shape == expected[::-1] and picture.size == expected


def test_each_value_of_a_small_map_becomes_a_square():
    drawn = np.random.default_rng(0).normal(size=(32, 40)).astype(np.float32)
    larger, _ = fitted(drawn, photo(40, 32))
    assert (larger.reshape(32, 7, 40, 7) == drawn[:, None, :, None]).all()


def test_a_map_that_no_whole_factor_fits_keeps_its_values_and_their_order():
    drawn = np.arange(200, dtype=np.float32)[None].repeat(200, 0)
    larger, _ = fitted(drawn, photo(200, 200))
    assert (np.unique(larger) == np.arange(200)).all() and (np.diff(larger) >= 0).all()


def test_a_small_image_grows_smoothly():
    edge = Image.fromarray(np.repeat(np.array([[0] * 16 + [200] * 16], np.uint8), 32, 0))
    _, picture = fitted(np.zeros((32, 32), np.float32), edge)
    row = np.asarray(picture, dtype=int)[112]
    assert len(np.unique(row)) > 5 and (row[:90] == 0).all() and (row[-90:] == 200).all()


def test_the_digits_of_a_small_maps_scale_stand_apart():
    larger, picture = fitted(np.zeros((32, 32), np.float32), photo(32, 32))
    strip = colours(with_scale(picture, Scale("red_blue", 1.234e-5)))[-STRIP:]
    assert larger.shape == (224, 224) and np.ptp(strip[STRIP // 2, 80:144], axis=1).max() > 100


# Encoding


def test_a_png_is_the_picture_itself():
    seen = photo(30, 20)
    assert (colours(Image.open(io.BytesIO(png(seen)))) == colours(seen)).all()


def test_a_heat_maps_png_keeps_its_colours():
    drawn = np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32)
    heatmap = draw_heatmap(drawn, Scale.of(drawn, True, None, 99))
    assert (colours(Image.open(io.BytesIO(png(heatmap)))) == colours(heatmap)).all()


def smooth(side=128):
    x, y = np.meshgrid(*[np.linspace(0, 255, side)] * 2)
    return Image.fromarray(np.stack([x, y, 255 - x], 2).astype(np.uint8))


def test_a_small_png_is_nearly_the_picture():
    decoded = colours(Image.open(io.BytesIO(small_png(smooth()))))
    assert np.abs(decoded - colours(smooth())).mean() < 8


def test_a_small_png_shows_a_gradient_without_bands():
    """Octree quantisation alone leaves 12 greys, 8 off."""
    ramp = Image.fromarray(np.tile(np.linspace(20, 200, 224).astype(np.uint8)[None, :, None], (224, 1, 3)))
    decoded = colours(Image.open(io.BytesIO(small_png(ramp))))
    assert np.abs(decoded - colours(ramp)).max() <= 5 and len(np.unique(decoded)) > 40


def test_a_small_png_keeps_a_single_bright_pixel():
    """A sample of the pixels alone misses it."""
    picture = np.tile(np.linspace(20, 200, 224).astype(np.uint8)[None, :, None], (224, 1, 3))
    picture[102, 102] = (255, 59, 26)
    decoded = Image.open(io.BytesIO(small_png(Image.fromarray(picture))))
    assert decoded.convert("RGB").getpixel((102, 102)) == (255, 59, 26)


@pytest.mark.parametrize("picture", [Image.new("L", (1, 1), 7), Image.new("RGB", (3, 500), "red"), photo(5, 2)])
def test_a_small_png_of_few_pixels_is_exact(picture):
    assert (colours(Image.open(io.BytesIO(small_png(picture)))) == colours(picture)).all()


def test_a_small_png_is_smaller():
    assert len(small_png(photo(128, 128))) < 0.5 * len(png(photo(128, 128)))
