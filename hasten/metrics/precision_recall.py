"""Fidelity and diversity separately: improved precision and recall, density and coverage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from .measure import check_finite_rows

BLOCK = 2048


@dataclass(frozen=True)
class Manifold:
    """The four metrics; precision, recall and coverage are in [0, 1], density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def radii(features: Tensor, k: int) -> Tensor:
    """Distance `(N,)` of each row of `(N, D)` to its k-th nearest other row; raises BadInput if there is none."""
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
    """Precision, recall, density and coverage of generated features.

    With `r_k(x)` the distance of x to its k-th nearest neighbour in its own set:
    precision = fraction of generated samples within `r_k` of some real sample; recall = fraction of real samples within
    `r_k` of some generated sample; density = mean number of real balls of radius `r_k_density` that contain a generated
    sample, divided by k_density; coverage = fraction of these balls that contain a generated sample.
    All four depend on M and N: compare equal counts only.

    Args:
        real: features `(M, D)`.
        fake: generated features `(N, D)`.
        k: neighbours for precision and recall.
        k_density: neighbours for density and coverage.

    Raises:
        BadInput: if a set has no k-th neighbour, the widths differ or values are not finite.

    References:
        Kynkäänniemi et al. 2019, arXiv:1904.06991; Naeem et al. 2020, arXiv:2002.09797.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise BadInput(f"features {tuple(real.shape)} and {tuple(fake.shape)} are not of the same feature network")
    check_finite_rows("features", real, fake)
    real, fake = real.detach().cpu(), fake.detach().cpu()
    centre = real.double().mean(dim=0)  # distances come from products: centring avoids cancellation
    real, fake = ((v.double() - centre).float() for v in (real, fake))
    real_radius, fake_radius = radii(real, k), radii(fake, k)
    density_radius = real_radius if k_density == k else radii(real, k_density)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    precise, balls = 0, 0
    for start in range(0, len(fake), BLOCK):
        distance = torch.cdist(real, fake[start : start + BLOCK])
        precise += int((distance <= real_radius[:, None]).any(dim=0).sum())
        recalled |= (distance <= fake_radius[start : start + BLOCK]).any(dim=1)
        inside = distance <= density_radius[:, None]
        balls += int(inside.sum())
        covered |= inside.any(dim=1)
    return Manifold(
        precision=precise / len(fake),
        recall=float(recalled.double().mean()),
        density=balls / (k_density * len(fake)),
        coverage=float(covered.double().mean()),
    )
