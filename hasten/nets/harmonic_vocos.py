"""A vocoder with an inverse-STFT head that filters a pulse train and noise: it is trained on a CPU within an hour."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.mel_scale import mel_filter_bank
from ..utils.stft import inverse_stft, short_time_fourier
from .vocos import VocosBackbone, VocosHead

__all__ = ["HarmonicVocos", "PitchHead", "pulse_train"]


class HarmonicVocos(nn.Module):
    """Log mel (B, M, L) -> audio:

        iSTFT( exp(a + i b) STFT(pulses of pitch f0) + exp(c) STFT(white noise) )

    with the filters a, b and c of a Vocos network; a and c are differences from the mel itself, interpolated. A
    network of one convolutional receptive field cannot know the phase of a harmonic, the integral of its frequency over
    all time; a pulse train has it, so that the network learns smooth filters only, from spectral losses. The transform
    has `frames` frames for each one of the mel spectrogram, of a window as many times shorter: onsets are sharper.

    Args:
        mels: M.
        dim: channels of the blocks.
        hidden: their inner channels.
        layers: number of blocks.
        n_fft, hop: of the mel spectrogram, whose padding is `same`.
        frames: transform frames for each mel frame; divides n_fft and hop.
        sample_rate: in Hz.
        fmin, fmax: of the mel spectrogram in Hz, of Slaney's scale and norm; fmax 0: sample_rate / 2.
        floor: smallest value before the logarithm of the mel spectrogram.
        corrections: how often the sound is corrected to have the mel spectrogram that it is made from (`correct`).
        low, high: range of f0 in Hz.

    References:
        Siuzdak 2023, arXiv:2306.00814 (the network); Liu, Chen, Yu 2020, Neural homomorphic vocoder, Interspeech;
        Engel et al. 2020, arXiv:2001.04643 (harmonics and filtered noise).
    """

    bank: Tensor
    mel_spread: Tensor
    spread: Tensor

    def __init__(
        self,
        mels: int = 80,
        dim: int = 192,
        hidden: int = 576,
        layers: int = 6,
        n_fft: int = 1024,
        hop: int = 256,
        frames: int = 2,
        sample_rate: int = 16000,
        fmin: float = 0.0,
        fmax: float = 0.0,
        floor: float = 1e-5,
        corrections: int = 1,
        low: float = 60.0,
        high: float = 500.0,
    ) -> None:
        super().__init__()
        self.config = {
            "mels": mels, "dim": dim, "hidden": hidden, "layers": layers, "n_fft": n_fft, "hop": hop, "frames": frames,
            "sample_rate": sample_rate, "fmin": fmin, "fmax": fmax,
            "floor": floor, "corrections": corrections, "low": low, "high": high,
        }  # fmt: skip
        self.frames, self.n_fft, self.hop = frames, n_fft // frames, hop // frames
        self.sample_rate, self.floor, self.corrections = sample_rate, floor, corrections
        self.mel_fft, self.mel_hop = n_fft, hop
        self.bins = self.n_fft // 2 + 1
        # the logarithm of the magnitude of noise of unit power: filters of area 1, and a window of power 3 n_fft / 8
        self.level = -math.log(n_fft / sample_rate) - 0.5 * math.log(0.375 * n_fft)
        self.backbone = VocosBackbone(mels, dim, hidden, layers)
        self.head = VocosHead(dim, 3 * frames * self.bins)
        self.pitch = PitchHead(dim, low, high)
        nn.init.normal_(self.head.out.weight, std=0.01)
        nn.init.zeros_(self.head.out.bias)
        filters = mel_filter_bank(sample_rate, n_fft, mels, (fmin, fmax or sample_rate / 2))
        with torch.no_grad():  # at first both parts have half of the power
            self.head.out.bias.view(frames, 3, self.bins)[:, ::2] = -0.5 * math.log(2)
        self.register_buffer("bank", filters, persistent=False)
        full = envelope_matrix(filters, n_fft // 2 + 1, sample_rate)
        self.register_buffer("mel_spread", full, persistent=False)
        self.register_buffer("spread", envelope_matrix(filters, self.bins, sample_rate), persistent=False)

    def forward(self, mel: Tensor, f0: Tensor | None = None, seed: int | None = 0) -> Tensor:
        """Audio (B, L hop).

        Args:
            mel: (B, M, L).
            f0: in Hz (B, L), above 0 also where a frame is unvoiced. Default: what the network reads from `mel`.
            seed: of the noise and of the pulses' first phase; None for torch's global generator.
        """
        x = self.backbone(mel)
        audio = self.synthesise(self.filters(x, mel), self.pitch(x) if f0 is None else f0, seed)
        return self.correct(audio, mel)

    def filters(self, x: Tensor, mel: Tensor) -> Tensor:
        """a, b and c (B, 3, n_fft / 2 + 1, frames L) of features (B, L, dim) and the mel (B, M, L)."""
        n, length = x.shape[:2]
        out = self.head(x).view(n, length * self.frames, 3, self.bins).permute(0, 2, 3, 1).float()
        fine = F.interpolate(mel.float(), scale_factor=self.frames, mode="linear", align_corners=False)
        envelope = self.spread @ fine + self.level
        return out + torch.stack([envelope, torch.zeros_like(envelope), envelope], 1)

    def synthesise(self, filters: Tensor, f0: Tensor, seed: int | None = 0) -> Tensor:
        """Audio of filters (B, 3, n_fft / 2 + 1, frames L) and pitch (B, L) in Hz."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        n, samples = len(filters), filters.shape[-1] * self.hop
        # drawn on the CPU for all devices; one row for all clips where there is a seed, so that batches change nothing
        rows = 1 if seed is not None else n
        noise = torch.randn(rows, samples, generator=generator).to(filters)
        phase = torch.rand(rows, 1, generator=generator).to(filters)
        pulses = pulse_train(f0.to(filters), self.hop * self.frames, self.sample_rate, phase)
        source = short_time_fourier(pulses, self.n_fft, self.hop)
        noise = short_time_fourier(noise, self.n_fft, self.hop)
        a, b, c = filters.clamp(-30, 8).unbind(1)
        return inverse_stft(torch.polar(a.exp(), b) * source + c.exp() * noise, self.n_fft, self.hop)

    def correct(self, audio: Tensor, mel: Tensor) -> Tensor:
        """Audio (B, n) whose transform is multiplied by what its own mel spectrum lacks, `corrections` times.

        The factor is the exponential of `mel - mel(audio)`, interpolated between the bands and at most `e^3`.
        """
        mel = mel.float()
        for _ in range(self.corrections):
            spectrum = short_time_fourier(audio, self.mel_fft, self.mel_hop)
            magnitude = (torch.view_as_real(spectrum).square().sum(-1) + 1e-9).sqrt()
            own = (self.bank @ magnitude).clamp_min(self.floor).log()
            factor = (self.mel_spread @ (mel - own)).clamp(-3, 3).exp()
            audio = inverse_stft(spectrum * factor, self.mel_fft, self.mel_hop)
        return audio


def envelope_matrix(filters: Tensor, bins: int, sample_rate: int) -> Tensor:
    """A matrix (bins, M) that interpolates between the centres of mel filters (M, any), up to half the sample rate."""
    filters, mels = filters.double() + 1e-12, len(filters)
    hz = torch.linspace(0, sample_rate / 2, filters.shape[1], dtype=torch.float64)
    centres = (filters * hz).sum(1) / filters.sum(1)
    at = torch.linspace(0, sample_rate / 2, bins, dtype=torch.float64).clamp(centres[0], centres[-1])
    right = torch.searchsorted(centres, at).clamp(1, mels - 1)
    share = (at - centres[right - 1]) / (centres[right] - centres[right - 1])
    matrix = torch.zeros(bins, mels, dtype=torch.float64)
    rows = torch.arange(bins)
    matrix[rows, right - 1] += 1 - share
    matrix[rows, right] += share
    return matrix.float()


class PitchHead(nn.Module):
    """Features (B, L, dim) -> f0 in Hz (B, L): a class for each of some steps of its logarithm, as CREPE has them.

    Where no class is likely, the pitch is that of the frames around.

    References:
        Kim et al. 2018, arXiv:1802.06182 (CREPE).
    """

    centres: Tensor

    def __init__(self, dim: int, low: float, high: float, classes: int = 128) -> None:
        super().__init__()
        self.out = nn.Linear(dim, classes + 1)  # the last one is unvoiced
        self.register_buffer("centres", torch.linspace(math.log(low), math.log(high), classes), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        p = self.out(x).float().softmax(-1)[..., :-1]
        n, length, classes = p.shape
        best = p.argmax(-1, keepdim=True)
        near = (torch.arange(classes, device=p.device) - best).abs() <= 2
        weight = p * near
        log = (weight * self.centres).sum(-1) / weight.sum(-1).clamp_min(1e-9)
        voiced = p.sum(-1).square()
        kernel = torch.tensor([1e-3, 1e-3, 1e-3, 0.02, 0.2, 1.0, 0.2, 0.02, 1e-3, 1e-3, 1e-3], device=p.device)
        both = torch.stack([voiced * log, voiced], 1).reshape(2 * n, 1, length) + 1e-6 * self.middle(p)
        smooth = F.conv1d(both, kernel.to(both)[None, None], padding=5).view(n, 2, length)
        return (smooth[:, 0] / smooth[:, 1]).clamp(self.centres[0], self.centres[-1]).exp()

    def middle(self, p: Tensor) -> Tensor:
        """What silence has for (w log f0, w): the middle of the range."""
        rows = torch.stack([self.centres.mean(), torch.ones_like(self.centres[0])])
        return rows.repeat(len(p))[:, None, None]

    def loss(self, x: Tensor, f0: Tensor, voiced: Tensor) -> Tensor:
        """The cross-entropy of f0 in Hz (B, L) where it is voiced (B, L), of the last class elsewhere; a scalar."""
        classes = len(self.centres)
        step = (self.centres[-1] - self.centres[0]) / (classes - 1)
        place = (f0.clamp_min(1e-3).log() - self.centres[0]) / step
        target = torch.where(voiced, place.round().clamp(0, classes - 1).long(), classes)
        return F.cross_entropy(self.out(x).float().flatten(0, 1), target.flatten())


def pulse_train(f0: Tensor, hop: int, sample_rate: int, phase: Tensor) -> Tensor:
    """A train of band-limited pulses of unit power: `sqrt(2 / K) sum_{k <= K} cos(k phi)`, K = floor(rate / 2 f0).

    The sum is `sin((K + 1/2) phi) / (2 sin(phi / 2)) - 1/2`, and phi the integral of f0, which is linear between the
    middles of frames.

    Args:
        f0: in Hz (B, L).
        hop: samples of a frame.
        sample_rate: in Hz.
        phase: at the beginning in periods, (B, 1) or (1, 1).

    Returns:
        (B, L hop).
    """
    fine = F.interpolate(f0[:, None], scale_factor=hop, mode="linear", align_corners=False)[:, 0]
    turns = (fine.double() / sample_rate).cumsum(-1) + phase
    phi = (2 * math.pi * (turns - turns.round())).to(f0)  # in [-pi, pi]
    count = (sample_rate / 2 / fine).floor().clamp_min(1)
    half = phi / 2
    small = half.abs() < 1e-4
    ratio = torch.sin((count + 0.5) * phi) / (2 * torch.where(small, torch.ones_like(half), half.sin()))
    return (2 / count).sqrt() * torch.where(small, count, ratio - 0.5)
