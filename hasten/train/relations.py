"""Relations of the samples of a batch: pairwise distances, and how much those of two batches differ.

References:
    Yang, Qian, Zhang, Liu, Cui 2024, arXiv:2402.17563.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed.gather import gather_rows
from ..distributed.ranks import Ranks
from ..errors import BadInput

__all__ = ["relation_distance", "relations", "sample_distances"]

TINY = 1e-8
LOSSES = ("l2", "smooth_l1")


def sample_distances(features: Tensor) -> Tensor:
    """Euclidean distances of all pairs, (B, D) -> (B, B), in float32 or float64 whatever the input's precision.

    They are `sqrt(d^2 + 1e-8)`, whose gradient is finite, and zero, where two samples are the same.
    """
    with torch.autocast(features.device.type, enabled=False):
        f = features if features.dtype == torch.float64 else features.float()
        d = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.sqrt(d.square() + TINY)


def pair_weights(weights: Tensor | None, groups: Tensor | None, n: int, device: torch.device) -> Tensor:
    """Weights of the pairs (n, n): `sqrt(w_i w_j)`, zero on the diagonal and between samples of different groups."""
    w = torch.ones(n, device=device) if weights is None else weights.float().clamp_min(0)
    pairs = torch.outer(w, w).sqrt() * ~torch.eye(n, dtype=torch.bool, device=device)
    return pairs if groups is None else pairs * (groups[:, None] == groups[None, :])


def relations(real: Tensor, generated: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The relation matrices R of both batches (B, B): distances over their mean in both, which makes them scale-free.

    The mean is a common one: divided by its own, a batch of samples that are all blurred alike would look right.

    Args:
        real, generated: features (B, D).
        pairs: weights of the pairs (B, B).
    """
    first, second = sample_distances(real), sample_distances(generated)
    mean = (pairs * (first + second)).sum() / (2 * pairs.sum()).clamp_min(TINY)
    return first / mean.clamp_min(TINY), second / mean.clamp_min(TINY)


def relation_distance(
    real: Tensor,
    generated: Tensor,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
    loss: str = "l2",
    ranks: Ranks | None = None,
) -> Tensor:
    """The structural distance `D = sum_ij w_ij (R_ij - R'_ij)^2 / sum_ij w_ij` over pairs i != j, a scalar.

    It is zero, with zero gradient, where both batches have the same relations, and does not change where the samples
    of both are permuted alike, or the features rotated.

    Args:
        real: features (B, D) of the clean samples, or of a teacher's.
        generated: of the denoised samples, or of a student's.
        weights: of the samples (B,), at least 0; a pair has the square root of the product of both.
        groups: integers (B,): only samples of the same group are compared.
        loss: `"l2"`, or `"smooth_l1"`, which is linear beyond 1.
        ranks: the processes whose parts of the batch are compared with one another too. Each must have as many
            samples; gradients flow to its own ones, so that their mean over the processes is that of the whole batch.

    Raises:
        BadInput: for fewer than two samples.
    """
    if ranks is not None and ranks.world > 1:
        real, generated = gather_rows(real, ranks), gather_rows(generated, ranks)
        weights = None if weights is None else gather_rows(weights, ranks)
        groups = None if groups is None else gather_rows(groups, ranks)
    n = len(real)
    if n < 2:
        raise BadInput(f"the structure of a batch is that of its pairs: it needs 2 samples or more, got {n}")
    pairs = pair_weights(weights, groups, n, real.device)
    a, b = relations(real, generated, pairs)
    error = (a - b).square() if loss == "l2" else torch.nn.functional.smooth_l1_loss(b, a, reduction="none")
    return (pairs * error).sum() / pairs.sum().clamp_min(TINY)
