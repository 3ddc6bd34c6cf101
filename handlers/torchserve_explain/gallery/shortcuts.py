"""Pictures of a class that are right for a different reason: their maps form a cluster of their own (SpRAy)."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.linalg import eigh, qr, svd
from scipy.ndimage import gaussian_filter

from torchserve_explain.serving.pictures import Map

SIDE = 16  # maps are compared at SIDE x SIDE
BLUR = 1.0  # of that grid, so that maps a pixel apart are alike
MOST = 5  # clusters of a class, at most
NEIGHBOURS = 5  # a map's own scale of distance is that to its neighbour of this rank
FEWEST = 5  # pictures of a cluster that is reported
APART = 0.35  # how much more alike a reported cluster's maps are to each other than to the rest of the class, in cosine
ALIKE = 0.9  # and how alike to each other: objects that merely lie about form looser clusters


@dataclass(frozen=True)
class Cluster:
    """Places of maps that are alike; mean cosine among themselves, and to the other maps of the class (NaN: there are none)."""

    places: list[int]
    within: float
    between: float

    def suspicious(self, count: int) -> bool:
        """Whether some of `count` pictures, but not all, are alike among themselves and unlike the rest."""
        some = FEWEST <= len(self.places) <= count - FEWEST
        return some and self.within >= ALIKE and self.within - self.between >= APART


def find_clusters(maps: Iterable[Map]) -> list[Cluster]:
    """Cluster a class's maps [H, W] spectrally, the smallest cluster first (arXiv:1902.10178, without its t-SNE).

    How many clusters there are is decided by the largest gap among the first eigenvalues of the normalised Laplacian.
    """
    cosines = _cosines(maps)
    if len(cosines) < 2 * FEWEST:
        return [_cluster(list(range(len(cosines))), cosines)]
    values, vectors = eigh(_laplacian(1 - cosines), subset_by_index=(0, MOST))
    count = 1 + int(np.argmax(np.diff(values)))
    labels = _assigned(vectors[:, :count])
    groups = [np.flatnonzero(labels == label).tolist() for label in range(count)]
    return sorted((_cluster(places, cosines) for places in groups if places), key=lambda one: len(one.places))


def _cosines(maps: Iterable[Map]) -> NDArray[np.float64]:
    """Return how alike the positive parts of maps are, 0 to 1, [n, n]."""
    flat = np.stack([gaussian_filter(_reduced(values), BLUR).ravel() for values in maps])
    unit = flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-30)
    cosines: NDArray[np.float64] = unit @ unit.T
    return cosines


def _reduced(values: Map) -> NDArray[np.float64]:
    """Return the positive part of a map at SIDE x SIDE."""
    positive = Image.fromarray(values.astype(np.float32).clip(min=0))
    return np.asarray(positive.resize((SIDE, SIDE), Image.Resampling.BOX), float)


def _laplacian(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the symmetric normalised Laplacian of distances [n, n], each scaled by its points' own neighbourhoods."""
    rank = min(NEIGHBOURS, len(distances) - 1)
    scale = np.sort(distances, 1)[:, rank].clip(min=1e-3)
    affinity = np.exp(-(distances**2) / (scale[:, None] * scale[None]))
    np.fill_diagonal(affinity, 0)
    degree = affinity.sum(1).clip(min=1e-12)
    laplacian: NDArray[np.float64] = np.eye(len(distances)) - affinity / np.sqrt(degree[:, None] * degree[None])
    return laplacian


def _assigned(vectors: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the cluster of each row of the first eigenvectors [n, k], by a pivoted QR: nothing is drawn (arXiv:1708.07481)."""
    *_, pivots = qr(vectors.T, mode="economic", pivoting=True)
    left, _, right = svd(vectors[pivots[: vectors.shape[1]]].T)
    labels: NDArray[np.int64] = np.abs(vectors @ (left @ right)).argmax(1)
    return labels


def _cluster(places: list[int], cosines: NDArray[np.float64]) -> Cluster:
    others = [place for place in range(len(cosines)) if place not in set(places)]
    own = cosines[np.ix_(places, places)]
    within = float(own[~np.eye(len(places), dtype=bool)].mean()) if len(places) > 1 else 1.0
    return Cluster(places, within, float(cosines[np.ix_(places, others)].mean()) if others else float("nan"))
