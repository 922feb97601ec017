"""Learning where the tokens of each clip are, from the clips alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...nets.aligner import STATES, TokenAligner

__all__ = ["fit_aligner"]

# of the preference for even durations in each round: first the diagonal, then what the Gaussians say
DIAGONAL = (3000.0, 1000.0, 300.0, 100.0, 30.0, 10.0)
ROUNDS = 16
SHRINK = 20.0  # frames of all clips that the variance of each Gaussian is mixed with
SMALLEST = 0.1  # variance


@torch.no_grad()
def fit_aligner(aligner: TokenAligner, tokens: Sequence[Tensor], mels: Sequence[Tensor]) -> list[Tensor]:
    """Train an aligner in place by Viterbi training, from equal durations: search, means and variances, search, ...

    It takes about 20 seconds for half an hour of speech.

    Args:
        aligner: with any Gaussians.
        tokens: (T,) of each clip.
        mels: log mels (M, L) of each clip.

    Returns:
        Frames of each token of each clip, (T,) int64.

    References:
        Rabiner 1989, Proceedings of the IEEE 77.
    """
    raw = [aligner.raw_features(mel) for mel in mels]
    everything = torch.cat(raw)
    aligner.center.copy_(everything.mean(0))
    aligner.scale.copy_(everything.std(0).clamp_min(1e-4))
    features = [(one - aligner.center) / aligner.scale for one in raw]
    everything = torch.cat(features)
    states = [aligner.states(one)[0] for one in tokens]
    aligner.mean.zero_()
    aligner.var.fill_(1)
    count = aligner.config["symbols"] * STATES
    for turn in range(ROUNDS):
        diagonal = DIAGONAL[turn] if turn < len(DIAGONAL) else 0.0
        durations = aligner.search(states, features, diagonal)
        at = torch.cat([torch.repeat_interleave(one, frames) for one, frames in zip(states, durations)])
        frames = torch.zeros(count).index_add(0, at, torch.ones(len(at)))[:, None]
        mean = torch.zeros_like(aligner.mean).index_add(0, at, everything) / frames.clamp_min(1)
        square = torch.zeros_like(aligner.mean).index_add(0, at, (everything - mean[at]).square())
        aligner.mean.copy_(mean)
        aligner.var.copy_(((square + SHRINK) / (frames + SHRINK)).clamp_min(SMALLEST))
    return aligner(tokens, mels)
