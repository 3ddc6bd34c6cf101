"""Decompression bombs: files that make a decoder do or hold far more than they show, refused by what they say of themselves."""

import io
import struct
from http import HTTPStatus
from math import ceil

from PIL import Image

from torchserve_explain.errors import RequestError

SCANS = 20  # each scan of a progressive JPEG goes over all pixels again; a few bytes can hold thousands of them
PIECES = 200_000  # a decoder's header loop takes a microsecond and a hundred bytes for each piece of the file
BLOCKS = 64  # each may be a megabyte once decompressed, or be copied together with all before it
WIDTH, HEIGHT, STRIP_OFFSETS, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS = 256, 257, 273, 322, 323, 324  # TIFF's tags
INTEGERS = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 13: 4, 16: 8, 17: 8, 18: 8}  # bytes of TIFF's types of whole numbers
BYTES = (1, 2, 7)  # TIFF's types that stay bytes when they are read


class Upload(io.BytesIO):
    """An upload as a file; raises RequestError 413 where a decoder reads it in more than PIECES pieces."""

    pieces = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most `size` bytes."""
        self.pieces += 1
        if self.pieces > PIECES:
            raise too_large("in very many pieces", f"at most {PIECES}")
        return super().read(size)


def too_large(size: str, allowed: str) -> RequestError:
    """The image has more to decode than the archive allows."""
    return RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"data: the image is {size}; allowed: {allowed}")


def check_file(data: bytes, pixel_limit: int) -> None:
    """Check what a decoder would believe already when it opens the file.

    Raises RequestError 413, or struct.error where a TIFF is broken.
    """
    if data[:2] in (b"II", b"MM") and data[2:4] in (b"*\0", b"\0*", b"+\0", b"\0+"):
        _check_tiff(data, pixel_limit)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        _check_canvas(data, pixel_limit)
    blocks = {b"\xff\xd8": [b"Exif\0\0"], b"\x89P": [b"iCCP", b"zTXt", b"iTXt"]}.get(data[:2], [])
    if (count := sum(map(data.count, blocks))) > BLOCKS:
        raise too_large(f"with {count} blocks of metadata", f"at most {BLOCKS}")


def check_image(image: Image.Image, data: bytes, pixel_limit: int) -> None:
    """Check an opened image before its pixels are read; raises RequestError 413."""
    pixels, size = image.width * image.height, f"{image.width}x{image.height}"
    if pixels > pixel_limit:
        raise too_large(size, f"at most {pixel_limit} pixels")
    scans = data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 1
    if pixels * scans > SCANS * pixel_limit:
        raise too_large(f"{size} in {scans} scans", f"at most {SCANS * pixel_limit} pixels in all scans")
    parts = [(right - left) * (bottom - top) for _, (left, top, right, bottom), *_ in getattr(image, "tile", [])]
    if sum(parts) > SCANS * pixel_limit:
        raise too_large(f"{size} in {len(parts)} parts", f"at most {SCANS * pixel_limit} pixels in all parts")


def _check_tiff(data: bytes, pixel_limit: int) -> None:
    """Check the tags of the first image: a tile is decoded whole however little of it the image shows.

    Of a tag that stands there twice decoders take one or the other, so the largest counts.
    """
    big = data[2:3] == b"+"
    if data.startswith(b"MM\0+"):
        raise ValueError("a big-endian BigTIFF, which one half of the decoder takes for a TIFF")
    order, name = (">", "big") if data.startswith(b"MM") else ("<", "little")
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
    start, entry = start + (8 if big else 2), struct.Struct(order + ("HHQ8s" if big else "HHI4s"))
    known = dict.fromkeys((WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT), 1)
    for index in range(min(count, PIECES, (len(data) - start) // entry.size)):
        tag, kind, length, field = entry.unpack_from(data, start + index * entry.size)
        if length > PIECES and (kind not in BYTES or tag in (STRIP_OFFSETS, TILE_OFFSETS)):
            raise too_large(f"a TIFF with {length} values in tag {tag}", f"at most {PIECES}")
        if tag in known and kind in INTEGERS:
            known[tag] = max(known[tag], int.from_bytes(field[: INTEGERS[kind]], name))  # type: ignore[arg-type]
    width, height, tile_width, tile_height = known.values()
    decoded = ceil(width / tile_width) * tile_width * ceil(height / tile_height) * tile_height
    if width * height <= pixel_limit < decoded:
        raise too_large(f"{width}x{height} in tiles of {tile_width}x{tile_height}", f"at most {pixel_limit} pixels")


def _check_canvas(data: bytes, pixel_limit: int) -> None:
    """Check a WEBP's canvas, for which its decoder takes memory when it opens the file."""
    if data[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + bits % 2**14, 1 + (bits >> 14) % 2**14
    else:
        width, height = (int.from_bytes(data[at : at + 2], "little") % 2**14 for at in (26, 28))
    if width * height > pixel_limit:
        raise too_large(f"{width}x{height}", f"at most {pixel_limit} pixels")
