"""The acoustic model as it is trained: encoder, alignment and denoiser with one loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...denoiser import Denoiser
from ...distillers.prodiff import prodiff_schedule
from ...errors import check_choice
from ...nets.acoustic import AcousticEncoder
from ...nets.mel_denoiser import MelDenoiser
from ...schedules.base import Schedule
from ...train.losses import cast_to_device, stratified
from .losses import masked_mean, mel_loss

__all__ = ["AcousticModel", "PRESETS", "make_acoustic_model"]

SEGMENT = 128  # frames of each clip that the denoiser is trained on at a time

# settings of AcousticEncoder and MelDenoiser
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({}, {}),
    "small": ({"hidden": 96, "layers": 3, "inner": 256, "kernel": 5}, {"channels": 96, "blocks": 8, "condition": 96}),
    "tiny": ({"hidden": 64, "layers": 2, "inner": 128, "kernel": 5}, {"channels": 64, "blocks": 6, "condition": 64}),
}


@dataclass
class LossParts:
    """The terms of the loss, each a scalar."""

    mel: Tensor
    duration: Tensor
    pitch: Tensor
    energy: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum, as it is minimised."""
        return self.mel + self.duration + self.pitch + 0.1 * self.energy


class AcousticModel(nn.Module):
    """Phonemes to spectrogram: an encoder with durations, pitch and energy, and a denoiser that it conditions.

    Args:
        encoder: of the phonemes.
        denoiser: with a `MelDenoiser`.
    """

    def __init__(self, encoder: AcousticEncoder, denoiser: Denoiser) -> None:
        super().__init__()
        self.encoder, self.denoiser = encoder, denoiser

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch of `SpeechBatches`: a scalar."""
        return self.loss(batch).total

    def loss(self, batch: Mapping[str, Tensor]) -> LossParts:
        """The terms of the loss of a batch of `SpeechBatches`."""
        x, tokens, frames, durations = (batch[name] for name in ("x", "tokens", "frames", "durations"))
        mask = torch.arange(x.shape[-1], device=x.device) < frames[:, None]
        f0, energy = batch["f0"], batch["energy"]
        v = self.encoder(tokens, durations, f0, energy, batch["speaker"])
        duration = duration_loss(v.log_duration, durations, tokens, self.encoder.config["gap"])
        center, scale = self.encoder.f0_stats.unbind()
        voiced = f0 > 0
        tone = masked_mean((v.pitch[..., 0] - (f0.clamp_min(1).log() - center) / scale).abs() * voiced, mask)
        unvoiced = F.binary_cross_entropy_with_logits(v.pitch[..., 1], (~voiced).to(x.dtype), reduction="none")
        pitch = tone + masked_mean(unvoiced, mask)
        loudness = masked_mean((v.energy - energy).square(), mask)
        return LossParts(self.diffusion_loss(x, v.frames, frames), duration, pitch, loudness)

    def diffusion_loss(self, x: Tensor, cond: Tensor, frames: Tensor) -> Tensor:
        """The loss of the denoiser on a random segment of each clip.

        Args:
            x: (B, M, L).
            cond: (B, L, H).
            frames: (B,).
        """
        size = min(SEGMENT, x.shape[-1])
        first = (torch.rand(len(x), device=x.device) * ((frames - size).clamp_min(0) + 1)).long()
        rows = first[:, None] + torch.arange(size, device=x.device)
        mask = rows < frames[:, None]
        rows = rows.clamp_max(x.shape[-1] - 1)
        x = x.gather(2, rows[:, None].expand(-1, x.shape[1], -1)) * mask[:, None]
        cond = cond.gather(1, rows[..., None].expand(-1, -1, cond.shape[-1])) * mask[..., None]
        schedule: Any = self.denoiser.schedule
        entries = len(schedule.alphas_cumprod)
        t = ((stratified(len(x)) * entries).floor() + 1) / entries
        alpha, sigma = (
            cast_to_device(each(t), x.device).view(-1, 1, 1).to(x.dtype) for each in (schedule.alpha, schedule.sigma)
        )
        eps = torch.randn_like(x)
        z = (alpha * x + sigma * eps) * mask[:, None]
        if self.denoiser.prediction.name == "x0":
            return mel_loss(self.denoiser(z, t, frames=cond, mask=mask), x, mask)
        raw = self.denoiser.raw(z, t, frames=cond, mask=mask)
        target = self.denoiser.prediction.target(x, eps, alpha, sigma)
        return masked_mean((raw - target).abs(), mask)


def duration_loss(log_duration: Tensor, durations: Tensor, tokens: Tensor, gap: int) -> Tensor:
    """Squared errors of log(frames + 1) of tokens (a tenth of them), words and sentences.

    Args:
        log_duration: predicted, (B, T).
        durations: (B, T).
        tokens: (B, T), 0 where padded.
        gap: token between words.
    """
    mask = (tokens > 0).to(log_duration.dtype)
    true = durations.to(log_duration.dtype)
    error = (log_duration - torch.log1p(true)).square()
    guess = (log_duration.exp() - 1).clamp_min(0) * mask
    word = (tokens == gap).cumsum(1)
    sums = [torch.zeros_like(true).scatter_add(1, word, one) for one in (guess, true)]
    words = (torch.log1p(sums[0]) - torch.log1p(sums[1])).square()
    real = (sums[1] > 0).to(true.dtype)
    whole = (torch.log1p(guess.sum(1)) - torch.log1p(true.sum(1))).square().mean()
    return 0.1 * (error * mask).sum() / mask.sum() + (words * real).sum() / real.sum() + whole


def make_acoustic_model(
    symbols: int,
    mels: int,
    preset: str = "small",
    speakers: int = 0,
    schedule: Schedule | None = None,
    prediction: str = "x0",
) -> AcousticModel:
    """A new model, with random weights.

    Args:
        symbols: number of tokens.
        mels: M.
        preset: `paper` (the denoiser has 15.09 million weights), `small`, for CPUs, or `tiny`.
        speakers: 0 for one without a name.
        schedule: default: that of the paper, of 5 entries.
        prediction: of the denoiser, `x0` or, as earlier models, `eps`.

    Raises:
        BadInput: for an unknown preset.
    """
    encoder_settings, net_settings = PRESETS[check_choice("preset", preset, PRESETS)]
    encoder = AcousticEncoder(symbols, mels, speakers=speakers, **encoder_settings)
    net = MelDenoiser(mels, **net_settings)
    denoiser = Denoiser(net, prodiff_schedule() if schedule is None else schedule, prediction, clock="index")
    return AcousticModel(encoder, denoiser)
