"""HiFi-GAN's generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["HiFiGAN"]

SLOPE = 0.1


class HiFiGANBlock(nn.Module):
    """A sum of residual dilated convolutions; `convs2`, of dilation 1, follow each one in blocks of kind "1"."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int], second: bool) -> None:
        super().__init__()

        def convolution(dilation: int) -> nn.Conv1d:
            return nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2)

        name = "convs1" if second else "convs"
        self.first = name
        self.add_module(name, nn.ModuleList(convolution(d) for d in dilations))
        self.convs2 = nn.ModuleList(convolution(1) for _ in dilations) if second else None

    def forward(self, x: Tensor) -> Tensor:
        for k, conv in enumerate(getattr(self, self.first)):
            y = conv(F.leaky_relu(x, SLOPE))
            if self.convs2 is not None:
                y = self.convs2[k](F.leaky_relu(y, SLOPE))
            x = x + y
        return x


class HiFiGAN(nn.Module):
    """Log mel (B, M, L) -> audio (B, L prod(rates)): transposed convolutions, each with a mean of residual blocks.

    Its parameters have the names of the published checkpoints, with weight normalisation folded into the weights.

    Args:
        mels: M.
        channels: after the first convolution; halved by each transposed one.
        rates, kernels: of the transposed convolutions.
        block_kernels, block_dilations: of the residual blocks after each.
        block: "1", pairs of convolutions, or "2".

    References:
        Kong, Kim, Bae 2020, arXiv:2010.05646.
    """

    def __init__(
        self,
        mels: int = 80,
        channels: int = 512,
        rates: Sequence[int] = (8, 8, 2, 2),
        kernels: Sequence[int] = (16, 16, 4, 4),
        block_kernels: Sequence[int] = (3, 7, 11),
        block_dilations: Sequence[Sequence[int]] = ((1, 3, 5), (1, 3, 5), (1, 3, 5)),
        block: str = "1",
    ) -> None:
        super().__init__()
        self.config = {
            "mels": mels, "channels": channels, "rates": list(rates), "kernels": list(kernels),
            "block_kernels": list(block_kernels), "block_dilations": [list(d) for d in block_dilations], "block": block,
        }  # fmt: skip
        self.parallel = len(block_kernels)
        self.conv_pre = nn.Conv1d(mels, channels, 7, padding=3)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(channels >> k, channels >> k + 1, kernel, rate, padding=(kernel - rate) // 2)
            for k, (rate, kernel) in enumerate(zip(rates, kernels))
        )
        self.resblocks = nn.ModuleList(
            HiFiGANBlock(channels >> k + 1, kernel, dilations, block == "1")
            for k in range(len(rates))
            for kernel, dilations in zip(block_kernels, block_dilations)
        )
        self.conv_post = nn.Conv1d(channels >> len(rates), 1, 7, padding=3)

    def forward(self, mel: Tensor) -> Tensor:
        """Audio (B, n) of log mel (B, M, L)."""
        x = self.conv_pre(mel)
        for k, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE))
            blocks = self.resblocks[k * self.parallel : (k + 1) * self.parallel]
            x = torch.stack([block(x) for block in blocks]).mean(0)
        return torch.tanh(self.conv_post(F.leaky_relu(x)))[:, 0]  # the published code has the slope 0.01 here
