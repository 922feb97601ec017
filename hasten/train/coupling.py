"""Minibatch optimal transport: which noise is paired with which image of a batch.

Flow matching may pair noise and data by any coupling with the right marginals. The minibatch optimal-transport plan
minimises the sum of squared distances over the pairings of a batch, which leaves fewer lines that cross, so that the
learned flow is straighter. The noise is permuted; the data keep their order, with their labels.

For a conditional model the noise must be independent of the class: a pairing over the whole batch gives each class the
noise that lies near it, but at sampling time every class starts from all of the noise. Pairing within each class keeps
the two independent (Cheng, Schwing 2025, arXiv:2503.10636).

References:
    Tong et al. 2023, arXiv:2302.00482; Pooladian et al. 2023, arXiv:2304.14772.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput, check_choice
from ..utils.devices import as_float64

__all__ = ["COUPLINGS", "couple"]

COUPLINGS = ("none", "ot", "ot_class")


def couple(x: Tensor, noise: Tensor, coupling: str = "ot", label: Tensor | None = None) -> Tensor:
    """Permute the rows of `noise` so that row i is paired with row i of `x`.

    Args:
        x: data (B, *S).
        noise: noise (B, *S).
        coupling: `none` leaves the order as it is; `ot` is the permutation with the minimum sum of squared distances
            (exact; O(B^3) at worst, milliseconds for B = 256; in one dimension it is sorting); `ot_class` is the same
            within the rows of each label, or over all rows without labels.
        label: int64 (B,), for `ot_class`.

    Returns:
        The permuted noise (B, *S).

    Raises:
        BadInput: for an unknown coupling, or shapes that differ.
    """
    check_choice("coupling", coupling, COUPLINGS)
    if x.shape != noise.shape:
        raise BadInput(f"coupling needs as much noise as data, got {tuple(noise.shape)} and {tuple(x.shape)}")
    if coupling == "none":
        return noise
    order = torch.arange(len(x), device=x.device)
    if coupling == "ot" or label is None:
        return noise[optimal_assignment(x, noise)]
    for one in label.unique():
        rows = (label == one).nonzero()[:, 0]
        order[rows] = rows[optimal_assignment(x[rows], noise[rows])]
    return noise[order]


def optimal_assignment(x: Tensor, noise: Tensor) -> Tensor:
    """The row of `noise` that the optimal plan assigns to each row of `x`, int64 (B,), on the device of `x`."""
    from scipy.optimize import linear_sum_assignment

    # |x - e|^2 is |x|^2 + |e|^2 - 2 x.e, and only the last depends on the pairing
    cost = -(as_float64(x.detach()).flatten(1) @ as_float64(noise.detach()).flatten(1).T)
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.from_numpy(columns).to(x.device)
