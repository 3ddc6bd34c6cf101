"""Uploaded bytes become what the model sees, the way a person expects of their picture."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from math import ceil, floor, isfinite, sqrt

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision import transforms

from torchserve_explain.errors import RequestError
from torchserve_explain.serving.bombs import Upload, check_file, check_image, too_large
from torchserve_explain.serving.errors import bad_request, shown
from torchserve_explain.serving.settings import Prepare, Preprocessing

log = logging.getLogger(__name__)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # decoders that run no code of the file's
ELONGATED = 8  # times longer than wide
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Picture:
    """An upload as the model sees it: `input` [C, H, W] normalised, and `seen`, the same as a picture.

    `crop` is the part of the upright original (`width` x `height`) that is seen: left, top, right, bottom; `box` the same
    exactly, which may reach beyond a small original. `whole` decodes the original anew, since it may be large.
    """

    input: Tensor
    seen: Image.Image
    width: int
    height: int
    crop: tuple[int, int, int, int]
    box: Box | None = None
    whole: Callable[[int], Image.Image] | None = None  # of at most so many pixels


def read_picture(data: bytes, preprocessing: Preprocessing, pixel_limit: int) -> Picture:
    """Decode and prepare an upload; raises RequestError 400 (not an image) or 413 (too many pixels)."""
    image = _whole(data, preprocessing, pixel_limit)
    width, height = image.size
    again = cache(partial(_reduced, data, preprocessing, pixel_limit))
    if preprocessing.prepare is not None:
        pixels, box = _prepared(image, preprocessing, preprocessing.prepare)
        seen = _shown(image, box, preprocessing.size)
        return Picture(preprocessing.normalization(pixels), seen, width, height, _within(box, image), box, again)
    trimmed, (x, y) = _trimmed(image, preprocessing)
    seen, (left, top, right, bottom) = _seen(trimmed, preprocessing)
    box = left + x, top + y, right + x, bottom + y
    return Picture(as_input(seen, preprocessing), seen, width, height, _within(box, image), box, again)


def _whole(data: bytes, preprocessing: Preprocessing, pixel_limit: int) -> Image.Image:
    """Return an upload, upright, in the colours that the model sees."""
    return _upright(_decoded(data, pixel_limit), preprocessing.mode)


def _reduced(data: bytes, preprocessing: Preprocessing, pixel_limit: int, most: int) -> Image.Image:
    """Return an upload as _whole does, reduced to about `most` pixels where it has more."""
    image = _whole(data, preprocessing, pixel_limit)
    scale = sqrt(most / (image.width * image.height))
    if scale >= 1:
        return image
    width, height = (min(most, max(1, round(side * scale))) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX)


def _outward(box: Box) -> tuple[int, int, int, int]:
    """Return a part in whole pixels that holds it."""
    return floor(box[0]), floor(box[1]), ceil(box[2]), ceil(box[3])


def _within(box: Box, image: Image.Image) -> tuple[int, int, int, int]:
    """Return a part in whole pixels; where a small image was padded, it goes no further than the image."""
    left, top, right, bottom = _outward(box)
    return max(0, left), max(0, top), min(image.width, right), min(image.height, bottom)


def _prepared(image: Image.Image, preprocessing: Preprocessing, prepare: Prepare) -> tuple[Tensor, Box]:
    """Return what preprocess.py makes of a picture, and of which part; raises RequestError 400 where that does not fit."""
    try:
        pixels, box = prepare(image.copy())  # which it may change
        left, top, right, bottom = (0.0, 0.0, *image.size) if box is None else map(float, box)
    except MemoryError:
        raise
    except Exception as error:  # it is the user's own code that runs here
        log.info("preprocess.py cannot take an image", exc_info=error)
        why = f"{type(error).__name__}: {shown(str(error))}"
        raise bad_request(f"data: preprocess.py cannot take this image: {why}") from error
    expected = (len(preprocessing.mean), *preprocessing.size)
    if not isinstance(pixels, Tensor) or tuple(pixels.shape) != expected:
        found = list(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise bad_request(f"data: preprocess.py makes {found} of this image; allowed: a tensor {list(expected)}")
    finite = all(map(isfinite, (left, top, right, bottom)))
    if not (finite and left < min(right, image.width) and top < min(bottom, image.height) and right > 0 and bottom > 0):
        raise bad_request(f"data: preprocess.py shows {[left, top, right, bottom]} of this image; allowed: a part of it")
    return pixels.float(), (left, top, right, bottom)


def _shown(image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """Return a part of a picture at a height and width; what lies beyond the picture is black, and takes no memory."""
    scale = size[1] / (box[2] - box[0]), size[0] / (box[3] - box[1])
    part = max(0.0, box[0]), max(0.0, box[1]), min(float(image.width), box[2]), min(float(image.height), box[3])
    ends = zip(part, box[:2] * 2, scale * 2, strict=True)
    left, top, right, bottom = (round((edge - start) * one) for edge, start, one in ends)
    shown = Image.new(image.mode, size[::-1])
    inner = (max(1, right - left), max(1, bottom - top))
    shown.paste(image.resize(inner, Image.Resampling.BILINEAR, box=part), (left, top))
    return shown


def as_input(seen: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Return what the model sees, [C, H, W], normalised."""
    return preprocessing.normalization(transforms.functional.to_tensor(seen))


def read_mask(data: bytes, pixel_limit: int) -> NDArray[np.bool_]:
    """Return where a mask [height, width] is neither black nor transparent; raises RequestError."""
    image = _decoded(data, pixel_limit)
    if image.mode == "P" or image.has_transparency_data:
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    pixels = np.asarray(image)
    within: NDArray[np.bool_] = pixels.reshape(*pixels.shape[:2], -1).max(-1) > 0
    return within


def mask_seen(within: NDArray[np.bool_], preprocessing: Preprocessing, box: Box | None = None) -> NDArray[np.bool_]:
    """Return a mask [height, width] of an upright original as the model would see it, resized and cropped with it.

    Where preprocess.py does that, `box` is the part that it shows.
    """
    mask = Image.fromarray(255 * within.astype(np.uint8))
    if preprocessing.prepare is not None and box is not None:
        return np.asarray(_shown(mask, box, preprocessing.size)) > 127
    trimmed, _ = _trimmed(mask, preprocessing)
    return np.asarray(_seen(trimmed, preprocessing)[0]) > 127


def _decoded(data: bytes, pixel_limit: int) -> Image.Image:
    """Return the first frame, its pixels read; the size is checked before any pixel is."""
    if not data:
        raise bad_request('no image: send one as the body, as form field \'data\' or as JSON {"data": "<base64>"}')
    try:
        check_file(data, pixel_limit)
        image = Image.open(Upload(data), formats=FORMATS)
        check_image(image, data, pixel_limit)
        image.load()
    except (RequestError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise too_large("far larger", f"at most {pixel_limit} pixels") from None
    except Exception as error:  # a decoder fed with anything may raise anything
        raise bad_request(
            f"data: these {len(data)} bytes are not an image that can be decoded ({type(error).__name__}); "
            f"allowed: {', '.join(FORMATS)}{_hint(data)}"
        ) from None
    return image


def _hint(data: bytes) -> str:
    """Say what probably happened where the bytes look like the name of a file."""
    looks_like_a_name = len(data) < 300 and data.isascii() and data.decode(errors="replace").isprintable()
    return "; to send a file with curl: -F data=@FILE" if looks_like_a_name else ""


def _upright(image: Image.Image, mode: str) -> Image.Image:
    """Turn the image as its EXIF tag says, put it on white where it is transparent, and reduce it to 8 bits."""
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # turning copies an image that lies right already
            image = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:
        log.debug("a broken EXIF block tells no orientation, and spoils nothing else: %r", error)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
    if image.has_transparency_data and mode != "RGBA":
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and float greyscale to 8 bits by the range that its values show; transparent is white."""
    values = np.nan_to_num(np.array(image, dtype=np.float32), copy=False)  # in place from here: it may be large
    largest = values.max(initial=0)
    top = next((limit for limit in (1.0, 255.0, 65535.0) if largest <= limit and (limit > 1 or image.mode == "F")), largest)
    top = 65535.0 if image.mode.startswith("I;16") else top
    transparent = values == image.info.get("transparency")
    values.clip(0, top, out=values)
    values *= np.float32(255 / top)
    scaled = values.round(out=values).astype(np.uint8)
    scaled[transparent] = 255
    return Image.fromarray(scaled)


def _trimmed(image: Image.Image, preprocessing: Preprocessing) -> tuple[Image.Image, tuple[int, int]]:
    """Cut off the far ends of a very long image that the crop cannot see: enlarged whole, it would not fit into memory."""
    width, height = image.size
    if not isinstance(preprocessing.resize, int):
        return image, (0, 0)  # nothing grows with the length
    longest = max(ELONGATED, ceil(2 * max(preprocessing.size) / preprocessing.resize))
    kept = min(width, longest * height), min(height, longest * width)
    left, top = (width - kept[0]) // 2, (height - kept[1]) // 2
    if (left, top) == (0, 0):
        return image, (0, 0)
    return image.crop((left, top, left + kept[0], top + kept[1])), (left, top)


def _seen(image: Image.Image, preprocessing: Preprocessing) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """Resize and crop as torchvision does; return the result and the part of `image` that it shows."""
    resized = image
    if preprocessing.resize is not None:
        size = preprocessing.resize
        size = list(size) if isinstance(size, tuple) else size  # type: ignore[assignment]
        resize = transforms.Resize(size, preprocessing.interpolation_mode)
        # Pillow would lose colours where alpha is small.
        resized = Image.merge("RGBA", [resize(band) for band in image.split()]) if image.mode == "RGBA" else resize(image)
    height, width = preprocessing.size
    seen = transforms.CenterCrop((height, width))(resized)
    left, top = ((whole - part) / 2 for whole, part in zip(resized.size, (width, height), strict=True))
    x, y = (before / after for before, after in zip(image.size, resized.size, strict=True))
    return seen, (left * x, top * y, (left + width) * x, (top + height) * y)
