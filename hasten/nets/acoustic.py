"""From phonemes to the condition of each frame of a spectrogram: encoder, durations, pitch, energy and alignment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .mel_denoiser import sinusoid

__all__ = ["AcousticEncoder", "expand_frames", "frame_tokens"]

BINS = 256  # of pitch and of energy
F0_RANGE = (50.0, 1100.0)  # Hz, of the bins of pitch
TYPICAL_FRAMES = 5  # of a token, before training
MAX_FRAMES = 40  # of one phoneme, at speed 1: an untrained predictor must not ask for hours


class AttentionBlock(nn.Module):
    """A feed-forward Transformer block: self-attention, then two convolutions, each after a layer norm.

    Args:
        channels: of the input.
        heads: of the attention.
        hidden: channels between the convolutions.
        kernel: of the first of them.
        dropout: of both branches.
    """

    def __init__(self, channels: int, heads: int, hidden: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.conv1 = nn.Conv1d(channels, hidden, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv1d(hidden, channels, 1)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, C), with mask (B, T), True for tokens."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
        x = x + self.drop(self.proj(attended.transpose(1, 2).flatten(2)))
        y = (self.norm2(x) * mask[..., None]).transpose(1, 2)
        y = self.conv2(F.gelu(self.conv1(y)))
        return (x + self.drop(y.transpose(1, 2))) * mask[..., None]


class ScalarPredictor(nn.Module):
    """Convolutions with ReLU and layer norm, then a linear layer: (B, T, C) -> (B, T, outputs).

    Args:
        channels: of the input and of the layers.
        outputs: numbers for each position.
        kernel: of the convolutions.
        dropout: after each.
    """

    def __init__(self, channels: int, outputs: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(channels, channels, kernel, padding=kernel // 2) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(channels, outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, outputs), zero where mask (B, T) is."""
        keep = mask[..., None].to(x.dtype)
        for conv, norm in zip(self.convs, self.norms):
            x = self.drop(norm(F.relu(conv((x * keep).transpose(1, 2)).transpose(1, 2))))
        out: Tensor = self.out(x) * keep
        return out


@dataclass
class Variance:
    """Duration, pitch and energy of a batch of texts.

    Args:
        log_duration: predicted log(frames + 1) of each token, (B, T).
        pitch: predicted (log f0 - center) / scale and the logit of "unvoiced", (B, L, 2).
        energy: predicted, standardised, (B, L).
        frames: the condition of the denoiser, (B, L, H).
        mask: (B, L) bool.
        durations: (B, T) int64.
    """

    log_duration: Tensor
    pitch: Tensor
    energy: Tensor
    frames: Tensor
    mask: Tensor
    durations: Tensor


class AcousticEncoder(nn.Module):
    """Phonemes -> condition of each frame: Transformer blocks, length regulator, embeddings of pitch and energy.

    Args:
        symbols: number of tokens; token 0 is padding.
        mels: M of the spectrograms.
        hidden: H.
        layers, heads, inner, kernel: of the blocks. ProDiff: hidden 256, 4 layers, 2 heads, 1024 inner, kernel 9.
        dropout: of the blocks; the predictors have five times as much, at most 0.5.
        speakers: number of speakers, 0 for one without a name.
        gap: the token between words, the only one that may last no frame.

    References:
        Ren et al. 2021, arXiv:2006.04558 (FastSpeech 2); Huang et al. 2022, arXiv:2207.06389.
    """

    mel_mean: Tensor
    mel_std: Tensor
    f0_stats: Tensor

    def __init__(
        self,
        symbols: int,
        mels: int = 80,
        hidden: int = 256,
        layers: int = 4,
        heads: int = 2,
        inner: int = 1024,
        kernel: int = 9,
        dropout: float = 0.1,
        speakers: int = 0,
        gap: int = 3,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "symbols": symbols, "mels": mels, "hidden": hidden, "layers": layers, "heads": heads, "inner": inner,
            "kernel": kernel, "dropout": dropout, "speakers": speakers, "gap": gap,
        }  # fmt: skip
        self.embed = nn.Embedding(symbols, hidden, padding_idx=0)
        self.blocks: Any = nn.ModuleList(AttentionBlock(hidden, heads, inner, kernel, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.speaker = nn.Embedding(speakers, hidden) if speakers else None
        high = min(5 * dropout, 0.5)
        self.duration = ScalarPredictor(hidden, 1, 3, high)
        self.pitch = ScalarPredictor(hidden, 2, 5, high)
        self.energy = ScalarPredictor(hidden, 1, 5, high)
        self.pitch_embed = nn.Embedding(BINS, hidden)
        self.energy_embed = nn.Embedding(BINS, hidden)
        # measured on the training data: of log mels, of log f0
        self.register_buffer("mel_mean", torch.zeros(mels))
        self.register_buffer("mel_std", torch.ones(mels))
        self.register_buffer("f0_stats", torch.tensor([5.0, 0.3]))
        nn.init.normal_(self.embed.weight, std=hidden**-0.5)
        nn.init.constant_(self.duration.out.bias, math.log(TYPICAL_FRAMES + 1))  # type: ignore[arg-type]
        for embedding in (self.pitch_embed, self.energy_embed):
            nn.init.normal_(embedding.weight, std=0.1)

    def encode(self, tokens: Tensor, speaker: Tensor | None = None) -> Tensor:
        """(B, T) int64, 0 where padded -> (B, T, H)."""
        mask, hidden = tokens > 0, self.config["hidden"]
        place = sinusoid(torch.arange(tokens.shape[1], device=tokens.device), hidden)
        x = (self.embed(tokens) * math.sqrt(hidden) + place.to(self.embed.weight.dtype)) * mask[..., None]
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        if self.speaker is not None:
            x = x + self.speaker(tokens.new_zeros(len(tokens)) if speaker is None else speaker)[:, None]
        out: Tensor = x * mask[..., None]
        return out

    def forward(
        self,
        tokens: Tensor,
        durations: Tensor | None = None,
        f0: Tensor | None = None,
        energy: Tensor | None = None,
        speaker: Tensor | None = None,
        speed: float = 1.0,
    ) -> Variance:
        """The condition of the denoiser, with true values where given and predicted ones elsewhere.

        Args:
            tokens: (B, T) int64, 0 where padded.
            durations: frames of each token, (B, T) int64.
            f0: Hz, 0 where unvoiced, (B, L).
            energy: standardised, (B, L).
            speaker: (B,) int64.
            speed: divides predicted durations.
        """
        h = self.encode(tokens, speaker)
        slow = h * 0.1 + h.detach() * 0.9  # the predictors change the encoder little
        mask = tokens > 0
        log_duration = self.duration(slow, mask)[..., 0]
        if durations is None:
            real = (log_duration.float().exp() - 1).clamp(0, MAX_FRAMES) / speed
            durations = torch.where(tokens == self.config["gap"], real.round(), real.round().clamp_min(1) * mask).long()
        x, at = expand_frames(h, durations, None if f0 is None else f0.shape[1])
        keep = at > 0
        slow = x * 0.1 + x.detach() * 0.9
        pitch = self.pitch(slow, keep)
        loudness = self.energy(slow, keep)[..., 0]
        if f0 is None:
            center, scale = self.f0_stats.float().unbind()
            f0 = torch.exp(center + scale * pitch[..., 0].float()) * (pitch[..., 1] <= 0)
        if energy is None:
            energy = loudness
        x = x + self.pitch_embed(f0_bins(f0)) + self.energy_embed(energy_bins(energy))
        return Variance(log_duration, pitch, loudness, x * keep[..., None], keep, durations)

    def normalize(self, mel: Tensor) -> Tensor:
        """Log mels (..., M, L) -> mean 0 and variance 1 on the training data, for each band."""
        return (mel - self.mel_mean[:, None]) / self.mel_std[:, None]

    def denormalize(self, x: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return x * self.mel_std[:, None].float() + self.mel_mean[:, None].float()


def f0_bins(f0: Tensor) -> Tensor:
    """The bin of an f0 in Hz, equally spaced in mel from 1; 0 where it is 0."""
    low, high = (1127 * math.log(1 + f / 700) for f in F0_RANGE)
    mel = 1127 * torch.log1p(f0.float().clamp_min(0) / 700)
    index = ((mel - low) * (BINS - 2) / (high - low) + 1).clamp(1, BINS - 1).round().long()
    return torch.where(f0 > 0, index, 0)


def energy_bins(energy: Tensor) -> Tensor:
    """The bin of a standardised energy, equally spaced from -4 to 4."""
    return ((energy.float() + 4) * (BINS / 8)).clamp(0, BINS - 1).long()


def frame_tokens(durations: Tensor, length: int | None = None) -> Tensor:
    """The token of each frame, counted from 1, and 0 for padding: [2, 2, 3] -> 1 1 2 2 3 3 3.

    Args:
        durations: frames of each token, (B, T) int64.
        length: L; None: the largest sum.

    Returns:
        (B, L) int64.
    """
    ends = durations.cumsum(1)
    total = ends[:, -1:]
    length = int(total.max()) if length is None else length
    place = torch.arange(length, device=durations.device).expand(len(durations), -1).contiguous()
    at = torch.searchsorted(ends.contiguous(), place, right=True) + 1
    return torch.where(place < total, at, 0)


def expand_frames(x: Tensor, durations: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
    """The length regulator: each row of x (B, T, H) repeated as often as its duration (B, T) says.

    Args:
        x: (B, T, H).
        durations: (B, T) int64.
        length: L; None: the largest sum of durations.

    Returns:
        (B, L, H), zero where padded, and `frame_tokens` (B, L).
    """
    at = frame_tokens(durations, length)
    rows = F.pad(x, (0, 0, 1, 0))
    return rows.gather(1, at[..., None].expand(-1, -1, x.shape[-1])), at
