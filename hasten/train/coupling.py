"""Which noise goes with which image of a batch: at random, or so that straight lines between them are short.

Flow matching may pair noise and data in any way whose two margins are right. The minibatch optimal-transport plan
minimises the sum of squared distances over the pairings of a batch, which leaves fewer lines that cross, so that the
flow that is learned is straighter. The noise is permuted and the data stay where they are, with their labels.

For a conditional model the noise must not tell the class: a pairing over the whole batch gives each class the noise
that lies near it, which at sampling time, when noise is drawn for the class, it does not get. Pairing within each class
keeps them independent (Cheng, Schwing 2025, arXiv:2503.10636).

Reference: Tong et al. 2023, arXiv:2302.00482; Pooladian et al. 2023, arXiv:2304.14772.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput, nearest

__all__ = ["COUPLINGS", "couple"]

COUPLINGS = ("none", "ot", "ot_class")


def couple(x: Tensor, noise: Tensor, coupling: str = "ot", label: Tensor | None = None) -> Tensor:
    """`noise` (B, *S) in the order in which its rows go with those of `x` (B, *S).

    coupling: "none", as it is; "ot", the permutation with the least sum of squared distances (exact; B^3 at worst,
        milliseconds for B = 256); "ot_class", the same within the rows of each `label` (B,), or over all of them
        where there are no labels. In one dimension it is sorting.

    BadInput for another coupling, or shapes that differ.
    """
    if coupling not in COUPLINGS:
        raise BadInput(f"unknown coupling {coupling!r}: {nearest(coupling, COUPLINGS)}")
    if x.shape != noise.shape:
        raise BadInput(f"coupling needs as much noise as data, found {tuple(noise.shape)} and {tuple(x.shape)}")
    if coupling == "none":
        return noise
    order = torch.arange(len(x), device=x.device)
    if coupling == "ot" or label is None:
        return noise[plan(x, noise)]
    for one in label.unique():
        rows = (label == one).nonzero()[:, 0]
        order[rows] = rows[plan(x[rows], noise[rows])]
    return noise[order]


def plan(x: Tensor, noise: Tensor) -> Tensor:
    """For each row of `x` the row of `noise` that the optimal plan gives it, int64 (B,), on the device of x."""
    from scipy.optimize import linear_sum_assignment

    # |x - e|^2 is |x|^2 + |e|^2 - 2 x.e, and only the last depends on the pairing
    cost = -(x.detach().double().flatten(1) @ noise.detach().double().flatten(1).T)
    _, chosen = linear_sum_assignment(cost.cpu().numpy())
    return torch.from_numpy(chosen).to(x.device)
