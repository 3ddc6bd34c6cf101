"""An upload becomes what the model sees: turned upright, on white, in 8 bits, cropped as torchvision does."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence
from torchvision import transforms

from torchserve_explain.errors import RequestError
from torchserve_explain.serving.images import FORMATS, read_picture
from torchserve_explain.serving.settings import Preprocessing

PIXELS = 1_000_000
SMALL = Preprocessing(resize=16, crop=16)
GREY_MODEL = Preprocessing(resize=16, crop=16, mean=(0.5,), std=(0.5,))
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}}
RED, GREEN, BLUE, YELLOW = (220, 20, 20), (20, 200, 20), (20, 20, 220), (220, 220, 20)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(width, height, channels=3, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8))


def read(image, preprocessing=SMALL, kind="PNG", **options):
    data = image if isinstance(image, bytes) else encoded(image, kind, **options)
    return read_picture(data, preprocessing, PIXELS)


def sizes(preprocessing):
    return f"resize {preprocessing.resize}, crop {preprocessing.crop}"


def middle(picture):
    return picture.seen.getpixel((picture.seen.width // 2, picture.seen.height // 2))


def close(colour, expected, tolerance=1):
    return all(abs(a - b) <= tolerance for a, b in zip(colour, expected, strict=True))


def refused(data, preprocessing=SMALL, limit=PIXELS):
    with pytest.raises(RequestError) as caught:
        read_picture(data, preprocessing, limit)
    message = str(caught.value)
    assert message.isascii() and len(message) <= 200
    return caught.value


def torchvision_seen(image, preprocessing):
    steps = [] if preprocessing.resize is None else [preprocessing.resize]
    resize = [transforms.Resize(list(s) if isinstance(s, tuple) else s, preprocessing.interpolation_mode) for s in steps]
    crop = [] if preprocessing.crop is None else [transforms.CenterCrop(preprocessing.crop)]
    return transforms.Compose(resize + crop)(image)


def torchvision_input(image, preprocessing):
    tail = transforms.Compose([transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)])
    return tail(torchvision_seen(image, preprocessing))


# Size and crop


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(300, 260), (260, 300), (224, 224), (90, 100), (800, 120), (257, 511)])
def test_the_tensor_is_torchvisions(size, interpolation):
    image, preprocessing = noise(*size), Preprocessing(interpolation=interpolation)
    assert torch.equal(read(image, preprocessing).input, torchvision_input(image, preprocessing))


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(resize=(40, 60), crop=None),
        Preprocessing(resize=(40, 60), crop=(30, 50)),
        Preprocessing(resize=None, crop=32),
        Preprocessing(resize=32, crop=48),
        Preprocessing(resize=48, crop=(20, 32), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
    ],
    ids=sizes,
)
def test_every_kind_of_preprocessing_is_torchvisions(preprocessing):
    image = noise(70, 50)
    assert torch.equal(read(image, preprocessing).input, torchvision_input(image, preprocessing))


def test_a_grey_models_tensor_is_torchvisions():
    image = noise(50, 40)
    assert torch.equal(read(image, GREY_MODEL).input, torchvision_input(image.convert("L"), GREY_MODEL))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 9))
def test_an_image_of_any_ordinary_shape_gets_torchvisions_tensor(width, height, seed):
    width, height = min(width, 8 * height), min(height, 8 * width)
    image = noise(width, height, seed=seed)
    assert torch.equal(read(image).input, torchvision_input(image, SMALL))


def test_seen_is_the_tensor_before_normalisation():
    picture, preprocessing = read(noise(50, 40)), SMALL
    pixels = torch.from_numpy(np.array(picture.seen)).permute(2, 0, 1) / 255
    assert torch.allclose(preprocessing.normalization.inverse(picture.input), pixels, atol=1e-6)


def test_width_and_height_are_the_uploads():
    picture = read(noise(70, 30))
    assert (picture.width, picture.height) == (70, 30)


@pytest.mark.parametrize("size", [(600, 400), (400, 600), (600, 600), (2400, 120), (120, 2400)])
def test_the_reported_crop_is_what_is_seen(size):
    """A rectangle painted into the upload stands in the seen picture where the crop says."""
    width, height = size
    side = min(size)
    x, y = width // 2, height // 2
    rectangle = (x - side // 10, y - side // 5, x + side // 6, y + side // 20)
    image = Image.new("RGB", size)
    image.paste("white", rectangle)
    picture = read(image, Preprocessing())
    left, top, right, bottom = picture.crop
    white = np.argwhere(np.asarray(picture.seen.convert("L")) > 127)
    found = (white.min(0)[1], white.min(0)[0], white.max(0)[1] + 1, white.max(0)[0] + 1)
    scale = 224 / (right - left), 224 / (bottom - top)
    expected = [(c - o) * s for c, o, s in zip(rectangle, (left, top) * 2, scale * 2, strict=True)]
    assert found == pytest.approx(expected, abs=1 + max(scale) / 2)


def test_nothing_but_the_crop_is_seen():
    image = Image.new("RGB", (600, 400), "red")
    left, top, right, bottom = read(image, Preprocessing()).crop
    image.paste("white", (left - 3, top - 3, right + 3, bottom + 3))
    assert read(image, Preprocessing()).seen.getcolors() == [(224 * 224, (255, 255, 255))]


@pytest.mark.parametrize("size", [(1, 4), (4, 1), (1, 5000), (5000, 1), (1, 1), (2, 16)])
def test_the_crop_is_never_empty(size):
    left, top, right, bottom = read(noise(*size), Preprocessing()).crop
    assert left < right and top < bottom


@pytest.mark.parametrize(
    "preprocessing", [SMALL, Preprocessing(resize=None, crop=64), Preprocessing(resize=32, crop=48)], ids=sizes
)
def test_the_crop_lies_inside_the_upload(preprocessing):
    left, top, right, bottom = read(noise(60, 40), preprocessing).crop
    assert 0 <= left < right <= 60 and 0 <= top < bottom <= 40


# Elongated images


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_a_very_long_image_is_not_enlarged_whole(size, monkeypatch):
    largest, resize = [], Image.Image.resize

    def recorded(self, size, *rest, **options):
        largest.append(size[0] * size[1])
        return resize(self, size, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    read(noise(*size), Preprocessing())
    assert max(largest) <= 8 * 256 * 256


@pytest.mark.parametrize("size", [(3000, 200), (200, 3000)])
def test_a_very_long_image_shows_what_torchvision_shows(size):
    ramp = np.tile(np.linspace(0, 255, 3000).astype(np.uint8)[None, :, None], (200, 1, 3))
    image = Image.fromarray(ramp if size[0] > size[1] else ramp.transpose(1, 0, 2).copy())
    expected = np.asarray(torchvision_seen(image, Preprocessing()), dtype=int)
    assert np.abs(np.asarray(read(image, Preprocessing()).seen, dtype=int) - expected).max() <= 2


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(resize=(32, 32), crop=None),
        Preprocessing(resize=None, crop=(20, 300)),
        Preprocessing(resize=16, crop=(16, 240)),
    ],
    ids=sizes,
)
def test_nothing_that_would_be_seen_of_a_long_image_is_cut_off(preprocessing):
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 400).astype(np.uint8)[None, :, None], (20, 1, 3)))
    expected = np.asarray(torchvision_seen(ramp, preprocessing), dtype=int)
    assert np.abs(np.asarray(read(ramp, preprocessing).seen, dtype=int) - expected).max() <= 2


def test_a_single_pixel_fills_the_picture():
    assert read(Image.new("RGB", (1, 1), RED)).seen.getcolors() == [(256, RED)]


# EXIF orientation

# How an upright array [H, W, 3] is stored under each orientation tag.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def quadrants():
    image = Image.new("RGB", (64, 48), RED)
    for colour, corner in ((GREEN, (32, 0)), (BLUE, (0, 24)), (YELLOW, (32, 24))):
        image.paste(colour, (*corner, corner[0] + 32, corner[1] + 24))
    return image


def turned(orientation, kind):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(quadrants()))))
    exif = Image.Exif()
    exif[274] = orientation
    options = {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif}
    return encoded(stored, kind, **options | ({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_turned_as_its_exif_tag_says(orientation, kind):
    seen = read(turned(orientation, kind)).seen
    corners = [seen.getpixel(at) for at in ((2, 2), (13, 2), (2, 13), (13, 13))]
    assert all(close(*pair, 12) for pair in zip(corners, (RED, GREEN, BLUE, YELLOW), strict=True)), corners


@pytest.mark.parametrize("orientation", STORED)
def test_width_height_and_crop_are_the_upright_images(orientation):
    picture, upright = read(turned(orientation, "PNG")), read(quadrants())
    assert (picture.width, picture.height, picture.crop) == (64, 48, upright.crop)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0II*\0",
        b"Exif\0\0neither II nor MM",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
    ],
    ids=["cut", "garbage", "orientation 99"],
)
def test_a_broken_exif_block_does_not_spoil_the_image(exif, kind):
    assert close(middle(read(Image.new("RGB", (20, 20), RED), kind=kind, exif=exif)), RED, 12)


# Modes


def test_grey_becomes_three_equal_channels():
    assert middle(read(Image.new("L", (20, 20), 100))) == (100, 100, 100)


def test_one_bit_black_and_white_is_black_and_white():
    image = Image.new("1", (20, 20))
    image.paste(1, (0, 0, 20, 10))
    seen = read(image).seen
    assert (seen.getpixel((8, 2)), seen.getpixel((8, 13))) == ((255, 255, 255), (0, 0, 0))


def test_a_grey_model_sees_luminance():
    assert middle(read(Image.new("RGB", (20, 20), (0, 255, 0)), GREY_MODEL)) == 150


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_a_palette_is_resolved(kind):
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, *RED, *BLUE])
    assert middle(read(image, kind=kind)) == RED


def test_a_palettes_transparent_entry_is_put_on_white():
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, *RED])
    assert middle(read(image, transparency=1)) == (255, 255, 255)


def test_a_palettes_half_transparent_entry_is_mixed_with_white():
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 0, 0, 0])
    assert close(middle(read(image, transparency=b"\xff\x33")), (204, 204, 204))


def test_a_gifs_transparent_entry_is_put_on_white():
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, *RED])
    assert middle(read(image, kind="GIF", transparency=1)) == (255, 255, 255)


@pytest.mark.parametrize("kind", sorted(LOSSLESS.keys() - {"BMP"}))
def test_alpha_is_put_on_white(kind):
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 51))
    assert close(middle(read(image, kind=kind, **LOSSLESS[kind])), (204, 204, 204))


def test_hidden_colour_does_not_show():
    assert middle(read(Image.new("RGBA", (20, 20), (*RED, 0)))) == (255, 255, 255)


def test_an_opaque_alpha_channel_changes_nothing():
    image = noise(40, 30)
    opaque = image.copy()
    opaque.putalpha(255)
    assert torch.equal(read(opaque).input, read(image).input)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_with_alpha_is_put_on_white(kind):
    assert close(middle(read(Image.new("LA", (20, 20), (0, 51)), kind=kind)), (204, 204, 204))


def test_a_grey_model_sees_alpha_on_white():
    assert abs(middle(read(Image.new("LA", (20, 20), (0, 51)), GREY_MODEL)) - 204) <= 1


@pytest.mark.parametrize(("mode", "colour"), [("L", 70), ("RGB", RED), ("1", 0)])
def test_a_colour_declared_transparent_is_put_on_white(mode, colour):
    assert middle(read(Image.new(mode, (20, 20), colour), transparency=colour)) == (255, 255, 255)


def test_a_16_bit_grey_declared_transparent_is_put_on_white():
    deep = Image.fromarray(np.full((20, 20), 30000, np.uint16))
    assert middle(read(deep, transparency=30000)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
@pytest.mark.parametrize(
    ("ink", "colour"),
    [((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0))],
    ids=["red", "white", "black"],
)
def test_cmyk_inks_become_their_colour(ink, colour, kind):
    assert close(middle(read(Image.new("CMYK", (20, 20), ink), kind=kind)), colour, 12)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("value", "grey"), [(0, 0), (200, 1), (4095, 16), (32768, 128), (65535, 255)])
def test_16_bit_grey_keeps_its_tone(value, grey, kind):
    assert middle(read(Image.fromarray(np.full((20, 20), value, np.uint16)), kind=kind)) == (grey,) * 3


def test_big_endian_16_bit_grey_keeps_its_tone():
    assert middle(read(Image.fromarray(np.full((20, 20), 32768, ">u2")), kind="TIFF")) == (128,) * 3


@pytest.mark.parametrize(("values", "grey"), [((0, 200), 200), ((0, 40000), 156), ((-9, 7), 7), ((0, 10**8), 255)])
def test_32_bit_grey_is_scaled_by_its_range(values, grey):
    image = np.full((20, 20), values[1], np.int32)
    image[0, 0] = values[0]
    assert middle(read(Image.fromarray(image), kind="TIFF")) == (grey,) * 3


@pytest.mark.parametrize(("value", "grey"), [(0.2, 51), (1.0, 255), (200.0, 200), (32768.0, 128)])
def test_float_grey_is_scaled_by_its_range(value, grey):
    assert middle(read(Image.fromarray(np.full((20, 20), value, np.float32)), kind="TIFF")) == (grey,) * 3


def test_a_float_that_is_no_number_is_black_and_the_others_keep_their_tone():
    image = np.full((20, 20), np.nan, np.float32)
    image[:10] = 0.2
    seen = read(Image.fromarray(image), kind="TIFF").seen
    assert (seen.getpixel((8, 13)), seen.getpixel((8, 2))) == ((0, 0, 0), (51, 51, 51))


def test_a_negative_float_image_is_black():
    assert middle(read(Image.fromarray(np.full((20, 20), -3, np.float32)), kind="TIFF")) == (0, 0, 0)


# Formats


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_lossless_format_gives_torchvisions_tensor(kind):
    image = noise(40, 30)
    assert torch.equal(read(image, kind=kind, **LOSSLESS[kind]).input, torchvision_input(image, SMALL))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}], ids=str)
def test_a_jpeg_gives_the_tensor_of_its_decoded_pixels(options):
    data = encoded(noise(40, 30), "JPEG", **options)
    decoded = Image.open(io.BytesIO(data)).convert("RGB")
    assert torch.equal(read(data).input, torchvision_input(decoded, SMALL))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_is_seen(kind):
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert len(ImageSequence.all_frames(Image.open(io.BytesIO(data)))) == 3
    assert middle(read(data)) == RED


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "TGA", "PCX", "SGI", "DDS", "DIB", "PDF"])
def test_a_forbidden_format_is_refused(kind):
    error = refused(encoded(noise(20, 20), kind))
    assert error.status == 400 and ", ".join(FORMATS) in str(error)


def test_vector_graphics_are_refused():
    assert refused(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>').status == 400


# What is no image


def test_no_bytes_are_told_how_to_send_an_image():
    error = refused(b"")
    assert error.status == 400 and "no image" in str(error) and "data" in str(error)


@pytest.mark.parametrize(
    "data", [b"\0", b"not an image", bytes(range(256)) * 40, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a"]
)
def test_garbage_is_refused_with_its_size(data):
    error = refused(data)
    assert error.status == 400 and f"{len(data)} bytes" in str(error)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_truncated_image_is_refused(kind, part):
    data = encoded(noise(80, 60), kind)
    assert refused(data[: int(part * len(data))]).status == 400


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=20, deadline=None)
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20))
def test_a_corrupt_image_is_read_or_refused(kind, places):
    data = bytearray(encoded(noise(30, 20), kind))
    for place, value in places:
        data[int(place * len(data))] = value
    try:
        picture = read(bytes(data))
    except RequestError as error:
        assert error.status in (400, 413)
    else:
        assert picture.input.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF"]),
    st.binary(),
)
def test_random_bytes_are_refused(head, tail):
    assert refused(head + tail).status in (400, 413)


# Size limits


def png_header(width, height):
    """A PNG that claims a size and holds no pixel: to decode it would be a 400."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"none") + chunk(b"IEND", b"")


def bmp_header(width, height):
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def test_the_header_without_pixels_cannot_be_decoded():
    assert refused(png_header(100, 100)).status == 400


@pytest.mark.parametrize("header", [png_header, bmp_header])
@pytest.mark.parametrize("size", [(1001, 1000), (8000, 8000), (100_000, 100_000)])
def test_a_size_over_the_limit_is_refused_before_decoding(size, header):
    error = refused(header(*size))
    assert error.status == 413 and str(PIXELS) in str(error)


def test_a_size_over_the_limit_is_named():
    assert "1001x1000" in str(refused(png_header(1001, 1000)))


def test_the_limit_itself_is_allowed():
    assert read_picture(encoded(noise(10, 20)), SMALL, 200).width == 10


def test_one_pixel_over_the_limit_is_refused():
    assert refused(encoded(noise(10, 20)), limit=199).status == 413


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded():
    stream = io.BytesIO()
    Image.new("L", (900, 900), 128).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(RequestError, match="scans") as refused:
        read_picture(data[:-2] + scan * 30_000 + data[-2:], Preprocessing(), PIXELS)
    assert refused.value.status == 413
    assert read_picture(data, Preprocessing(), PIXELS).width == 900
