"""Vocos: a vocoder of ConvNeXt blocks on the frames of a mel spectrogram, with an inverse-STFT head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.stft import inverse_stft

__all__ = ["ConvNeXtBlock", "Vocos", "VocosBackbone"]


class ConvNeXtBlock(nn.Module):
    """`x + gamma W2 gelu(W1 norm(depthwise(x)))` on frames (B, dim, L).

    Args:
        dim: channels.
        hidden: channels between the two matrices.
        scale: initial gamma.

    References:
        Liu et al. 2022, arXiv:2201.03545.
    """

    def __init__(self, dim: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, hidden)
        self.pwconv2 = nn.Linear(hidden, dim)
        self.gamma = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).transpose(1, 2))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.transpose(1, 2)


class VocosBackbone(nn.Module):
    """Mel frames (B, M, L) -> features (B, L, dim)."""

    def __init__(self, mels: int, dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Conv1d(mels, dim, 7, padding=3)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.convnext = nn.ModuleList(ConvNeXtBlock(dim, hidden, 1 / layers) for _ in range(layers))
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.norm(self.embed(mel).transpose(1, 2)).transpose(1, 2)
        for block in self.convnext:
            x = block(x)
        return self.final_layer_norm(x.transpose(1, 2))


class VocosHead(nn.Module):
    """The linear layer to the logarithms of magnitudes and to phases."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.out = nn.Linear(dim, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


class Vocos(nn.Module):
    """Log mel (B, M, L) -> audio: `iSTFT(min(exp(a), 100) exp(i p))` with a and p (B, n_fft / 2 + 1, L).

    Its parameters have the names of the published checkpoints.

    Args:
        mels: M.
        dim: channels of the blocks.
        hidden: their inner channels.
        layers: number of blocks.
        n_fft, hop, padding: of the inverse transform, see `short_time_fourier`; those of the mel spectrogram.

    References:
        Siuzdak 2023, arXiv:2306.00814.
    """

    def __init__(
        self,
        mels: int = 80,
        dim: int = 512,
        hidden: int = 1536,
        layers: int = 8,
        n_fft: int = 1024,
        hop: int = 256,
        padding: str = "same",
    ) -> None:
        super().__init__()
        self.config = {
            "mels": mels, "dim": dim, "hidden": hidden, "layers": layers, "n_fft": n_fft, "hop": hop,
            "padding": padding,
        }  # fmt: skip
        self.n_fft, self.hop, self.padding = n_fft, hop, padding
        self.backbone = VocosBackbone(mels, dim, hidden, layers)
        self.head = VocosHead(dim, n_fft + 2)

    def forward(self, mel: Tensor) -> Tensor:
        """Audio (B, n) of log mel (B, M, L): n = L hop with the padding `same`."""
        magnitude, phase = self.head(self.backbone(mel)).transpose(1, 2).chunk(2, 1)
        magnitude = magnitude.float().exp().clamp_max(100)
        return inverse_stft(torch.polar(magnitude, phase.float()), self.n_fft, self.hop, self.padding)
