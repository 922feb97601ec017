"""Fidelity and diversity apart: improved precision and recall, density and coverage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from .measure import check_finite_rows

BLOCK = 2048


@dataclass(frozen=True)
class Manifold:
    """The four numbers; precision, recall and coverage lie in [0, 1], density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def radii(features: Tensor, k: int) -> Tensor:
    """Distance of each of `(N, D)` to its k-th nearest other sample, `(N,)`."""
    if not 1 <= k < len(features):
        raise BadInput(f"{len(features)} samples have no {k}-th neighbour")
    out = []
    for start in range(0, len(features), BLOCK):
        distance = torch.cdist(features[start : start + BLOCK], features)
        rows = torch.arange(len(distance))
        distance[rows, rows + start] = torch.inf
        out.append(distance.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(out)


def manifold(real: Tensor, fake: Tensor, k: int = 3, k_density: int = 5) -> Manifold:
    """Precision, recall, density and coverage of generated features `fake` `(N, D)` against `real` `(M, D)`.

    With `r_k(x)` the distance of x to its k-th nearest neighbour in its own set:
    precision = share of fake samples within `r_k` of some real sample; recall = share of real samples within
    `r_k` of some fake sample (k = 3); density = mean number of real balls (k_density = 5) over a fake sample,
    divided by k_density; coverage = share of real balls with a fake sample in them.
    All four depend on M and N: compare equal counts only. Raises BadInput when a set has no k-th neighbour.
    Reference: Kynkäänniemi et al. 2019, 1904.06991; Naeem et al. 2020, 2002.09797.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise BadInput(f"features {tuple(real.shape)} and {tuple(fake.shape)} are not of the same feature network")
    check_finite_rows("features", real, fake)
    centre = real.double().mean(dim=0)  # the distances come from products: centring keeps their digits
    real, fake = ((v.double() - centre).float().cpu() for v in (real, fake))
    real_radius, fake_radius = radii(real, k), radii(fake, k)
    wide_radius = real_radius if k_density == k else radii(real, k_density)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    precise, balls = 0, 0
    for start in range(0, len(fake), BLOCK):
        distance = torch.cdist(real, fake[start : start + BLOCK])
        precise += int((distance <= real_radius[:, None]).any(dim=0).sum())
        recalled |= (distance <= fake_radius[start : start + BLOCK]).any(dim=1)
        inside = distance <= wide_radius[:, None]
        balls += int(inside.sum())
        covered |= inside.any(dim=1)
    return Manifold(
        precision=precise / len(fake),
        recall=float(recalled.double().mean()),
        density=balls / (k_density * len(fake)),
        coverage=float(covered.double().mean()),
    )
