"""Woven textile with no, a local or a global defect: 2,000 simulated images that the package conformal-clip-data ships."""

from training.recipe import Part, Recipe

RECIPE = Recipe(
    backbones=("lite0", "resnet34"),
    part=Part.LAST_STAGE,
    first={"lite0": "features.7", "resnet34": "layer3"},  # later ones have forgotten threads
    size=256,  # the images have 250 pixels, a local defect 10 to 20
    learning_rate=5e-4,
    epochs=6,
    method="biased_layer",  # of the ways in experiments/textile.py the one with most of its map at the defect
    patience=5,
)
