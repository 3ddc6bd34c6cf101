"""Report 1, vegetables: a carrot explained three ways, then what its authors wanted: all classes, mistakes, containers.

experiments/vegetables.json outlines by hand, in a square of 256, the vegetable and what is no vegetable (the hand that
holds it, the price's label, the container) on 29 of the test pictures.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from experiments.charts import save_confusion, save_curves
from experiments.output import arguments, carried_out, heatmap, overlaid, save_sheet, write
from experiments.regions import share
from experiments.segmentation import Mask, Pixels, without
from experiments.trained import Row, Trained, accuracies, train
from torchserve_explain.attribution.methods import Method, Smoothing
from torchserve_explain.attribution.methods.biased_layer import BiasedLayer
from torchserve_explain.attribution.methods.cam import GradCam
from torchserve_explain.attribution.methods.expected_gradients import GradientShap
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.methods.smoothing import SmoothingKind
from torchserve_explain.attribution.rows import Score
from torchserve_explain.gallery.pages import mean_map
from training.data import Sample, read_folder
from training.recipe import read_recipe

OUTLINES = Path(__file__).with_suffix(".json")
CANVAS = 256  # the square that the outlines are drawn in
CARROT = "Carrots/test_Carrots_001.jpg"  # lies in a crate, among other vegetables
THREE: dict[str, tuple[Method, Smoothing | None]] = {
    "integrated_gradients": (IntegratedGradients(), None),
    "IG smoothgrad_sq, 4": (IntegratedGradients(), Smoothing(SmoothingKind.SMOOTHGRAD_SQ, 4)),
    "gradient_shap": (GradientShap(), None),
}
ALL: dict[str, Method] = {
    "grad_cam": GradCam(),
    "integrated_gradients": IntegratedGradients(),
    "biased_layer": BiasedLayer(),
}
ELSEWHERE = {  # ImageNet's names of classes that are sold here too
    "cucumber": "Cucumber",
    "zucchini": "Zucchini",
    "head_cabbage": "Cabbage",
    "mushroom": "Mushroom",
    "bell_pepper": "Pepper",
}
MISTAKES = 8  # that are drawn


def main() -> None:
    """Run the experiment that the command line asks for."""
    options = arguments("vegetables", __doc__, _more)
    epochs = ("--epochs", str(options.epochs))
    tuned = train("vegetables", options.data, options.out / "tuned", "--backbone", options.backbone, *epochs)
    small = ("--backbone", "cnn", "--size", "64", "--epochs", str(options.cnn_epochs), "--learning-rate", "1e-3")
    cnn = train("vegetables", options.data, options.out / "cnn", *small)
    samples = read_folder(options.data, tuned.preprocessing, read_recipe("vegetables")[0].ratio, tuned.metrics["seed"]).splits
    images = [tuned.pixels(sample.path) for sample in samples["test"]]
    pictures = options.out / "pictures"
    figures: dict[str, Any] = {name: one.metrics["test"] for name, one in (("tuned", tuned), ("cnn", cnn))}
    tables: dict[str, list[Row]] = {"accuracy": accuracies({"tuned": tuned, "cnn at 64 x 64": cnn})}
    carrots = [surest(tuned, samples["test"], images, "Carrots"), options.data / "test" / CARROT]
    tables["carrots"] = explain_carrots(tuned, carrots, pictures)
    outlined = list(read_outlines(options.data / "test", tuned))
    tables["where the maps lie on outlined pictures"] = where_maps_lie(tuned, outlined)
    tables["outlined pictures with a part taken out"] = taken_out(tuned, outlined)
    draw_outlined(tuned, outlined, pictures)
    tables["mistakes"] = draw_mistakes(tuned, samples["test"], images, pictures)
    save_curves(pictures / "curves.png", {"tuned": tuned.metrics, "cnn": cnn.metrics})
    save_confusion(pictures / "confusion.png", tuned.metrics)
    draw_means(tuned, samples["test"], images, pictures)
    if options.photos is not None:
        tables["photos from elsewhere"] = elsewhere(tuned, options.photos, pictures)
    write(options.out, figures, tables)


def _more(command: argparse.ArgumentParser) -> None:
    command.add_argument("--epochs", type=int, default=10, help="of the pretrained network (default: %(default)s)")
    command.add_argument("--cnn-epochs", type=int, default=15, help="of the CNN from nothing (default: %(default)s)")
    command.add_argument("--photos", type=Path, help="a folder of ImageNet photos called WNID_class_name.JPEG")


def explain_carrots(trained: Trained, paths: Sequence[Path], out: Path) -> list[Row]:
    """Explain carrots' probability three ways, as the report did, and by two that it wanted; return the probabilities."""
    target = trained.classes.index("Carrots")
    cells = []
    rows: list[Row] = []
    for path in paths:
        pixels = trained.pixels(path)
        probability = float(trained.logits([pixels])[0].softmax(0)[target])
        rows.append({"picture": path.name, "probability": probability})
        cells.append((Image.fromarray(pixels), "Carrots", f"probability {probability:.3f}"))
        for name, (method, smoothing) in THREE.items():
            (values,) = trained.maps([pixels], [target], method, smoothing, Score.PROBABILITY)
            cells.append((overlaid(pixels, values), name, "of the softmax probability"))
        for name in ("grad_cam", "biased_layer"):
            (values,) = trained.maps([pixels], [target], ALL[name])
            cells.append((overlaid(pixels, values), name, "of the logit"))
    save_sheet(out / "carrots.webp", cells, 160, 6)
    return rows


def surest(trained: Trained, samples: Sequence[Sample], images: Sequence[Pixels], label: str) -> Path:
    """Return the picture of a class that the classifier is surest of."""
    own = [place for place, sample in enumerate(samples) if sample.label == trained.classes.index(label)]
    probabilities = trained.logits([images[place] for place in own]).softmax(1)[:, trained.classes.index(label)]
    return samples[own[int(probabilities.argmax())]].path


Outlined = tuple[str, Pixels, int, dict[str, Mask]]  # its name, what the classifier sees, its class, its parts


def read_outlines(folder: Path, trained: Trained) -> Iterator[Outlined]:
    """Yield the outlined pictures that a folder holds; no other part covers the vegetable, and the rest is a part too."""
    for name, parts in json.loads(OUTLINES.read_text(encoding="utf-8")).items():
        if not (folder / name).exists():
            continue
        pixels = trained.pixels(folder / name)
        masks = {part: drawn(polygons, pixels.shape[0]) for part, polygons in parts.items()}
        for part in masks.keys() - {"vegetable"}:
            masks[part] &= ~masks["vegetable"]
        masks["anything else"] = ~np.logical_or.reduce(list(masks.values()))
        yield name, pixels, trained.classes.index(name.split("/")[0]), masks


def drawn(polygons: Sequence[Sequence[Sequence[int]]], side: int) -> Mask:
    """Return a mask [side, side] of polygons in a square of CANVAS."""
    canvas = Image.new("1", (CANVAS, CANVAS))
    pen = ImageDraw.Draw(canvas)
    for polygon in polygons:
        pen.polygon([(x, y) for x, y in polygon], fill=1)
    return np.array(canvas.resize((side, side)))


def where_maps_lie(trained: Trained, outlined: Sequence[Outlined]) -> list[Row]:
    """Return the mean share of each method's maps in each part, over the pictures that have it, and that part's area."""
    images, targets = [one[1] for one in outlined], [one[2] for one in outlined]
    rows: list[Row] = []
    for method, how in ALL.items():
        score = Score.PROBABILITY if how.explains_probability and method == "integrated_gradients" else Score.LOGIT
        maps = trained.maps(images, targets, how, None, score)
        for part in ("vegetable", "hand", "label", "container", "anything else"):
            shares = [share(values, one[3][part]) for values, one in zip(maps, outlined, strict=True) if part in one[3]]
            if shares:
                mass, area = (float(np.mean([getattr(one, key) for one in shares])) for key in ("mass", "area"))
                row: Row = {"method": method, "part": part, "pictures": len(shares), "share": mass}
                rows.append(row | {"area": area, "times chance": mass / area})
    return rows


def taken_out(trained: Trained, outlined: Sequence[Outlined]) -> list[Row]:
    """Classify the pictures that have a part, and the same with it taken out."""
    rows: list[Row] = []
    for part in ("vegetable", "hand", "label", "container"):
        having = [one for one in outlined if part in one[3]]
        if not having:
            continue
        row: Row = {"taken out": part, "pictures": len(having)}
        versions = {"as they are": [one[1] for one in having], "without": [without(one[1], one[3][part]) for one in having]}
        truth = torch.tensor([one[2] for one in having])
        for version, images in versions.items():
            probabilities = trained.logits(images).softmax(1)
            row[f"accuracy {version}"] = float((probabilities.argmax(1) == truth).float().mean())
            row[f"probability {version}"] = float(probabilities.gather(1, truth[:, None]).mean())
        rows.append(row)
    return rows


def draw_outlined(trained: Trained, outlined: Sequence[Outlined], out: Path) -> None:
    """Draw the pictures with a hand, and Grad-CAM's maps of their class and of what they are taken for."""
    hands = [one for one in outlined if "hand" in one[3]]
    images = [one[1] for one in hands]
    probabilities = trained.logits(images).softmax(1)
    maps = trained.maps(images, probabilities.argmax(1).tolist(), ALL["grad_cam"])
    cells = []
    for (_, pixels, label, _), values, own in zip(hands, maps, probabilities, strict=True):
        taken = f"{trained.classes[int(own.argmax())]} {float(own.max()):.2f}"
        cells.append((overlaid(pixels, values), f"is {trained.classes[label]}", f"taken for {taken}"))
    save_sheet(out / "hands.webp", cells, 150, 6)


def draw_mistakes(trained: Trained, samples: Sequence[Sample], images: Sequence[Pixels], out: Path) -> list[Row]:
    """Draw the surest mistakes with the maps of both classes; return what is taken for what, and how often."""
    probabilities = trained.logits(images).softmax(1)
    predicted, truth = probabilities.argmax(1).tolist(), [sample.label for sample in samples]
    wrong = [place for place, (one, own) in enumerate(zip(predicted, truth, strict=True)) if one != own]
    wrong.sort(key=lambda place: -float(probabilities[place].max()))
    cells = []
    for place in wrong[:MISTAKES]:
        pixels = images[place]
        maps = trained.maps([pixels] * 2, [predicted[place], truth[place]], ALL["grad_cam"])
        sure = f"{float(probabilities[place].max()):.2f}"
        cells.append((Image.fromarray(pixels), f"is {trained.classes[truth[place]]}", f"test picture {place}"))
        for values, target, why in zip(
            maps, (predicted[place], truth[place]), (f"taken for it, {sure}", "what it is"), strict=True
        ):
            cells.append((overlaid(pixels, values), f"why {trained.classes[target]}", why))
    save_sheet(out / "mistakes.webp", cells, 150, 6)
    pairs = [(trained.classes[truth[place]], trained.classes[predicted[place]]) for place in wrong]
    order = sorted(set(pairs), key=lambda pair: -pairs.count(pair))
    return [{"is": own, "taken for": other, "pictures": pairs.count((own, other))} for own, other in order]


def draw_means(trained: Trained, samples: Sequence[Sample], images: Sequence[Pixels], out: Path) -> None:
    """Draw each class's mean map by Grad-CAM over its test pictures."""
    labels = [sample.label for sample in samples]
    maps = trained.maps(images, labels, ALL["grad_cam"])
    cells = []
    for label, name in enumerate(trained.classes):
        own = [values for values, one in zip(maps, labels, strict=True) if one == label]
        mean = mean_map(own)
        if mean is not None:
            cells.append((heatmap(mean), name, f"mean of {len(own)}"))
    save_sheet(out / "means.webp", cells, 120, 5)


def elsewhere(trained: Trained, photos: Path, out: Path) -> list[Row]:
    """Classify and explain photos of the same vegetables that were taken elsewhere."""
    rows: list[Row] = []
    cells = []
    for path in sorted(photos.iterdir()):
        label = ELSEWHERE.get(path.stem.partition("_")[2])
        if label is None or label not in trained.classes:
            continue
        pixels = trained.pixels(path)
        probabilities = trained.logits([pixels])[0].softmax(0)
        best = int(probabilities.argmax())
        own = float(probabilities[trained.classes.index(label)])
        rows.append(
            {"is": label, "taken for": trained.classes[best], "probability": float(probabilities[best]), "of its own": own}
        )
        (values,) = trained.maps([pixels], [best], ALL["grad_cam"])
        cells.append((overlaid(pixels, values), f"is {label}", f"taken for {trained.classes[best]}"))
    save_sheet(out / "elsewhere.webp", cells, 160, 5)
    return rows


if __name__ == "__main__":
    sys.exit(carried_out(main))
