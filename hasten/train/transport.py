"""Conditional transport: a distance between the laws of two batches, by navigated plans in both directions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..nets.transport import Navigator

__all__ = ["TransportLoss", "conditional_transport", "cosine_cost"]


def conditional_transport(distance: Tensor, cost: Tensor) -> Tensor:
    """`mean_i sum_j softmax_j(-d_ij) c_ij / 2 + mean_j sum_i softmax_i(-d_ij) c_ij / 2`, a scalar.

    Each sample of one batch is taken to the samples of the other with probabilities that fall with d: forward, which
    covers all modes of the first, and backward, which stays at its modes.

    Args:
        distance: d (n, m), of the navigator.
        cost: c (n, m).

    References:
        Zheng, Zhou 2020, arXiv:2012.14350.
    """
    forward = (torch.softmax(-distance, 1) * cost).sum(1).mean()
    backward = (torch.softmax(-distance, 0) * cost).sum(0).mean()
    return 0.5 * (forward + backward)


def cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    """`1 - cos` of the angles between features (n, K) and (m, K): (n, m), in [0, 2]."""
    return 1 - F.normalize(x, dim=1) @ F.normalize(y, dim=1).T


class TransportLoss:
    """The conditional transport between samples, by features T and a navigator that are trained with it.

    c = 1 - cos(T x, T y), d = navigator of T x and T y. The generator and the navigator minimise it, the features
    maximise it. In a class-conditional batch samples of different labels are transported at the additional distance
    `apart`, that is, practically not.

    Args:
        features: `(B, *S) -> (B, K)`.
        navigator: see `nets.transport.Navigator`.
        apart: added to d between different labels.
    """

    def __init__(self, features: torch.nn.Module, navigator: Navigator, apart: float = 10.0) -> None:
        self.features, self.navigator, self.apart = features, navigator, apart

    def __call__(self, x: Tensor, y: Tensor, label: Tensor | None = None) -> Tensor:
        """The loss of real x and generated y, (B, *S) each and both of the labels (B,), a scalar."""
        tx, ty = self.features(x), self.features(y)
        distance = self.navigator(tx, ty)
        if label is not None:
            distance = distance + self.apart * (label[:, None] != label[None]).to(distance)
        return conditional_transport(distance, cosine_cost(tx, ty))
