"""Masks and boxes go where their pictures go, and the gallery tells how the maps lie against them."""

import io

import numpy as np
import pytest
from PIL import Image

from torchserve_explain.attribution.localization import LOCALIZATIONS, centre_map
from torchserve_explain.errors import ArchiveError
from torchserve_explain.gallery.located import measure, summary
from torchserve_explain.gallery.truth import read_truth
from torchserve_explain.serving.images import mask_seen, read_mask, read_picture
from torchserve_explain.serving.settings import Preprocessing

LIMIT = 10**8
SQUARE = Preprocessing(resize=32, crop=24)
HEADER = "file,class_name,xmin,ymin,xmax,ymax,width,height\n"


def encoded(pixels, **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", **options)
    return stream.getvalue()


def one_object(height, width, top, left, bottom, right):
    within = np.zeros((height, width), np.bool_)
    within[top:bottom, left:right] = True
    return within


@pytest.mark.parametrize("preprocessing", [
    SQUARE, Preprocessing(resize=(24, 40), crop=None), Preprocessing(resize=None, crop=80),
    Preprocessing(resize=64, crop=(20, 30), interpolation="bicubic"),
], ids=["cropped", "squeezed", "padded", "enlarged"])  # fmt: skip
@pytest.mark.parametrize("size", [(60, 48), (50, 90), (20, 1000)])
def test_a_mask_goes_where_its_picture_goes(preprocessing, size):
    """A white object on black is its own mask: what the model sees of it is where it is bright."""
    height, width = size
    within = one_object(height, width, height // 3, width // 3, height - 4, 2 * width // 3)
    picture = read_picture(encoded(np.repeat(255 * within.astype(np.uint8)[..., None], 3, -1)), preprocessing, LIMIT)
    bright = np.asarray(picture.seen)[..., 0] > 127
    assert (mask_seen(within, preprocessing) == bright).all() and bright.any()


@pytest.mark.parametrize("form", ["L", "1", "I;16", "P", "RGB", "RGBA", "LA"])
def test_a_mask_may_have_any_form(form):
    within = one_object(12, 10, 2, 3, 9, 8)
    if form == "I;16":
        data = encoded(within.astype(np.uint16))  # by labels, of which 1 is nearly black
    elif form in ("RGBA", "LA"):  # what is transparent lies outside, whatever its colour
        white = Image.new("L", (10, 12), 255)
        picture = Image.merge(form, [white] * (len(form) - 1) + [Image.fromarray(255 * within.astype(np.uint8))])
        data = encoded(np.asarray(picture))
    else:
        stream = io.BytesIO()
        Image.fromarray(within.astype(np.uint8) * 255).convert(form).save(stream, "PNG")
        data = stream.getvalue()
    assert (read_mask(data, LIMIT) == within).all()


@pytest.fixture
def data(tmp_path):
    """Two pictures, and a folder of masks that knows one of them."""
    for name in ("one.jpg", "two.jpg"):
        path = tmp_path / "data" / "ant" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "grey").save(path)
    (tmp_path / "masks" / "ant").mkdir(parents=True)
    (tmp_path / "masks" / "ant" / "one.png").write_bytes(encoded(255 * one_object(30, 40, 10, 10, 20, 30).astype(np.uint8)))
    return tmp_path


PATHS = ("ant/one.jpg", "ant/two.jpg")


def truth_of(folder, masks=None, boxes=None):
    if isinstance(boxes, str):
        (folder / "boxes.csv").write_text(boxes)
        boxes = folder / "boxes.csv"
    return read_truth(masks, boxes, folder / "data", PATHS, SQUARE, LIMIT)


def test_a_box_is_the_mask_that_it_draws(data):
    masks, boxes = truth_of(data, data / "masks"), truth_of(data, boxes=HEADER + "ant/one.jpg,ant,9.6,10.2,30.1,19.8,40,30\n")
    assert (masks.mask(PATHS[0]) == boxes.mask(PATHS[0])).all() and masks.mask(PATHS[0]).any()
    assert masks.mask(PATHS[1]) is None is boxes.mask(PATHS[1])
    assert masks.missing == boxes.missing == {PATHS[1]: "there is none"}
    assert truth_of(data) is None


def test_boxes_are_found_by_path_or_by_a_name_that_only_one_has(data):
    two = truth_of(data, boxes=HEADER + "x/one.jpg,a,0,0,20,30,40,30\nx/one.jpg,b,20,0,40,30,40,30\n")
    assert two.mask(PATHS[0]).all()  # both boxes together
    ambiguous = HEADER + "x/one.jpg,a,0,0,20,30,40,30\ny/one.jpg,a,0,0,20,30,40,30\n"
    with pytest.raises(ArchiveError, match="knows none of the pictures"):
        truth_of(data, boxes=ambiguous)
    own = truth_of(data, boxes=ambiguous + "ant/one.jpg,a,0,0,40,30,40,30\n")
    assert own.mask(PATHS[0]).all()


@pytest.mark.parametrize(("line", "allowed"), [
    ("one.jpg,a,9,0,9,30,40,30", "line 2: allowed: 0 <= xmin < xmax"), ("one.jpg,a,0,0,41,30,40,30", "xmax <= width"),
    ("one.jpg,a,0,0,9,9,inf,30", "at most 100000000 pixels"),
    ("one.jpg,a,0,0,nan,30,40,30", "xmin < xmax"), ("one.jpg,a,0,0,x,30,40,30", "allowed: numbers as xmin"),
    ("one.jpg,a", "allowed: numbers as xmin"), ("three.jpg,a,0,0,9,9,40,30", "knows none of the pictures"),
])  # fmt: skip
def test_a_box_that_is_none_is_refused(data, line, allowed):
    with pytest.raises(ArchiveError, match=allowed):
        truth_of(data, boxes=HEADER + line + "\n")


def test_what_is_no_ground_truth_is_refused(data):
    with pytest.raises(ArchiveError, match="has no column width; allowed: file, xmin"):
        truth_of(data, boxes=HEADER.replace("width,", "") + "\n")
    with pytest.raises(ArchiveError, match=r"knows none of the pictures of .*allowed: the picture's path with \.png"):
        truth_of(data, data / "nowhere")


@pytest.mark.parametrize(("mask", "why"), [
    (encoded(np.full((40, 30), 255, np.uint8)), "it is of 30 x 40 pixels; allowed: the picture's 40 x 30"),
    (encoded(np.zeros((30, 40), np.uint8)), "the model sees nothing of it"),
    (encoded(255 * one_object(30, 40, 0, 0, 30, 1).astype(np.uint8)), "the model sees nothing of it"),
    (b"no picture", "not an image"),
], ids=["turned", "empty", "cropped away", "no picture"])  # fmt: skip
def test_a_mask_that_does_not_fit_is_told(data, mask, why):
    truth = truth_of(data, data / "masks")
    (data / "masks" / "ant" / "one.png").write_bytes(mask)
    assert truth.mask(PATHS[0]) is None and why in truth.missing[PATHS[0]]


def test_a_mask_is_of_the_upright_picture(data):
    image = Image.new("RGB", (30, 40), "grey")
    image.getexif()[0x0112] = 6
    image.save(data / "data" / PATHS[0], exif=image.getexif())
    assert truth_of(data, data / "masks").mask(PATHS[0]) is not None


def test_means_are_over_pictures_and_stand_beside_the_baselines():
    left, right = one_object(8, 8, 0, 0, 8, 4), one_object(8, 8, 0, 4, 8, 8)
    corner = one_object(8, 8, 0, 0, 2, 2)
    measured = [("ant", measure({"m": left.astype(float)}, mask)) for mask in (left, right)]
    measured.append(("cat", measure({"m": corner.astype(float)}, corner)))
    rows = {(row.label, row.map): row for row in summary(measured)}
    assert [row.map for row in summary(measured)][:3] == ["m", "centre", "random"]
    assert rows["ant", "m"].scores == dict.fromkeys(LOCALIZATIONS, 0.5) and rows["ant", "m"].pictures == 2
    assert rows[None, "m"].scores == pytest.approx(dict.fromkeys(LOCALIZATIONS, 2 / 3))
    assert rows[None, "random"].scores == pytest.approx(dict.fromkeys(LOCALIZATIONS, (0.5 + 0.5 + 4 / 64) / 3))
    centre = [LOCALIZATIONS["mass_accuracy"](centre_map(8, 8), mask) for mask in (left, right, corner)]
    assert rows[None, "centre"].scores["mass_accuracy"] == pytest.approx(np.mean(centre))
