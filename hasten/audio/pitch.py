"""The fundamental frequency of speech: YIN's difference function with a Viterbi search over lags."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BadInput
from .mel import MelSettings, frames_of

if TYPE_CHECKING:
    import numpy as np

__all__ = ["track_pitch"]

THRESHOLD = 0.25  # of the normalised difference: a frame whose path costs more than that is unvoiced
SWITCH = 0.2  # cost of a change between voiced and unvoiced
JUMP = 2.0  # cost of an octave between frames that follow one another
QUIET = 1e-3  # frames of a smaller peak amplitude are unvoiced


def track_pitch(
    audio: Tensor, settings: MelSettings | None = None, low: float = 60.0, high: float = 500.0
) -> tuple[Tensor, Tensor]:
    """The fundamental frequency of each frame of `mel(audio, settings)`.

    Each lag tau costs YIN's `d'(tau) = d(tau) tau / sum_{j <= tau} d(j)`, with `d(tau) = sum (x_t - x_{t+tau})^2`; the
    path of least cost through all frames may jump or be unvoiced, at a cost. Lags are refined by a parabola.

    Args:
        audio: (n,) in [-1, 1].
        settings: sample rate, hop and padding of the frames.
        low, high: lowest and highest frequency in Hz.

    Returns:
        f0 in Hz (L,), interpolated through unvoiced frames, its logarithm linearly; 0 where no frame is voiced.
        Whether a frame is voiced (L,), bool.

    Raises:
        BadInput: for audio that is not (n,), and for frequencies outside `0 < low < high < sample_rate / 4`.

    References:
        de Cheveigne, Kawahara 2002, J. Acoust. Soc. Am. 111 (YIN); Mauch, Dixon 2014, ICASSP (Viterbi search).
    """
    settings = settings or MelSettings()
    if audio.ndim != 1 or not len(audio):
        raise BadInput(f"track_pitch needs audio (n,), got {tuple(audio.shape)}")
    if not 0 < low < high < settings.sample_rate / 4:
        raise BadInput(f"pitch needs 0 < low < high < {settings.sample_rate / 4:g} Hz, got {low:g} and {high:g}")
    first, last = int(settings.sample_rate / high), int(settings.sample_rate / low) + 1
    cost, quiet = normalised_difference(audio.float().cpu(), settings, first, last)
    path = cheapest_path(cost.float().numpy(), quiet.numpy(), first)
    voiced = torch.from_numpy(path >= 0)
    places = torch.from_numpy(path).clamp_min(0)
    lags = refined_lags(cost, places) + first
    f0 = settings.sample_rate / lags
    return through_unvoiced(f0, voiced), voiced


def normalised_difference(audio: Tensor, settings: MelSettings, first: int, last: int) -> tuple[Tensor, Tensor]:
    """YIN's d' (L, last - first + 1) of lags first..last, and which frames are quiet (L,)."""
    frames, width = frames_of(len(audio), settings), 2 * last  # a window of two periods of the lowest frequency
    span = width + last
    centre = settings.hop // 2 if settings.padding == "same" else 0
    left = span // 2 - centre
    right = max(0, (frames - 1) * settings.hop + span - left - len(audio))
    x = F.pad(audio, (left, right)).unfold(0, span, settings.hop)[:frames].double()
    size = 1 << (span + width).bit_length()
    head = torch.fft.rfft(x[:, :width], size)
    cross = torch.fft.irfft(torch.fft.rfft(x, size) * head.conj(), size)[:, : last + 1]
    energy = F.pad(x.square().cumsum(1), (1, 0))
    lags = torch.arange(last + 1)
    shifted = energy[:, lags + width] - energy[:, lags]
    difference = (shifted[:, :1] + shifted - 2 * cross).clamp_min(0)
    total = difference[:, 1:].cumsum(1).clamp_min(1e-12)
    normalised = difference[:, 1:] * lags[1:] / total  # of lags 1, 2, ...
    quiet = x[:, :width].abs().amax(1) < QUIET
    return normalised[:, first - 1 : last], quiet


def cheapest_path(cost: np.ndarray, quiet: np.ndarray, first: int) -> np.ndarray:
    """The lag of each frame as an index into the costs (L, S) of lags from `first` on; -1 where it is unvoiced."""
    import numpy as np

    frames, states = cost.shape
    places = np.log2(np.arange(first, first + states))
    moves = (JUMP * np.abs(places[:, None] - places[None])).astype(cost.dtype)
    best, unvoiced = cost[0].copy(), THRESHOLD
    if quiet[0]:
        best = best + 10.0
    back = np.empty((frames, states), np.int32)
    back_unvoiced = np.empty(frames, np.int32)
    for k in range(1, frames):
        trial = best[None] + moves
        choice = trial.argmin(1)
        least = trial[np.arange(states), choice]
        begins = unvoiced + SWITCH < least
        back[k] = np.where(begins, -1, choice)
        cheapest = int(best.argmin())
        stays = unvoiced <= best[cheapest] + SWITCH
        back_unvoiced[k] = -1 if stays else cheapest
        entry = unvoiced + SWITCH
        unvoiced = (unvoiced if stays else best[cheapest] + SWITCH) + THRESHOLD
        best = np.where(begins, entry, least) + cost[k] + (10.0 if quiet[k] else 0.0)
    path = np.empty(frames, np.int64)
    path[-1] = -1 if unvoiced <= best.min() else int(best.argmin())
    for k in range(frames - 1, 0, -1):
        path[k - 1] = back_unvoiced[k] if path[k] < 0 else back[k, path[k]]
    return path


def refined_lags(cost: Tensor, places: Tensor) -> Tensor:
    """The least cost within three lags of the places, with the fraction at which a parabola through it is least."""
    rows = torch.arange(len(places))
    near = (places[:, None] + torch.arange(-3, 4)).clamp(1, cost.shape[1] - 2)
    places = near[rows, cost[rows[:, None], near].argmin(1)]
    left, middle, right = (cost[rows, places + d] for d in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = torch.where(bend > 1e-9, (left - right) / (2 * bend.clamp_min(1e-9)), torch.zeros_like(bend))
    return places + shift.clamp(-0.5, 0.5)


def through_unvoiced(f0: Tensor, voiced: Tensor) -> Tensor:
    """f0 (L,), float32, with unvoiced frames from their voiced neighbours."""
    import numpy as np

    if not voiced.any():
        return torch.zeros(len(f0))
    known = torch.nonzero(voiced)[:, 0].numpy()
    log = np.interp(np.arange(len(f0)), known, f0[voiced].log().numpy())
    return torch.from_numpy(np.exp(log)).float()
