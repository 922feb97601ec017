"""A monotone network of one number: a noise schedule that is learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MonotoneGamma(nn.Module):
    """`gamma(t) = g0 + (g1 - g0) s(t)`, increasing, with `s(t) = (h(t) - h(0)) / (h(1) - h(0))` and

        h(t) = l(t) + sum_j w3_j sigmoid(w2_j l(t) + b2_j),    l(t) = w1 t + b1,    w1, w2, w3 > 0.

    gamma is -log SNR. At first s(t) = t to about 1e-3.

    Args:
        low, high: g0 and g1 at first.
        width: number of units.
        ends: whether g0 and g1 are learned.
        shape: whether s is.

    References:
        Kingma, Salimans, Poole, Ho 2021, arXiv:2107.00630, appendix H.
    """

    def __init__(self, low: float, high: float, width: int = 256, ends: bool = True, shape: bool = True) -> None:
        super().__init__()
        self.low, self.high, self.learned_shape = low, high, shape
        # offsets from the first values, so that weight decay does not pull the ends to 0
        self.ends = nn.Parameter(torch.zeros(2), requires_grad=ends)
        slope = torch.full((width,), 12.0)
        centres = (torch.arange(width) + 0.5) / width
        self.first = nn.Parameter(torch.tensor([inverse_softplus(1.0), 0.0]), requires_grad=shape)
        self.slopes = nn.Parameter(slope, requires_grad=shape)  # softplus(12) is 12
        self.shifts = nn.Parameter(-slope * centres, requires_grad=shape)
        self.heights = nn.Parameter(torch.full((width,), inverse_softplus(0.05 / width)), requires_grad=shape)

    def shape(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """s(t) and s'(t), each of the shape (B,) of `t`."""
        points = torch.cat([t.to(self.first), t.new_tensor([0.0, 1.0]).to(self.first)])
        w1, w2, w3 = F.softplus(self.first[0]), F.softplus(self.slopes), F.softplus(self.heights)
        line = w1 * points + self.first[1]
        unit = torch.sigmoid(line[:, None] * w2 + self.shifts)
        h = line + unit @ w3
        slope = w1 * (1 + (unit * (1 - unit)) @ (w2 * w3))
        total = h[-1] - h[-2]
        return (h[:-2] - h[-2]) / total, slope[:-2] / total

    def bounds(self) -> tuple[Tensor, Tensor]:
        """g0 and g1."""
        return self.low + self.ends[0], self.high + self.ends[1]

    @torch.no_grad()
    def table(self, n: int) -> list[float]:
        """gamma at n equally spaced times from 0 to 1, float64, for a schedule."""
        net = MonotoneGamma(self.low, self.high, len(self.slopes)).double()
        net.load_state_dict(self.state_dict())
        low, high = net.bounds()
        s, _ = net.shape(torch.linspace(0, 1, n, dtype=torch.float64))
        values: list[float] = (low + (high - low) * s).tolist()
        return values


def inverse_softplus(value: float) -> float:
    """The number whose softplus this is."""
    return math.log(math.expm1(value))
