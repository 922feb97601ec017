"""Layers that see more rows than their rank has: convolutions and group normalisation on a part of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BadInput
from .exchange import Exchange

__all__ = ["FirstConv", "HaloConv", "LastConv", "PatchNorm", "is_local"]

Pads = tuple[int, int, int, int]  # zeros above, below, left and right


def is_local(conv: nn.Conv2d) -> bool:
    """Whether a convolution needs no rows but those that it answers."""
    return conv.kernel_size[0] == 1 and conv.stride[0] == 1 and conv.padding in ("valid", "same", (0, 0))


def channels_last(x: Tensor) -> bool:
    """Whether a map lies in memory pixel by pixel, and not channel by channel (nor both, as those of one pixel do)."""
    if x.ndim != 4 or 1 in x.shape[1:]:
        return False
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def pads_of(conv: nn.Conv2d, where: str) -> Pads:
    """The zeros that a convolution adds. Raises BadInput where it adds something else."""
    if conv.padding_mode != "zeros":
        raise BadInput(f"patch_parallel: {where} pads with {conv.padding_mode!r}: only zeros are known")
    if conv.padding == "valid":
        return 0, 0, 0, 0
    if conv.padding == "same":
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
        above, left = (total // 2 for total in reach)
        return above, reach[0] - above, left, reach[1] - left
    rows, columns = conv.padding  # type: ignore[misc]
    return int(rows), int(rows), int(columns), int(columns)  # type: ignore[arg-type]


class HaloConv(nn.Module):
    """A convolution on this rank's rows, with those that it needs of its neighbours' (B, C, h, W) -> (B, C', h/s, W').

    With kernel k, stride s and dilation d its first window begins `above` rows before the rank's own, and the last ends
    d (k - 1) - above - s + 1 rows after them; beyond the image there are zeros. In the naive mode they are everywhere.
    """

    def __init__(self, conv: nn.Conv2d, exchange: Exchange, where: str, pads: Pads | None = None) -> None:
        super().__init__()
        self.conv, self.where = conv, where
        self.__dict__["exchange"] = exchange
        above, below, self.left, self.right = pads_of(conv, where) if pads is None else pads
        k, s, d = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
        left_over = above + below - d * (k - 1) - 1
        if not -s <= left_over < 0:
            raise BadInput(f"patch_parallel: {where} changes the number of rows by more than its stride of {s}")
        self.above, self.below = above, max(0, d * (k - 1) - above - s + 1)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's rows of the answer."""
        least = min(self.exchange.shares.others(x.shape[2]))
        if max(self.above, self.below) > least:
            raise BadInput(
                f"patch_parallel: {self.where} reaches {max(self.above, self.below)} rows into the neighbours' parts, "
                f"of which one has {least}: use fewer processes"
            )
        if self.exchange.mode == "naive":
            return self._run(F.pad(x, (0, 0, self.above, self.below)))
        rows = x.shape[2]
        up, down = x[:, :, : self.below], x[:, :, rows - self.above :]
        above, below = self.exchange.halo(up, down)
        if channels_last(x):
            above, below = (each.contiguous(memory_format=torch.channels_last) for each in (above, below))  # so is all
        return self._run(torch.cat([above, x, below], dim=2))

    def _run(self, x: Tensor) -> Tensor:
        conv = self.conv
        if self.left != self.right:
            x, columns = F.pad(x, (self.left, self.right)), 0
        else:
            columns = self.left
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, (0, columns), conv.dilation, conv.groups)


class FirstConv(HaloConv):
    """The first one, which is given the whole image, `patch` of its rows in one, and answers this rank's part."""

    patch = 1

    def forward(self, x: Tensor) -> Tensor:
        """This rank's rows of the answer."""
        if not self.exchange.open:  # a network that is run part by part begins here
            self.exchange.begin(x, self.patch)
        rows = x.shape[2]
        begin, end = self.exchange.shares.span(rows)
        low, high = begin - self.above, end + self.below
        if self.exchange.mode == "naive":
            return self._run(F.pad(x[:, :, begin:end], (0, 0, self.above, self.below)))
        x = x[:, :, max(low, 0) : min(high, rows)]
        if low < 0 or high > rows:
            x = F.pad(x, (0, 0, max(-low, 0), max(high - rows, 0)))
        return self._run(x)


class LastConv(HaloConv):
    """The last one, which answers the whole image on every rank."""

    def forward(self, x: Tensor) -> Tensor:
        """All rows of the answer (B, C, H, W)."""
        return self.exchange.rows(super().forward(x))


class PatchNorm(nn.Module):
    """Group normalisation over all ranks' rows, of a map (B, C, h, W) or tokens (B, C, l).

    With mu, v the mean and variance of this rank's part (B, G) and mu_j, v_j those of all, w_j the ranks' shares:

        full        M = sum_j w_j mu_j,  V = sum_j w_j (v_j + (mu_j - M)^2)     of this evaluation: exact
        stale       the same, but of the others' one evaluation ago
        corrected   c, S as M, V of all ranks' one evaluation ago, this one's mu_o, v_o among them; its drift is added:
                    M = c + (mu - mu_o),  V = S + (v - v_o) + 2 (mu - mu_o) (mu_o - c);  v in place of a V < 0
        separate    M = mu,  V = v

    "corrected" is `E[x^2]` and `E[x]` of then plus the own change of each, written without their cancellation. Moments
    are float32, float64 of float64; nothing is multiplied by N / (N - 1), since group normalisation is biased.
    """

    def __init__(self, norm: nn.GroupNorm, exchange: Exchange) -> None:
        super().__init__()
        self.norm = norm
        self.__dict__["exchange"] = exchange

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        norm, exchange = self.norm, self.exchange
        if exchange.mode == "naive" or (exchange.norm == "separate" and not exchange.sync):
            return norm(x)
        B, C, G = x.shape[0], x.shape[1], norm.num_groups
        exact = (x if x.dtype in (torch.float32, torch.float64) else x.float()).reshape(B, C, -1).contiguous()
        # normalised by its own moments in one pass, and then moved to those of all
        y, mean, rate = torch.native_group_norm(exact, None, None, B, C, exact.shape[2], G, norm.eps)
        own = torch.stack([mean, rate.pow(-2) - norm.eps]).view(2, B, G)
        mean, rate = mean.view(B, G), rate.view(B, G)
        M, V = self._moments(own)
        R = (V + norm.eps).rsqrt()
        scale, shift = _of_channels(R / rate, C), _of_channels((mean - M) * R, C)
        if norm.weight is not None:
            scale = scale * norm.weight
            shift = shift * norm.weight + norm.bias
        y = y.mul_(scale[:, :, None]).add_(shift[:, :, None]).view(x.shape).to(x.dtype)
        return y.contiguous(memory_format=torch.channels_last) if channels_last(x) else y

    def _moments(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """M and V (B, G), for this rank's mean and variance (2, B, G)."""
        exchange = self.exchange
        full = exchange.norm in ("full", "separate")
        heard, _ = exchange.gathered("moments", own, now=full)
        weights, me = exchange.weights(heard), exchange.shares.me
        if exchange.sync or full:
            return pool_moments(heard, weights)
        if exchange.norm == "stale":
            return pool_moments(torch.cat([heard[:me], own[None], heard[me + 1 :]]), weights)
        return correct_moments(own, heard, weights, me)


def pool_moments(moments: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, G) of parts with these moments (n, 2, B, G) and shares (n,) that sum to 1."""
    w = weights[:, None, None]
    M = (w * moments[:, 0]).sum(0)
    return M, (w * (moments[:, 1] + (moments[:, 0] - M).square())).sum(0)


def correct_moments(own: Tensor, before: Tensor, weights: Tensor, me: int) -> tuple[Tensor, Tensor]:
    """`pooled` of the moments before (n, 2, B, G), plus this rank's drift from its own there to `own` (2, B, G)."""
    c, S = pool_moments(before, weights)
    drift = own[0] - before[me, 0]
    V = S + (own[1] - before[me, 1]) + 2 * drift * (before[me, 0] - c)
    return c + drift, torch.where(V < 0, own[1], V)


def _of_channels(of_groups: Tensor, channels: int) -> Tensor:
    """(B, G) -> (B, C)."""
    return of_groups.repeat_interleave(channels // of_groups.shape[1], dim=1)
