"""A map over the whole upload: where it lies, what is marked, and that nothing else of the answer changes."""

import base64
import io
import json

import numpy as np
import pytest
from live import picture
from PIL import Image
from test_service import answers, service
from test_service import explain as asked

from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.pictures import png
from torchserve_explain.serving.regions import LARGEST, UNSEEN, Whole
from torchserve_explain.serving.settings import Preprocessing

__all__ = ["service"]  # a fixture
SMALL = Preprocessing(resize=32, crop=32)


def laid(size, at=(5, 9), preprocessing=SMALL):
    """Read an upload of a size, and lay the map over it that is one at a single place [row, column]."""
    values = np.zeros(preprocessing.size, dtype=np.float32)
    values[at] = 1
    return Whole.of(read_picture(png(Image.new("RGB", size, (200, 120, 40))), preprocessing, 10**8), values)


def centre(values):
    """The centre of mass: x, y, in pixels from the left upper corner."""
    rows, columns = np.indices(values.shape) + 0.5
    return (values * columns).sum() / values.sum(), (values * rows).sum() / values.sum()


@pytest.mark.parametrize("size", [(320, 320), (640, 320), (320, 500), (100, 4000), (4000, 100), (64, 32)])
def test_a_value_lies_where_the_model_saw_it(size):
    whole, (width, height) = laid(size), size
    side = min(size)  # of the square that was seen, in the middle
    expected = (width - side) / 2 + 9.5 / 32 * side, (height - side) / 2 + 5.5 / 32 * side
    assert whole.picture.size == size and whole.values.shape == (height, width)
    assert centre(whole.values) == pytest.approx(expected, abs=0.03 * side)
    left, top, right, bottom = whole.seen
    assert (right - left, bottom - top) == pytest.approx((side, side), abs=2)
    outside = whole.values.copy()
    outside[top:bottom, left:right] = 0
    assert not outside.any()


def test_an_image_smaller_than_the_crop_gets_the_part_of_the_map_that_lies_on_it():
    """A 16 x 16 image is padded by 8 on each side: the map's place (9, 20) is the image's (1, 12)."""
    whole = laid((16, 16), (9, 20), Preprocessing(resize=16, crop=32))
    assert whole.seen == (0, 0, 16, 16) and whole.picture.size == (16, 16)
    assert np.unravel_index(whole.values.argmax(), (16, 16)) == (1, 12) and whole.values[1, 12] == pytest.approx(1)


def test_a_large_upload_is_reduced_to_what_an_answer_can_hold():
    whole = laid((4000, 3000))
    width, height = whole.picture.size
    assert 0.98 * LARGEST < width * height <= 1.01 * LARGEST and width / height == pytest.approx(4 / 3, abs=0.01)
    assert centre(whole.values) == pytest.approx((width / 8 + 9.5 / 32 * height, 5.5 / 32 * height), abs=0.03 * height)


def test_what_the_model_did_not_see_is_marked_and_the_rest_is_not():
    whole = laid((640, 320))
    painted = Image.new("RGB", (640, 320), (10, 200, 30))
    overlay, heatmap = (np.asarray(whole.marked(painted, dims)) for dims in (True, False))
    left, _, right, _ = whole.seen
    for drawn in (overlay, heatmap):
        assert (drawn[:, left:right] == (10, 200, 30)).all() and not (drawn[:, left - 1] == drawn[:, left - 3]).all()
    assert (heatmap[:, : left - 2] == UNSEEN).all()
    grey = overlay[10, 10]
    assert grey.max() == grey.min() < 0.4 * 200
    square = laid((320, 320)).marked(painted.resize((320, 320)), True)
    assert (np.asarray(square) == (10, 200, 30)).all()  # all of it was seen


def answer(service, data, **fields):
    (found,) = answers(service, asked({"data": data, "method": b"saliency", **{k: v.encode() for k, v in fields.items()}}))
    return found


def decoded(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_an_answers_pictures_show_the_whole_upload_and_its_numbers_stay(service):
    data = picture(0, (300, 200))
    crop, whole = (json.loads(answer(service, data, region=one, values="true").body) for one in ("crop", "image"))
    maps = [one["explanations"][0] for one in (crop, whole)]
    pictures = [[one["heatmap"].pop(name) for name in ("overlay_png", "heatmap_png")] for one in maps]
    for one in maps:
        one.pop("milliseconds")
        one["heatmap"]["scale"] = {k: pytest.approx(v) for k, v in one["heatmap"]["scale"].items() if k == "colormap"}
    assert maps[0] == maps[1] and maps[1]["heatmap"]["width"] == 32
    assert [decoded(one).size for one in pictures[0]] == [(224, 224)] * 2
    assert [decoded(one).size for one in pictures[1]] == [(300, 200)] * 2


def test_one_png_is_of_the_uploads_size_and_a_sheet_of_a_screens(service):
    data = picture(0, (1200, 800))
    one = answer(service, data, region="image", output="png")
    assert Image.open(io.BytesIO(one.body)).size == (1200, 800)
    sheet = answer(service, data, region="image", output="png", method="saliency,sensitivity")
    assert max(Image.open(io.BytesIO(sheet.body)).size) < 1200
    page = answer(service, data, region="image", output="html")
    assert page.status == 200 and b"data:image/png" in page.body


def test_a_photo_of_a_telephone_is_answered(service):
    large = answer(service, picture(0, (4000, 3000)), region="image")
    assert large.status == 200 and len(large.body) < 6_000_000
    few = Image.open(io.BytesIO(answer(service, picture(0, (4000, 3000)), region="image", output="png").body))
    assert few.mode == "P" and few.width > 1800
    refused = answer(service, picture(), region="everything")
    assert refused.status == 400 and b"allowed: one of crop, image" in refused.body


def test_maps_of_a_detailed_photo_share_the_room_of_the_answer(service):
    noise, stream = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG", quality=50)
    for output in ("json", "html"):
        found = answer(service, stream.getvalue(), region="image", output=output, method="saliency,sensitivity,grad_cam")
        assert found.status == 200 and len(found.body) < 6_000_000


def test_a_line_of_pixels_is_reduced_too():
    upload = png(Image.new("L", (8_000_000, 1)))
    whole = read_picture(upload, SMALL, 10**8).whole
    assert whole is not None
    reduced = whole(LARGEST)
    assert reduced.width <= LARGEST and reduced.height == 1
