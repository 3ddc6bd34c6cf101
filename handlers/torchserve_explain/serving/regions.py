"""What a map is laid over: what the model saw, or the whole upload with the rest of it marked."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from PIL import Image, ImageDraw

from torchserve_explain.serving.images import Picture
from torchserve_explain.serving.pictures import INK, Map

# Pixels of the pictures of whole uploads that share an answer; larger ones are reduced, or no answer could hold them.
LARGEST = 2_500_000
SMALLEST = 50_000  # as many as a picture of the crop has
UNSEEN = (96, 96, 104)  # of a heat map, where the model saw nothing
DIM = 0.35  # how bright the unseen part of an overlay is

Box = tuple[int, int, int, int]


class Region(StrEnum):
    """What a map is laid over: the part of the image that the model saw, or all of it."""

    CROP = "crop"
    IMAGE = "image"


@dataclass(frozen=True)
class Whole:
    """An upload as a picture, a map spread over it (zero where the model saw nothing), and the `seen` part of its pixels."""

    picture: Image.Image
    values: Map
    seen: Box

    @classmethod
    def of(cls, picture: Picture, values: Map, most: int = LARGEST) -> "Whole":
        """Lay a map [h, w] of what the model saw over the whole upload."""
        assert picture.whole is not None and picture.box is not None
        image = picture.whole(most)
        size, scale = image.size, (image.width / picture.width, image.height / picture.height)
        left, top, right, bottom = (round(edge * one) for edge, one in zip(picture.crop, scale * 2, strict=True))
        seen = left, top, max(right, left + 1), max(bottom, top + 1)
        x, y = picture.box[0], picture.box[1]
        across, down = (values.shape[1] / (picture.box[2] - x), values.shape[0] / (picture.box[3] - y))
        edges = [(one - start) * ratio for one, start, ratio in zip(picture.crop, (x, y) * 2, (across, down) * 2, strict=True)]
        part = (max(0, edges[0]), max(0, edges[1]), min(values.shape[1], edges[2]), min(values.shape[0], edges[3]))
        target = seen[2] - seen[0], seen[3] - seen[1]
        spread = np.zeros(size[::-1], dtype=np.float32)
        laid = Image.fromarray(values).resize(target, Image.Resampling.BILINEAR, box=part)
        spread[seen[1] : seen[3], seen[0] : seen[2]] = np.asarray(laid)[: size[1] - seen[1], : size[0] - seen[0]]
        return cls(image, spread, seen)

    def marked(self, drawn: Image.Image, overlay: bool) -> Image.Image:
        """Return a picture of the map with the part marked that the model did not see: dim in an overlay, else grey."""
        dim = self.picture.convert("L").point([round(DIM * value) for value in range(256)]).convert("RGB")
        marked = dim if overlay else Image.new("RGB", drawn.size, UNSEEN)
        marked.paste(drawn.convert("RGB").crop(self.seen), self.seen[:2])
        width = max(1, max(drawn.size) // 400)
        left, top, right, bottom = self.seen
        frame = (left - width, top - width, right + width - 1, bottom + width - 1)  # around what is seen, not on it
        ImageDraw.Draw(marked).rectangle(frame, outline=INK, width=width)
        return marked
