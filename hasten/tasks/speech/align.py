"""Monotonic alignment search: how many frames each token lasts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["monotonic_durations"]


def monotonic_durations(scores: Tensor, tokens: Tensor, frames: Tensor) -> Tensor:
    """Frames of each token along the monotonic path of the highest sum of scores.

        Q[t, j] = scores[t, j] + max(Q[t, j - 1], Q[t - 1, j - 1])

    Every token gets at least one frame, and the path begins at the first token and ends at the last. All samples of the
    batch take a step at once.

    Args:
        scores: (B, T, L), of token t at frame j.
        tokens: (B,), tokens of each sample.
        frames: (B,), frames of each sample, at least as many.

    Returns:
        (B, T) int64.

    References:
        Kim, Kim, Kong, Yoon 2020, arXiv:2005.11129.
    """
    s = scores.detach().cpu().numpy().astype(np.float32)
    B, T, L = s.shape
    last_token, last_frame = tokens.cpu().numpy() - 1, frames.cpu().numpy() - 1
    best = np.full((B, T), -np.inf, np.float32)
    best[:, 0] = s[:, 0, 0]
    moved = np.zeros((L, B, T), bool)  # whether frame j - 1 was at the token before
    columns = np.ascontiguousarray(s.transpose(2, 0, 1))
    before = np.full((B, T), -np.inf, np.float32)
    for j in range(1, L):
        before[:, 1:] = best[:, :-1]
        np.greater(before, best, out=moved[j])
        np.maximum(before, best, out=best)
        best += columns[j]
    rows, at = np.arange(B), last_token.copy()
    durations = np.zeros((B, T), np.int64)
    for j in range(L - 1, -1, -1):
        inside = j <= last_frame
        durations[rows, at] += inside
        at -= inside & (at > 0) & moved[j, rows, at]
    return torch.from_numpy(durations).to(scores.device)
