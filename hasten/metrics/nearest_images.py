"""Nearest training images of generated ones, and whether they are nearer than those of unseen real images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from .measure import check_finite_rows

PERCENTILE, TENTH = 0.01, 0.1
COPY = 1e-6  # of the median distance: below, a held-out image is a copy of a training image


def nearest_distances(queries: Tensor, blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The distance of each query to its nearest row among all blocks, and the number of that row.

    Candidates are found from products, and the distance to the nearest is then computed exactly, so that copies have 0.

    Args:
        queries: (N, D).
        blocks: of rows (B, D), in order.

    Returns:
        Euclidean distances (N,) float64 and row numbers (N,).

    Raises:
        BadInput: without rows, or for values that are not finite.
    """
    x = queries.detach().cpu().float()
    check_finite_rows("queries", x)
    best = torch.full((len(x),), torch.inf, dtype=torch.float64)
    index = torch.full((len(x),), -1, dtype=torch.long)
    centre, first = x.double().mean(0).float(), 0
    centred = x - centre
    for block in blocks:
        rows = block.detach().cpu().float()
        check_finite_rows("rows", rows)
        found = torch.cdist(centred, rows - centre).argmin(dim=1)
        exact = (x.double() - rows[found].double()).norm(dim=1)
        nearer = exact < best
        best[nearer], index[nearer] = exact[nearer], found[nearer] + first
        first += len(rows)
    if first == 0:
        raise BadInput("a nearest image needs images to search")
    return best, index


@dataclass(frozen=True)
class Memorisation:
    """Distances of generated images to their nearest training images, against those of unseen real images.

    Args:
        share: the fraction of generated images that are nearer than `threshold`; unseen images have .01.
        threshold: the first percentile of the unseen images' distances.
        share_tenth: the fraction that are nearer than the tenth percentile; unseen images have .1.
        copies: unseen images that are copies of training images, which are left out of the percentiles.
        generated, real: median distances.
        count: generated images.
        nearest: the smallest distance of a generated image.
        number: of that image.
        train_number: of its nearest training image.
    """

    share: float
    threshold: float
    share_tenth: float
    copies: int
    count: int
    generated: float
    real: float
    nearest: float
    number: int
    train_number: int

    @property
    def memorised(self) -> bool:
        """Whether more images are nearer than the first percentile than three standard errors of chance explain."""
        return self.share > PERCENTILE + 3 * math.sqrt(PERCENTILE * (1 - PERCENTILE) / self.count)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "memorised": self.memorised}


def memorisation(generated: Tensor, real: Tensor, index: Tensor) -> Memorisation:
    """Compare nearest distances of generated and of unseen real images to the training set.

    Args:
        generated: nearest distances (N,) of generated images.
        real: of unseen real images, (M,).
        index: the nearest training image of each generated image, (N,).

    References:
        Carlini et al. 2023, arXiv:2301.13188 (distances to the nearest training image).
    """
    unseen = real.double()
    copied = unseen <= COPY * unseen.median()
    unseen = unseen[~copied] if not bool(copied.all()) else unseen
    threshold, tenth = torch.quantile(unseen, PERCENTILE), torch.quantile(unseen, TENTH)
    closest = int(generated.argmin())
    return Memorisation(
        share=float((generated.double() < threshold).double().mean()),
        threshold=float(threshold),
        share_tenth=float((generated.double() < tenth).double().mean()),
        copies=int(copied.sum()),
        count=len(generated),
        generated=float(generated.double().median()),
        real=float(real.double().median()),
        nearest=float(generated[closest]),
        number=closest,
        train_number=int(index[closest]),
    )
