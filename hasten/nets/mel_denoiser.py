"""A dilated-convolution network that denoises spectrograms of any length, conditioned on a vector for each frame."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MelDenoiser"]


class GatedBlock(nn.Module):
    """A residual block `(x + r) / sqrt 2`, with (r, skip) from `tanh(b) sigmoid(a)`, (a, b) = conv(x + step) + cond.

    Args:
        channels: C of the input and of the skip connection.
        condition: channels of the condition.
        dilation: of the convolution of kernel 3.
    """

    def __init__(self, channels: int, condition: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, 2 * channels, 3, padding=dilation, dilation=dilation)
        self.step = nn.Linear(channels, channels)
        self.condition = nn.Conv1d(condition, 2 * channels, 1)
        self.out = nn.Conv1d(channels, 2 * channels, 1)

    def forward(self, x: Tensor, step: Tensor, frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next x and the skip connection, each (B, C, L)."""
        y = x + self.step(step)[:, :, None]
        y = self.conv(y if mask is None else y * mask) + self.condition(frames)
        gate, value = y.chunk(2, 1)
        residual, skip = self.out(torch.sigmoid(gate) * torch.tanh(value)).chunk(2, 1)
        return (x + residual) / math.sqrt(2), skip


class MelDenoiser(nn.Module):
    """The denoiser of DiffWave and DiffSinger on spectrograms (B, M, L): gated residual convolutions of full length.

    The last layer begins at zero. With a mask, padded frames change no others, and are zero in the output.

    Args:
        mels: M.
        channels: of the residual blocks. ProDiff: 256.
        blocks: their number. ProDiff: 20.
        condition: H, channels of the condition `frames`.
        dilation_cycle: block k has the dilation 2^(k mod cycle); 1: none is dilated, as in ProDiff.

    References:
        Kong et al. 2021, arXiv:2009.09761 (DiffWave); Liu et al. 2022, arXiv:2105.02446 (DiffSinger);
        Huang et al. 2022, arXiv:2207.06389 (ProDiff).
    """

    def __init__(
        self, mels: int = 80, channels: int = 256, blocks: int = 20, condition: int = 256, dilation_cycle: int = 1
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "mels": mels, "channels": channels, "blocks": blocks, "condition": condition,
            "dilation_cycle": dilation_cycle,
        }  # fmt: skip
        self.input = nn.Conv1d(mels, channels, 1)
        self.step = nn.Sequential(nn.Linear(channels, 4 * channels), nn.Mish(), nn.Linear(4 * channels, channels))
        self.blocks: Any = nn.ModuleList(
            GatedBlock(channels, condition, 2 ** (k % dilation_cycle)) for k in range(blocks)
        )
        self.skip = nn.Conv1d(channels, channels, 1)
        self.output = nn.Conv1d(channels, mels, 1)
        nn.init.kaiming_normal_(self.input.weight)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, time: Tensor, frames: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The raw output (B, M, L).

        Args:
            x: (B, M, L).
            time: (B,), such as the index of the table.
            frames: the condition of each frame, (B, L, H); None: zero.
            mask: (B, L), 1 for frames and 0 for padding; None: no padding.
        """
        keep = None if mask is None else mask.to(x.dtype)[:, None]
        if frames is None:
            frames = x.new_zeros(len(x), x.shape[-1], self.config["condition"])
        frames = frames.to(x.dtype).transpose(1, 2)
        y = F.relu(self.input(x))
        step = self.step(sinusoid(time, self.config["channels"]).to(x.dtype))
        total = torch.zeros_like(y)
        for block in self.blocks:
            y, skip = block(y, step, frames, keep)
            total = total + skip
        out: Tensor = self.output(F.relu(self.skip(total / math.sqrt(len(self.blocks)))))
        return out if keep is None else out * keep


def sinusoid(position: Tensor, channels: int) -> Tensor:
    """`sin(p w), cos(p w)`, w from 1 down to 1e-4, (*P, channels) float32 for positions of any shape P."""
    half = channels // 2
    rate = torch.exp(torch.arange(half, device=position.device) * (-math.log(10_000.0) / max(half - 1, 1)))
    angle = position.float()[..., None] * rate
    return F.pad(torch.cat([angle.sin(), angle.cos()], -1), (0, channels - 2 * half))
