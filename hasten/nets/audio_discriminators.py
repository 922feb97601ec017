"""Discriminators of sound: rows of a period, and spectrograms of several resolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from ..utils.stft import short_time_fourier

__all__ = ["AudioDiscriminators", "PeriodDiscriminator", "SpectrogramDiscriminator"]

SLOPE = 0.1  # of the leaky rectifiers


class PeriodDiscriminator(nn.Module):
    """Audio (B, n), folded into rows of `period` samples -> logits and the features before them.

    References:
        Kong et al. 2020, arXiv:2010.05646 (HiFi-GAN's multi-period discriminator).
    """

    def __init__(self, period: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.period = period
        ins = [1, *widths[:-1]]
        last = len(widths) - 1
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), stride=(1 if k == last else 3, 1), padding=(2, 0)))
            for k, (a, b) in enumerate(zip(ins, widths))
        )
        self.out = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = F.pad(x[:, None], (0, -x.shape[-1] % self.period), mode="reflect")
        x = x.unflatten(-1, (-1, self.period))
        return run_convolutions(x, self.convs, self.out)


class SpectrogramDiscriminator(nn.Module):
    """Audio (B, n) -> the log magnitudes of its transform -> logits and the features before them.

    References:
        Jang et al. 2021, arXiv:2106.07889 (UnivNet's multi-resolution discriminator).
    """

    def __init__(self, n_fft: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.n_fft = n_fft
        ins = [1, *widths[:-1]]
        last = len(widths) - 1
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 3), stride=(1, 1) if k == last else (2, 1), padding=(2, 1)))
            for k, (a, b) in enumerate(zip(ins, widths))
        )
        self.out = weight_norm(nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        parts = torch.view_as_real(short_time_fourier(x, self.n_fft, self.n_fft // 4))
        log = (parts.square().sum(-1) + 1e-6).log()[:, None] / 4  # of the order of 1
        return run_convolutions(log, self.convs, self.out)


class AudioDiscriminators(nn.Module):
    """Several discriminators at once. `started` tells whether they have been trained at all.

    Args:
        periods: of the multi-period ones, in samples.
        resolutions: transform sizes of the others.
        period_widths, widths: channels of their convolutions.
    """

    started: Tensor

    def __init__(
        self,
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        resolutions: Sequence[int] = (256, 512, 1024),
        period_widths: Sequence[int] = (8, 24, 48, 48),
        widths: Sequence[int] = (8, 16, 16, 16),
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            [PeriodDiscriminator(p, period_widths) for p in periods]
            + [SpectrogramDiscriminator(n, widths) for n in resolutions]
        )
        self.register_buffer("started", torch.zeros((), dtype=torch.uint8))

    def forward(self, x: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        """Logits and features of audio (B, n) by each discriminator."""
        return [part(x) for part in self.parts]


def run_convolutions(x: Tensor, convs: nn.ModuleList, out: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """The output of convolutions with leaky rectifiers between them, and what each one gives."""
    features = []
    for conv in convs:
        x = F.leaky_relu(conv(x), SLOPE)
        features.append(x)
    return out(x), features
