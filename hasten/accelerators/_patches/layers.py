"""Layers that read more rows than their rank has: convolutions and group normalisation on a patch of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BadInput
from .exchange import Exchange

__all__ = ["FirstConv", "HaloConv", "LastConv", "PatchNorm", "correct_moments", "is_local", "pool_moments"]

Pads = tuple[int, int, int, int]  # zeros above, below, left and right


def is_local(conv: nn.Conv2d) -> bool:
    """Whether every row of a convolution's output depends on the same row of its input alone."""
    return conv.kernel_size[0] == 1 and conv.stride[0] == 1 and conv.padding in ("valid", "same", (0, 0))


def channels_last(x: Tensor) -> bool:
    """Whether a map is in the memory format `torch.channels_last` and no other."""
    if x.ndim != 4 or 1 in x.shape[1:]:
        return False
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def pads_of(conv: nn.Conv2d, where: str) -> Pads:
    """The zero padding of a convolution.

    Args:
        conv: the convolution.
        where: its name, for the message.

    Raises:
        BadInput: for another padding mode.
    """
    if conv.padding_mode != "zeros":
        raise BadInput(f"patch_parallel: {where} pads with {conv.padding_mode!r}: only zeros are supported")
    if conv.padding == "valid":
        return 0, 0, 0, 0
    if isinstance(conv.padding, str):  # "same"
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
        above, left = (total // 2 for total in reach)
        return above, reach[0] - above, left, reach[1] - left
    rows, columns = conv.padding
    return int(rows), int(rows), int(columns), int(columns)


class HaloConv(nn.Module):
    """A convolution on this rank's rows and those of its neighbours that it reads, (B, C, h, W) -> (B, C', h/s, W').

    With kernel k, stride s and dilation d its first window begins `above` rows before the rank's own, and the last ends
    d (k - 1) - above - s + 1 rows after them; beyond the image there are zeros. In the naive mode they are everywhere.

    Args:
        conv: the convolution that it replaces, whose weights it uses.
        exchange: of the ranks.
        where: the convolution's name, for messages.
        pads: by default those of the convolution.

    Raises:
        BadInput: where it changes the number of rows by more than its stride.
    """

    def __init__(self, conv: nn.Conv2d, exchange: Exchange, where: str, pads: Pads | None = None) -> None:
        super().__init__()
        self.conv, self.where = conv, where
        self.exchange = exchange
        above, below, self.left, self.right = pads_of(conv, where) if pads is None else pads
        k, s, d = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
        left_over = above + below - d * (k - 1) - 1
        if not -s <= left_over < 0:
            raise BadInput(f"patch_parallel: {where} changes the number of rows by more than its stride of {s}")
        self.above, self.below = above, max(0, d * (k - 1) - above - s + 1)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's rows of the output."""
        fewest = min(self.exchange.partition.counts(x.shape[2]))
        if max(self.above, self.below) > fewest:
            raise BadInput(
                f"patch_parallel: {self.where} reads {max(self.above, self.below)} rows of the neighbours' patches, "
                f"of which one has {fewest}: use fewer processes"
            )
        if self.exchange.mode == "naive":
            return self._run(F.pad(x, (0, 0, self.above, self.below)))
        rows = x.shape[2]
        up, down = x[:, :, : self.below], x[:, :, rows - self.above :]
        above, below = self.exchange.halo(up, down)
        if channels_last(x):  # so is the concatenation of tensors that all are
            above, below = (rows.contiguous(memory_format=torch.channels_last) for rows in (above, below))
        return self._run(torch.cat([above, x, below], dim=2))

    def _run(self, x: Tensor) -> Tensor:
        """The convolution, without padding above and below."""
        conv = self.conv
        if self.left != self.right:
            x, columns = F.pad(x, (self.left, self.right)), 0
        else:
            columns = self.left
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, (0, columns), conv.dilation, conv.groups)


class FirstConv(HaloConv):
    """The first convolution, whose input is the whole image and whose output is this rank's patch.

    Attributes:
        patch: how many rows of the image each row of its input is.
    """

    patch = 1

    def forward(self, x: Tensor) -> Tensor:
        """This rank's rows of the output."""
        if not self.exchange.open:  # the evaluation of a network that runs part by part begins here
            self.exchange.begin(x, self.patch)
        rows = x.shape[2]
        begin, end = self.exchange.partition.span(rows)
        low, high = begin - self.above, end + self.below
        if self.exchange.mode == "naive":
            return self._run(F.pad(x[:, :, begin:end], (0, 0, self.above, self.below)))
        x = x[:, :, max(low, 0) : min(high, rows)]
        if low < 0 or high > rows:
            x = F.pad(x, (0, 0, max(-low, 0), max(high - rows, 0)))
        return self._run(x)


class LastConv(HaloConv):
    """The last convolution, whose output is the whole image on every rank."""

    def forward(self, x: Tensor) -> Tensor:
        """All rows of the output (B, C, H, W)."""
        return self.exchange.gather_rows(super().forward(x))


class PatchNorm(nn.Module):
    """Group normalisation over all ranks' rows, of a map (B, C, h, W) or tokens (B, C, l).

    With mu, v the mean and variance of this rank's patch (B, G), mu_j, v_j those of all, and w_j their fractions of the
    image:

        full        M = sum_j w_j mu_j,  V = sum_j w_j (v_j + (mu_j - M)^2)     of this evaluation: exact
        stale       the same, but of the others' one evaluation ago
        corrected   c, S as M, V of all ranks' one evaluation ago, this one's mu_o, v_o among them; its drift is added:
                    M = c + (mu - mu_o),  V = S + (v - v_o) + 2 (mu - mu_o) (mu_o - c);  v instead of a V < 0
        separate    M = mu,  V = v

    "corrected" is `E[x^2]` and `E[x]` of one evaluation ago plus the own change of each, without their cancellation.
    Moments are float32, float64 of float64; there is no factor N / (N - 1), since group normalisation is biased.

    Args:
        norm: the module that it replaces, whose weights it uses.
        exchange: of the ranks.
    """

    def __init__(self, norm: nn.GroupNorm, exchange: Exchange) -> None:
        super().__init__()
        self.norm = norm
        self.exchange = exchange

    def forward(self, x: Tensor) -> Tensor:
        """The normalised rows, of the same shape."""
        norm, exchange = self.norm, self.exchange
        if exchange.mode == "naive" or (exchange.norm == "separate" and not exchange.sync):
            return norm(x)
        B, C, G = x.shape[0], x.shape[1], norm.num_groups
        exact = (x if x.dtype in (torch.float32, torch.float64) else x.float()).reshape(B, C, -1).contiguous()
        # normalised by its own moments in one pass, and then rescaled to those of all
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
        received, _ = exchange.gather("moments", own, now=full)
        fractions, me = exchange.fractions(received), exchange.partition.me
        if exchange.sync or full:
            return pool_moments(received, fractions)
        if exchange.norm == "stale":
            return pool_moments(torch.cat([received[:me], own[None], received[me + 1 :]]), fractions)
        return correct_moments(own, received, fractions, me)


def pool_moments(moments: Tensor, fractions: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of several patches together.

    Args:
        moments: (n, 2, B, G), the mean and variance of each.
        fractions: (n,), of the image, with sum 1.

    Returns:
        Mean (B, G) and variance (B, G).
    """
    w = fractions[:, None, None]
    M = (w * moments[:, 0]).sum(0)
    return M, (w * (moments[:, 1] + (moments[:, 0] - M).square())).sum(0)


def correct_moments(own: Tensor, before: Tensor, fractions: Tensor, me: int) -> tuple[Tensor, Tensor]:
    """`pool_moments` of one evaluation ago plus this rank's drift, see `PatchNorm`.

    Args:
        own: (2, B, G), this rank's mean and variance.
        before: (n, 2, B, G), those of all ranks one evaluation ago.
        fractions: (n,), of the image, with sum 1.
        me: this rank's position.

    Returns:
        Mean (B, G) and variance (B, G).
    """
    c, S = pool_moments(before, fractions)
    drift = own[0] - before[me, 0]
    V = S + (own[1] - before[me, 1]) + 2 * drift * (before[me, 0] - c)
    return c + drift, torch.where(V < 0, own[1], V)


def _of_channels(of_groups: Tensor, channels: int) -> Tensor:
    """(B, G) -> (B, C)."""
    return of_groups.repeat_interleave(channels // of_groups.shape[1], dim=1)
