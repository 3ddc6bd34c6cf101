"""Woven textile with no, a local or a global defect: 2,000 simulated images that the package conformal-clip-data ships."""

from training.recipe import Part, Recipe

RECIPE = Recipe(
    backbones=("lite0", "resnet34"),
    part=Part.LAST_STAGE,
    size=256,  # the images have 250 pixels, a local defect 10 to 20
    epochs=15,
    patience=5,
)
