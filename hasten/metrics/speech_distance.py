"""Distances of speech from a recording of the same words: mel, cepstra and pitch, after an alignment in time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..audio.mel import MelSettings, mel
from ..audio.pitch import track_pitch
from ..errors import BadInput
from ..utils.dct import dct_matrix

__all__ = ["SpeechDistance", "align", "cepstra", "speech_distance"]

CEPSTRA = 13  # coefficients 1 to 13
DECIBEL = 10 / math.log(10) * math.sqrt(2)


@dataclass(frozen=True)
class SpeechDistance:
    """Distances of a sound from a recording.

    Args:
        mel_l1: mean absolute difference of log mels (natural logarithm), over the aligned frames.
        cepstral: mel-cepstral distortion in dB: `10 sqrt(2) / log 10` times the mean Euclidean distance of
            coefficients 1 to 13 of the cosine transform of the log mel.
        f0_cents: root of the mean squared difference of f0 in cents, where both are voiced.
        voicing: fraction of the aligned frames of which only one is voiced.
        length: seconds of the sound over those of the recording.
    """

    mel_l1: float
    cepstral: float
    f0_cents: float
    voicing: float
    length: float


def speech_distance(
    recording: Tensor, sound: Tensor, settings: MelSettings | None = None, aligned: bool = False
) -> SpeechDistance:
    """The distances of a sound from a recording of the same words.

    Args:
        recording, sound: audio (n,) and (m,) at the settings' sample rate.
        settings: of the mel spectrograms.
        aligned: the sound has the times of the recording, as copy-synthesis has: frame k is compared with frame k.
            Else by the path of dynamic time warping on the cepstra.

    Raises:
        BadInput: for sounds that are empty or not (n,).

    References:
        Kubichek 1993, Mel-cepstral distance measure for objective speech quality assessment.
    """
    settings = settings or MelSettings()
    for x in (recording, sound):
        if x.ndim != 1 or not len(x):
            raise BadInput(f"audio must be (n,) with at least one sample, got {tuple(x.shape)}")
    mels = [mel(x.float(), settings) for x in (recording, sound)]
    coefficients = [cepstra(m) for m in mels]
    if aligned:
        shorter = min(m.shape[1] for m in mels)
        rows = columns = torch.arange(shorter)
    else:
        rows, columns = align(coefficients[0], coefficients[1])
    pitches = [track_pitch(x, settings) for x in (recording, sound)]
    (f0, voiced), (g0, other) = ((f[i], v[i]) for (f, v), i in zip(pitches, (rows, columns)))
    both = voiced & other
    cents = 1200 * (g0[both] / f0[both]).log2()
    return SpeechDistance(
        float((mels[0][:, rows] - mels[1][:, columns]).abs().mean()),
        float(DECIBEL * (coefficients[0][:, rows] - coefficients[1][:, columns]).norm(dim=0).mean()),
        float(cents.square().mean().sqrt()) if both.any() else math.nan,
        float((voiced != other).float().mean()),
        len(sound) / len(recording),
    )


def cepstra(mel: Tensor, count: int = CEPSTRA) -> Tensor:
    """Coefficients 1 to `count` (count, L) of log mels (M, L): `C m / sqrt(2 M)` of the orthonormal cosine transform.

    So scaled, the log spectrum is `sum_k c_k cos(...)` times 2, as for cepstra of a spectrum's logarithm.
    """
    bands = len(mel)
    return (dct_matrix(bands)[1 : count + 1].to(mel) @ mel) / math.sqrt(2 * bands)


def align(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The path of least total distance through frames (D, L) and (D, K), which begins and ends at both ends.

    Returns:
        Frames of `a` and of `b`, two lists of one length.

    References:
        Sakoe, Chiba 1978, IEEE Trans. ASSP 26 (dynamic time warping).
    """
    import numpy as np

    cost = torch.cdist(a.T.double(), b.T.double()).numpy()
    rows, columns = cost.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0.0
    for line in range(rows + columns - 1):  # anti-diagonals: all their entries depend on the two before
        at: np.ndarray = np.arange(max(0, line - columns + 1), min(rows, line + 1))
        to: np.ndarray = line - at
        before = np.minimum(np.minimum(total[at, to], total[at, to + 1]), total[at + 1, to])
        total[at + 1, to + 1] = cost[at, to] + before
    i, j = rows, columns
    path: list[tuple[int, int]] = []
    while i and j:
        path.append((i - 1, j - 1))
        moves = ((i - 1, j - 1), (i - 1, j), (i, j - 1))
        i, j = min(moves, key=lambda place: total[place])
    pairs = torch.tensor(path[::-1])
    return pairs[:, 0], pairs[:, 1]
