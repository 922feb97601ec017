"""Nearest training images of generated ones, and whether they are nearer than those of unseen real images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from .measure import check_finite_rows

PERCENTILE = 0.01


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
    x = queries.float()
    check_finite_rows("queries", x)
    best = torch.full((len(x),), torch.inf, dtype=torch.float64)
    index = torch.full((len(x),), -1, dtype=torch.long)
    centre, first = x.double().mean(0).float(), 0
    centred = x - centre
    for block in blocks:
        rows = block.float()
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
        share: the fraction of generated images that are nearer than `threshold`; `PERCENTILE` is what unseen images
            have.
        threshold: the first percentile of the unseen images' distances.
        generated, real: median distances.
        nearest: the smallest distance of a generated image.
        number: of that image.
        train_number: of its nearest training image.
    """

    share: float
    threshold: float
    generated: float
    real: float
    nearest: float
    number: int
    train_number: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def memorisation(generated: Tensor, real: Tensor, index: Tensor) -> Memorisation:
    """Compare nearest distances of generated and of unseen real images to the training set.

    Args:
        generated: nearest distances (N,) of generated images.
        real: of unseen real images, (M,).
        index: the nearest training image of each generated image, (N,).

    References:
        Carlini et al. 2023, arXiv:2301.13188 (distances to the nearest training image).
    """
    threshold = torch.quantile(real.double(), PERCENTILE)
    closest = int(generated.argmin())
    return Memorisation(
        share=float((generated.double() < threshold).double().mean()),
        threshold=float(threshold),
        generated=float(generated.double().median()),
        real=float(real.double().median()),
        nearest=float(generated[closest]),
        number=closest,
        train_number=int(index[closest]),
    )
