"""The page of a comparison: what changed, which limits are kept, and the pictures whose maps moved most."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from torchserve_explain.gallery.comparison import (
    Compared,
    Threshold,
    accuracies,
    changed_share,
    changes,
    most_moved,
    quantile,
)
from torchserve_explain.gallery.pages import PICTURES
from torchserve_explain.records import in_one_step

COMPARISON = "comparison.json"
SHOWN = 24  # pictures of each map that moved most
CHANGED = 200  # pictures with another prediction, at most
MEASURES = {"rank_correlation": 0.1, "cosine": 0.1, "moved_mass": 0.9}  # and the quantile of the worst tenth


def write_page(
    out: Path,
    archives: Sequence[Mapping[str, str]],
    pictures: Sequence[Compared],
    found: Sequence[Threshold],
    skipped: Mapping[str, str],
) -> Path:
    """Write the page beside the folders old/ and new/ that hold the maps; return its path."""
    maps = list(pictures[0].maps)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.undefined = jinja2.StrictUndefined
    table = {
        name: {measure: (quantile(pictures, name, measure, 0.5), quantile(pictures, name, measure, worst))
               for measure, worst in MEASURES.items()}
        for name in maps
    }  # fmt: skip
    html = environment.get_template("comparison.html").render(
        archives=archives, pictures=pictures, thresholds=found, skipped=skipped, maps=maps, table=table, folder=PICTURES,
        accuracy=accuracies(pictures), changed=changed_share(pictures), changes=changes(pictures),
        other=sorted((one for one in pictures if one.changed), key=_gravest)[:CHANGED],
        moved={name: most_moved(pictures, name, SHOWN) for name in maps},
    )  # fmt: skip
    with in_one_step(out / "index.html") as unfinished:
        unfinished.write_text(html, encoding="utf-8")
    return out / "index.html"


def _gravest(one: Compared) -> tuple[int, float, str]:
    """Order: what the new version made wrong first, then what is neither right, then what it made right; surest first."""
    return (0 if one.broken else 2 if one.fixed else 1, -one.new.probability, one.path)
