"""Small files that decode to far more than they show are refused, with little memory, before a decoder believes them."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib

import pytest
from conftest import ROOT
from PIL import Image

from torchserve_explain.errors import RequestError
from torchserve_explain.serving.bombs import BLOCKS, PIECES
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.settings import Preprocessing

PIXELS = 1_000_000
MEGABYTES = 300  # that reading any of these may take
SMALL = Preprocessing(resize=16, crop=16)
READ = f"""
import json, resource, sys
from torchserve_explain.errors import RequestError
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.settings import Preprocessing

answers = {{}}
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {MEGABYTES} * 2**20,) * 2)
for path in sys.argv[1:]:
    data = open(path, "rb").read()
    try:
        read_picture(data, Preprocessing(resize=16, crop=16), {PIXELS})
        answers[path] = [200, ""]
    except RequestError as error:
        answers[path] = [error.status.value, str(error)]
    except MemoryError:
        answers[path] = [503, "out of memory"]
print(json.dumps(answers))
"""


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def small(kind, **options):
    return encoded(Image.new("RGB", (16, 16), "red"), kind, **options)


# TIFF

LONG, SHORT, BYTE, UNDEFINED = 4, 3, 1, 7


def tiff(tags, data, order="<"):
    """A TIFF of tags (tag, type, values) in their order; longer values and the data, whose offset is 8, stand in between."""
    sizes = {LONG: "I", SHORT: "H", BYTE: "B", UNDEFINED: "B"}
    body, entries = bytes(data), b""
    for tag, kind, values in tags:
        stored = values if isinstance(values, bytes) else struct.pack(f"{order}{len(values)}{sizes[kind]}", *values)
        if len(stored) > 4:
            stored, body = struct.pack(order + "I", 8 + len(body)), body + stored
        entries += struct.pack(order + "HHI", tag, kind, len(values)) + stored.ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8 + len(body))
    return head + body + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def grey(width, height, compression=1):
    return [
        (256, LONG, [width]),
        (257, LONG, [height]),
        (258, SHORT, [8]),
        (259, SHORT, [compression]),
        (262, SHORT, [1]),
        (277, SHORT, [1]),
    ]


DEFLATED = zlib.compress(bytes(256))


def tiled(*sides, width=16, height=16, order="<"):
    """A TIFF with one compressed tile, or more, of which tags 322 and 323 say the sides."""
    tiles = [(322 + index % 2, LONG, [side]) for index, side in enumerate(sides)]
    return tiff([*grey(width, height, 8), *tiles, (324, LONG, [8]), (325, LONG, [len(DEFLATED)])], DEFLATED, order)


def stripped(offsets, rows, width=16, height=16):
    """An uncompressed TIFF with strips at offsets."""
    pixels = bytes(width * height)
    counts = [(279, LONG, [width * rows])]
    return tiff([*grey(width, height), (273, LONG, offsets), (278, LONG, [rows]), *counts], pixels)


def big_tiff(tile_width, tile_height):
    """A TIFF with offsets of 64 bits."""
    tags = [(tag, kind, values[0]) for tag, kind, values in grey(16, 16, 8)]
    tags += [(322, 16, tile_width), (323, 16, tile_height), (324, 16, 16), (325, 16, len(DEFLATED))]
    entries = b"".join(struct.pack("<HHQQ", tag, kind, 1, value) for tag, kind, value in tags)
    start = 16 + len(DEFLATED)
    return b"II+\0\x08\0\0\0" + struct.pack("<Q", start) + DEFLATED + struct.pack("<Q", len(tags)) + entries + bytes(8)


# JPEG, PNG, WEBP, GIF


def jpeg_with(segments):
    data = small("JPEG")
    return data[:2] + segments + data[2:]


def chunk(name, content=b""):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_with(chunks):
    data = small("PNG")
    return data[:33] + chunks + data[33:]


def exif_segment(size):
    return b"\xff\xe1" + struct.pack(">H", size + 8) + b"Exif\0\0" + bytes(size)


def progressive_mpo():
    """Two JPEGs in one file, the first of thousands of scans: Pillow calls it an MPO."""
    frames = [Image.new("L", (900, 900), shade) for shade in (100, 200)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:], progressive=True)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    end = data.index(b"\xff\xd9")
    scan = data[data.rindex(b"\xff\xda", 0, end) : end]
    return data[:end] + scan * 30_000 + data[end:]


def webp(width, height, kind):
    """A WEBP that claims a canvas, with a picture of 16 x 16 on it."""
    if kind == b"VP8L":
        head = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(20)
        return b"RIFF" + struct.pack("<I", 4 + 8 + len(head)) + b"WEBPVP8L" + struct.pack("<I", len(head)) + head
    if kind == b"VP8 ":
        data = bytearray(small("WEBP"))
        data[26:30] = struct.pack("<HH", width, height)
        return bytes(data)
    frame = small("WEBP")[12:]
    head = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(head)) + head + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif(width, height):
    """A GIF of 16 x 16 whose first frame is larger, and is to be wiped off afterwards."""
    wipe = b"!\xf9\x04" + bytes([2 << 2, 0, 0, 0]) + b"\0"
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\0"
    return b"GIF89a" + struct.pack("<HHBBB", 16, 16, 0, 0, 0) + wipe + frame + b";"


BOMBS = {
    "a tile of gigabytes": lambda: tiled(26752, 26752),
    "a tile of gigabytes, big-endian": lambda: tiled(26752, 26752, order=">"),
    "a tile of gigabytes in a BigTIFF": lambda: big_tiff(26752, 26752),
    "a second, larger tile": lambda: tiled(16, 16, 26752, 26752),
    "a first, larger tile": lambda: tiled(26752, 26752, 16, 16),
    "tiles far wider than the image": lambda: tiled(2_000, 1, width=1, height=900_000),
    "a tile as high as the limit": lambda: tiled(16, PIXELS),
    "strips without end": lambda: stripped([8] * 4_000_000, 1),
    "strips that show the image again": lambda: stripped([8] * 200_000, 500, 1000, 999),
    "a million comments": lambda: jpeg_with(b"\xff\xfe\0\x02" * 4_000_000),
    "a thousand EXIF segments": lambda: jpeg_with(exif_segment(10) * 1000),
    "a hundred colour profiles": lambda: png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**6))) * 100),
    "a hundred broken texts": lambda: png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6))[:-1]) * 100),
    "a million private chunks": lambda: png_with(chunk(b"prVt") * 1_500_000),
    "scans in one of two pictures": progressive_mpo,
    "a canvas (VP8X)": lambda: webp(13_000, 13_000, b"VP8X"),
    "a canvas (VP8L)": lambda: webp(13_000, 13_000, b"VP8L"),
    "a canvas (VP8)": lambda: webp(13_000, 13_000, b"VP8 "),
    "a frame larger than the canvas": lambda: gif(13_000, 13_000),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What a process with little memory answers to each bomb: status and message."""
    folder = tmp_path_factory.mktemp("bombs")
    paths = {name: folder / str(index) for index, name in enumerate(BOMBS)}
    for name, path in paths.items():
        path.write_bytes(BOMBS[name]())
    command = [sys.executable, "-c", READ, *map(str, paths.values())]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "handlers")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    return {name: told[str(path)] for name, path in paths.items()}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_with_little_memory(answers, name):
    status, message = answers[name]
    assert (status, message.startswith("data: the image is ")) == (413, True), message
    assert "; allowed: at most " in message and len(message) < 200


def read(data, limit=PIXELS):
    return read_picture(data, SMALL, limit)


@pytest.mark.parametrize(
    "data",
    [
        tiled(16, 16),
        tiled(16, 16, order=">"),
        tiled(512, 512),
        tiled(16, PIXELS // 16),
        big_tiff(16, 16),
        stripped([8], 16),
        stripped([8] * 16, 1),
        jpeg_with(b"\xff\xfe\0\x02" * 1000),
        jpeg_with(exif_segment(60_000) * BLOCKS),
        png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**6)))),
        png_with(chunk(b"prVt") * 1000),
        webp(1000, 1000, b"VP8X"),
        gif(1000, 1000),
    ],
)
def test_what_is_no_bomb_is_read_or_found_broken(data):
    """The same files with ordinary sizes pass the checks, even where their few bytes are no whole picture."""
    try:
        read(data)
    except RequestError as error:
        assert error.status == 400, str(error)


@pytest.mark.parametrize("data", [tiled(16, 16), tiled(16, 16, order=">"), big_tiff(16, 16), stripped([8] * 16, 1)])
def test_these_hand_made_tiffs_are_pictures(data):
    assert read(data).seen.getcolors() == [(256, (0, 0, 0))]


def test_a_tiffs_tile_is_named():
    with pytest.raises(
        RequestError, match=r"^data: the image is 16x16 in tiles of 26752x26752; allowed: at most 1000000 pixels$"
    ):
        read(tiled(26752, 26752))


@pytest.mark.parametrize(
    "data", [b"II*\0", b"MM\0*\0\0\0\x08", b"II*\0\xff\xff\xff\xff", b"II+\0" + bytes(20), b"MM\0+" + bytes(99)]
)
def test_a_tiff_of_a_header_alone_is_no_image(data):
    with pytest.raises(RequestError, match="not an image") as caught:
        read(data)
    assert caught.value.status == 400


@pytest.mark.parametrize("data", [b"MMMM" + b"\xff" * 5000, b"RIFF\0\0\0\0WAVE" + b"\xff" * 5000])
def test_what_is_neither_a_tiff_nor_a_webp_is_no_bomb(data):
    with pytest.raises(RequestError, match="not an image") as caught:
        read(data)
    assert caught.value.status == 400


def test_an_exif_block_that_takes_all_memory_is_not_passed_by(monkeypatch):
    def exhausted(self):
        raise MemoryError

    data = small("PNG")
    monkeypatch.setattr(Image.Image, "getexif", exhausted)
    with pytest.raises(MemoryError):
        read(data)


def test_the_pieces_that_a_file_is_read_in_are_counted():
    """An ordinary photo of many megapixels needs a few hundred."""
    assert read(jpeg_with(b"\xff\xfe\0\x02" * (PIECES // 4))).width == 16
    with pytest.raises(RequestError, match=r"in very many pieces; allowed: at most 200000$"):
        read(jpeg_with(b"\xff\xfe\0\x02" * PIECES))
