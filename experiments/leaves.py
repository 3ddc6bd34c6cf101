"""Report 5, leaves: the mean difference of features, its threshold and maps; does it see the disease, or what surrounds it?

Each test picture is changed (ground replaced, blurred, swapped; disease painted over; colours swapped; outline alone)
and classified again. The same is done for a classifier that has learnt on leaves cut out by segmentation.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

from experiments.backgrounds import Change, Scene, changes, flat, pasted
from experiments.charts import save_chart
from experiments.output import arguments, carried_out, heatmap, overlaid, save_sheet, write
from experiments.regions import edge, mean_shares, share
from experiments.segmentation import Mask, leaf, lesions
from experiments.trained import Row, Trained, train
from torchserve_explain.attribution.methods.biased_layer import BiasedLayer
from torchserve_explain.attribution.methods.gradient import Sensitivity
from torchserve_explain.gallery.pages import mean_map
from torchserve_explain.serving.pictures import Map
from training.data import SPLITS, Sample, read_folder
from training.recipe import read_recipe

METHODS = {"sensitivity": Sensitivity(), "biased_layer": BiasedLayer()}
EDGE = 4  # pixels on both sides of a leaf's outline
SHOWN = 3  # pictures of each class that are drawn


def main() -> None:
    """Run the experiment that the command line asks for."""
    options = arguments("leaves", __doc__)
    plain = train("leaves", options.data, options.out / "as-photographed", "--backbone", options.backbone)
    splits = _splits(options.data, plain)
    ground, surface = _mean_colours([scene for _, scene in splits["train"][::5]])
    _write_cut_out(options.out / "cut-out-images", splits, plain.classes, ground)
    cut = train("leaves", options.out / "cut-out-images", options.out / "cut-out", "--backbone", options.backbone)
    test = splits["test"]
    figures: dict[str, Any] = {"pictures": len(test), "ground": ground, "surface": surface}
    tables: dict[str, list[Row]] = {}
    every = {"as photographed": plain, "cut out": cut}
    for name, trained in every.items():
        figures[name] = {key: trained.metrics[key] for key in ("test", "roc", "held_out_accuracy", "images")}
        own = test if trained is plain else [(label, _cut_out(scene, ground)) for label, scene in test]
        tables[f"changed pictures, trained {name}"] = changed_pictures(trained, own, changes(ground, surface))
        maps = {method: trained.maps([s.pixels for _, s in own], [1] * len(own), METHODS[method]) for method in METHODS}
        tables[f"where the maps lie, trained {name}"] = where_maps_lie(maps, own, trained.classes)
        _draw(options.out / "pictures" / name.replace(" ", "-"), maps, own, trained.classes)
    tables["mean difference"] = [difference(name, trained) for name, trained in every.items()]
    rocs = {name: trained.metrics["roc"]["test"] for name, trained in every.items()}
    lines = {f"trained {name}": (roc["false_positives"], roc["true_positives"]) for name, roc in rocs.items()}
    save_chart(options.out / "pictures" / "roc.png", {"true positives of Black rot, test": lines}, "false positives")
    write(options.out, figures, tables)


def difference(name: str, trained: Trained) -> Row:
    """Return what the mean difference is worth: its threshold, found on the validation images, and the areas under its ROC."""
    metrics = trained.metrics
    return {
        "trained": name,
        "images": "/".join(str(sum(metrics["images"][split])) for split in SPLITS),
        "threshold": metrics["roc"]["val"]["threshold"],
        "AUC, validation": metrics["roc"]["val"]["auc"],
        "AUC, test": metrics["roc"]["test"]["auc"],
        "accuracy, test": metrics["test"]["accuracy"],
        "accuracy, each fifth held out": metrics["held_out_accuracy"],
    }


def _splits(data: Path, trained: Trained) -> dict[str, list[tuple[int, Scene]]]:
    """Return the label and the scene of every picture of each split."""
    ratio, seed = read_recipe("leaves")[0].ratio, trained.metrics["seed"]
    read = read_folder(data, trained.preprocessing, ratio, seed)

    def scene(sample: Sample) -> tuple[int, Scene]:
        pixels = trained.pixels(sample.path)
        found = leaf(pixels)
        return sample.label, Scene(pixels, found, lesions(pixels, found))

    return {split: [scene(sample) for sample in read.splits[split]] for split in SPLITS}


def _mean_colours(scenes: Sequence[Scene]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the mean colour of the ground and of the leaves."""

    def mean(parts: list[np.ndarray[Any, Any]]) -> tuple[int, int, int]:
        red, green, blue = np.concatenate(parts).mean(0).round().astype(int).tolist()
        return red, green, blue

    return mean([s.pixels[~s.leaf] for s in scenes]), mean([s.pixels[s.leaf] for s in scenes])


def _cut_out(scene: Scene, ground: tuple[int, int, int]) -> Scene:
    return Scene(pasted(scene, flat(scene, ground)), scene.leaf, scene.diseased)


def _write_cut_out(
    folder: Path, splits: Mapping[str, Sequence[tuple[int, Scene]]], classes: Sequence[str], ground: tuple[int, int, int]
) -> None:
    """Write the leaves on one ground, split as they were."""
    for split, scenes in splits.items():
        for number, (label, scene) in enumerate(scenes):
            path = folder / split / classes[label] / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(_cut_out(scene, ground).pixels).save(path)


def changed_pictures(trained: Trained, scenes: Sequence[tuple[int, Scene]], chosen: Mapping[str, Change]) -> list[Row]:
    """Classify the pictures after each change; each is paired with one of the other class."""
    labels = np.array([label for label, _ in scenes])
    others = [[scene for other, scene in scenes if other != label] for label in (0, 1)]
    rows: list[Row] = []
    gap = None
    for name, change in chosen.items():
        images = [change(s, others[label][place % len(others[label])]) for place, (label, s) in enumerate(scenes)]
        g = _g(trained.logits(images))
        means = [float(g[labels == label].mean()) for label in (0, 1)]
        gap = gap or means[1] - means[0]
        right = (g > 0) == (labels == 1)
        of_class = {f"right: {trained.classes[label]}": float(right[labels == label].mean()) for label in (0, 1)}
        middle = {f"g: {trained.classes[label]}": means[label] / gap for label in (0, 1)}
        rows.append(
            {"change": name, "accuracy": float(right.mean()), **of_class, "AUC": float(roc_auc_score(labels, g)), **middle}
        )
    return rows


def _g(logits: Tensor) -> np.ndarray[Any, Any]:
    """Return g less its threshold [n]."""
    g: np.ndarray[Any, Any] = logits[:, 1].numpy()
    return g


def where_maps_lie(maps: Mapping[str, Sequence[Map]], scenes: Sequence[tuple[int, Scene]], classes: Sequence[str]) -> list[Row]:
    """Return the share of each method's maps in each region, and how many times chance that is."""
    rows: list[Row] = []
    for method, values in maps.items():
        for label, name in enumerate(classes):
            found = [
                {region: share(one, mask) for region, mask in _regions(scene).items()}
                for one, (own, scene) in zip(values, scenes, strict=True)
                if own == label
            ]
            for region, mean in mean_shares(found).items():
                times = mean.mass / mean.area if mean.area else None
                rows.append(
                    {
                        "method": method,
                        "class": name,
                        "region": region,
                        "share": mean.mass,
                        "area": mean.area,
                        "times chance": times,
                    }
                )
    return rows


def _regions(scene: Scene) -> dict[str, Mask]:
    outline = edge(scene.leaf, EDGE)
    return {
        "diseased": scene.diseased,
        "leaf's edge": outline & ~scene.diseased,
        "inside the leaf": scene.leaf & ~outline & ~scene.diseased,
        "ground": ~scene.leaf & ~outline,
    }


def _draw(out: Path, maps: Mapping[str, Sequence[Map]], scenes: Sequence[tuple[int, Scene]], classes: Sequence[str]) -> None:
    """Draw the mean map of each class, and some pictures with their maps."""
    labels = [label for label, _ in scenes]
    cells, means = [], []
    for label, name in enumerate(classes):
        own = [place for place, one in enumerate(labels) if one == label]
        for method, values in maps.items():
            mean = mean_map(values[place] for place in own)
            if mean is not None:
                means.append((heatmap(mean), name, f"{method}, mean of {len(own)}"))
        for place in own[:SHOWN]:
            pixels = scenes[place][1].pixels
            cells.append((Image.fromarray(pixels), name, f"test picture {place}"))
            cells += [(overlaid(pixels, values[place]), name, method) for method, values in maps.items()]
    save_sheet(out / "means.webp", means, 160, 4)
    save_sheet(out / "examples.webp", cells, 160, 6)


if __name__ == "__main__":
    sys.exit(carried_out(main))
