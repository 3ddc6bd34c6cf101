"""Uploaded bytes become what the model sees, the way a person expects of their picture."""

import logging
from dataclasses import dataclass
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision import transforms

from torchserve_explain.errors import RequestError
from torchserve_explain.serving.bombs import Upload, check_file, check_image, too_large
from torchserve_explain.serving.errors import bad_request
from torchserve_explain.serving.settings import Preprocessing

log = logging.getLogger(__name__)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # decoders that run no code of the file's
ELONGATED = 8  # times longer than wide


@dataclass(frozen=True)
class Picture:
    """An upload as the model sees it: `input` [C, H, W] normalised, and `seen`, the same as a picture.

    `crop` is the part of the upright original (`width` x `height`) that is seen: left, top, right, bottom.
    """

    input: Tensor
    seen: Image.Image
    width: int
    height: int
    crop: tuple[int, int, int, int]


def read_picture(data: bytes, preprocessing: Preprocessing, pixel_limit: int) -> Picture:
    """Decode and prepare an upload; raises RequestError 400 (not an image) or 413 (too many pixels)."""
    image = _upright(_decoded(data, pixel_limit), "L" if len(preprocessing.mean) == 1 else "RGB")
    width, height = image.size
    trimmed, (x, y) = _trimmed(image, preprocessing)
    seen, (left, top, right, bottom) = _seen(trimmed, preprocessing)
    # Outwards to whole pixels, and where a small image was padded no further than the image.
    crop = (max(0, floor(left + x)), max(0, floor(top + y)), min(width, ceil(right + x)), min(height, ceil(bottom + y)))
    return Picture(as_input(seen, preprocessing), seen, width, height, crop)


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


def mask_seen(within: NDArray[np.bool_], preprocessing: Preprocessing) -> NDArray[np.bool_]:
    """Return a mask [height, width] of an upright original as the model would see it, resized and cropped with it."""
    trimmed, _ = _trimmed(Image.fromarray(255 * within.astype(np.uint8)), preprocessing)
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
    if image.has_transparency_data:
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
        resized = transforms.Resize(size, preprocessing.interpolation_mode)(image)
    height, width = preprocessing.size
    seen = transforms.CenterCrop((height, width))(resized)
    left, top = ((whole - part) / 2 for whole, part in zip(resized.size, (width, height), strict=True))
    x, y = (before / after for before, after in zip(image.size, resized.size, strict=True))
    return seen, (left * x, top * y, (left + width) * x, (top + height) * y)
