"""Losses of a neural vocoder: mel and spectral distances, discriminators, and their features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..audio.mel import MelSettings, mel
from ..errors import BadInput
from ..nets.audio_discriminators import AudioDiscriminators
from ..nets.harmonic_vocos import HarmonicVocos
from ..utils.stft import short_time_fourier
from .adversarial import hinge_loss
from .trained_module import TrainedModule, frozen_parameters

__all__ = ["VocoderBatches", "VocoderLoss", "feature_matching", "spectral_distance"]

RESOLUTIONS = (256, 512, 1024, 2048)


class VocoderLoss:
    """The loss of a vocoder G of mel spectrograms, and that of discriminators D_k against it:

        G: mel |mel(x) - mel(G)|_1 + spectral mean_r d_r(x, G) + pitch CE(f0)
           + gan mean_k max(0, 1 - D_k(G)) + features mean_k,l |D_k^l(x) - D_k^l(G)|_1 / |D_k^l(x)|_1
        D: mean_k mean max(0, 1 - D_k(x)) + mean max(0, 1 + D_k(G))

    The terms of the discriminators are 0 until they have been trained once.

    Args:
        settings: of the mel spectrogram.
        discriminators: D, or None.
        mel, spectral, pitch, gan, features: weights, >= 0.

    Raises:
        BadInput: for a negative weight.

    References:
        Siuzdak 2023, arXiv:2306.00814; Kong et al. 2020, arXiv:2010.05646; Yamamoto, Song, Kim 2020, arXiv:1910.11480
        (spectral distances of several resolutions).
    """

    def __init__(
        self,
        settings: MelSettings,
        discriminators: AudioDiscriminators | None = None,
        mel: float = 2.0,
        spectral: float = 1.0,
        pitch: float = 0.2,
        gan: float = 0.5,
        features: float = 1.0,
    ) -> None:
        self.settings, self.discriminators = settings, discriminators
        self.weights = {"mel": mel, "spectral": spectral, "pitch": pitch, "gan": gan, "features": features}
        for name, value in self.weights.items():
            if not value >= 0:
                raise BadInput(f"{name} must be 0 or more, got {value}")

    def __call__(self, vocoder: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The loss of the vocoder, a scalar.

        Args:
            vocoder: `mel (B, M, L) -> audio (B, n)`, or a `HarmonicVocos`.
            batch: `x`, audio (B, n); for a `HarmonicVocos` also `f0` in Hz and `voiced`, (B, L). Receives `made`.
        """
        x, w = batch["x"], self.weights
        target = mel(x, self.settings)
        if isinstance(vocoder, HarmonicVocos):
            features = vocoder.backbone(target)
            made = vocoder.synthesise(vocoder.filters(features, target), batch["f0"], seed=None)
            made = vocoder.correct(made, target)
            loss = w["pitch"] * vocoder.pitch.loss(features, batch["f0"], batch["voiced"])
        else:
            made, loss = vocoder(target), torch.zeros((), device=x.device)
        batch["made"] = made.detach()
        loss = loss + w["mel"] * (mel(made, self.settings) - target).abs().mean()
        loss = loss + w["spectral"] * spectral_distance(x, made)
        if self.discriminators is None or not self.discriminators.started:
            return loss
        with frozen_parameters(self.discriminators):
            with torch.no_grad():
                real = self.discriminators(x)
            fake = self.discriminators(made)
        fooled = torch.stack([(1 - logits).relu().mean() for logits, _ in fake]).mean()
        return loss + w["gan"] * fooled + w["features"] * feature_matching(real, fake)

    def discriminator_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The discriminators' loss on `x` and `made` of a batch, a scalar."""
        assert self.discriminators is not None
        self.discriminators.started.fill_(1)
        n = len(batch["x"])
        logits = [logits for logits, _ in self.discriminators(torch.cat([batch["x"], batch["made"].detach()]))]
        return torch.stack([hinge_loss(both[:n], both[n:]) for both in logits]).mean()

    def modules(
        self, vocoder: nn.Module, lr: float, discriminator_lr: float, start: float, optimiser: str = "adamw"
    ) -> list[TrainedModule]:
        """What the training loop trains: the vocoder, and its discriminators from the fraction `start` on."""
        own: dict[str, Any] = {"betas": (0.8, 0.99)}
        trained = [TrainedModule("vocoder", vocoder, lambda b: self(vocoder, b), lr, optimiser=optimiser, **own)]
        if self.discriminators is not None:
            trained.append(
                TrainedModule(
                    "discriminators", self.discriminators, self.discriminator_loss, discriminator_lr, start=start, **own
                )
            )
        return trained


def spectral_distance(x: Tensor, y: Tensor, resolutions: Sequence[int] = RESOLUTIONS) -> Tensor:
    """The mean over resolutions of `mean |log |X| - log |Y|| + |X - Y|_F / |X|_F` of transforms' magnitudes, a scalar.

    Args:
        x, y: audio (B, n); x is the target.
        resolutions: sizes of the transforms, of which the sound's length allows those up to n.
    """
    total = []
    for n_fft in [n for n in resolutions if n <= x.shape[-1]]:
        a, b = (magnitude(z, n_fft) for z in (x, y))
        log = (a.clamp_min(1e-4).log() - b.clamp_min(1e-4).log()).abs().mean()
        total.append(log + (a - b).square().sum().sqrt() / a.square().sum().sqrt().clamp_min(1e-4))
    return torch.stack(total).mean()


def magnitude(x: Tensor, n_fft: int) -> Tensor:
    """The magnitudes of the transform of audio (B, n), with a gradient that is finite at 0."""
    return (torch.view_as_real(short_time_fourier(x, n_fft, n_fft // 4)).square().sum(-1) + 1e-9).sqrt()


def feature_matching(
    real: Sequence[tuple[Tensor, list[Tensor]]], fake: Sequence[tuple[Tensor, list[Tensor]]]
) -> Tensor:
    """The mean over all features of several discriminators of `mean |real - fake| / mean |real|`, a scalar."""
    pairs = [(a.detach(), b) for (_, ours), (_, theirs) in zip(real, fake) for a, b in zip(ours, theirs)]
    return torch.stack([(a - b).abs().mean() / a.abs().mean().clamp_min(1e-3) for a, b in pairs]).mean()


class VocoderBatches:
    """Random pieces of sounds: `batches[k]` is that of step k, a function of the seed and k.

    Args:
        sounds: each (n,).
        pitches: f0 in Hz and voicing of each, (L,); None for vocoders without.
        hop: samples of a frame.
        frames: length of a piece in frames; shorter sounds end in silence.
        batch_size: pieces in a batch.
        seed: of the choice.
    """

    def __init__(
        self,
        sounds: Sequence[Tensor],
        pitches: Sequence[tuple[Tensor, Tensor]] | None,
        hop: int,
        frames: int = 64,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        self.sounds, self.pitches, self.hop, self.frames = sounds, pitches, hop, frames
        self.batch_size, self.seed = batch_size, seed
        self.weights = torch.tensor([float(len(x)) for x in sounds])

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rows = torch.multinomial(self.weights, self.batch_size, replacement=True, generator=generator)
        places = torch.rand(self.batch_size, generator=generator)
        pieces = [self.piece(int(row), float(place)) for row, place in zip(rows, places)]
        return {name: torch.stack([piece[name] for piece in pieces]) for name in pieces[0]}

    def piece(self, row: int, place: float) -> dict[str, Tensor]:
        """The piece of a sound that begins at a fraction of what is possible."""
        x = self.sounds[row]
        total = -(-len(x) // self.hop)
        first = int(place * (max(total - self.frames, 0) + 1))
        size = self.frames * self.hop
        audio = x[first * self.hop :][:size]
        piece = {"x": nn.functional.pad(audio, (0, size - len(audio)))}
        if self.pitches is not None:
            f0, voiced = (z[first : first + self.frames] for z in self.pitches[row])
            missing = self.frames - len(f0)
            f0 = torch.cat([f0, f0[-1:].expand(missing)])
            piece |= {"f0": f0.clamp_min(60.0), "voiced": nn.functional.pad(voiced, (0, missing))}
        return piece
