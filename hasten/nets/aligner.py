"""Which frames of a spectrogram say which token: Gaussians of each half of a token, and monotonic alignment search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

__all__ = ["TokenAligner", "monotonic_durations"]

STATES = 2  # of each sound: the frames of its beginning and of its end differ
BATCH = 48  # clips of similar length that are searched at once


class TokenAligner(nn.Module):
    """Gaussians of cepstra and their differences in time, two for each sound and one for each pause.

    Args:
        symbols: S, number of tokens.
        mels: M of the log mels.
        pauses: tokens below this number are pauses.
        optional: tokens that may last no frame at all, such as the gap between words.
        cepstra: coefficients.

    References:
        Rabiner 1989, Proceedings of the IEEE 77 (Viterbi training); Kim et al. 2020, arXiv:2005.11129 (the search).
    """

    mean: Tensor
    var: Tensor
    center: Tensor
    scale: Tensor
    basis: Tensor

    def __init__(
        self, symbols: int, mels: int = 80, pauses: int = 8, optional: Sequence[int] = (3, 4), cepstra: int = 16
    ) -> None:
        super().__init__()
        cepstra = min(cepstra, mels)
        self.config: dict[str, Any] = {
            "symbols": symbols, "mels": mels, "pauses": pauses, "optional": list(optional), "cepstra": cepstra,
        }  # fmt: skip
        m, k = torch.arange(mels, dtype=torch.float64), torch.arange(cepstra, dtype=torch.float64)
        basis = torch.cos(math.pi / mels * (m + 0.5) * k[:, None]) * math.sqrt(2 / mels)
        self.register_buffer("basis", basis.float(), persistent=False)
        self.register_buffer("mean", torch.zeros(symbols * STATES, 2 * cepstra))
        self.register_buffer("var", torch.ones(symbols * STATES, 2 * cepstra))
        self.register_buffer("center", torch.zeros(2 * cepstra))
        self.register_buffer("scale", torch.ones(2 * cepstra))

    def raw_features(self, mel: Tensor) -> Tensor:
        """Cepstra of a log mel (M, L) and their differences, (L, 2 C)."""
        c = (self.basis @ mel.float()).T
        slope = torch.zeros_like(c)
        slope[1:-1] = (c[2:] - c[:-2]) / 2
        return torch.cat([c, slope], 1)

    def features(self, mel: Tensor) -> Tensor:
        """Standardised `raw_features`."""
        return (self.raw_features(mel) - self.center) / self.scale

    def states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The Gaussian of each state of a text, and its token's place, each (T',)."""
        counts = torch.where(tokens < self.config["pauses"], 1, STATES)
        place = torch.repeat_interleave(torch.arange(len(tokens)), counts)
        first = torch.cumsum(counts, 0) - counts
        return tokens[place] * STATES + torch.arange(len(place)) - first[place], place

    def forward(self, tokens: Sequence[Tensor], mels: Sequence[Tensor]) -> list[Tensor]:
        """Frames of each token of each clip, (T,) int64.

        Args:
            tokens: (T,) each.
            mels: log mels (M, L) each, with at least as many frames as `minimum_frames(tokens)`.
        """
        found = self.search([self.states(one)[0] for one in tokens], [self.features(one) for one in mels])
        out = []
        for one, frames in zip(tokens, found):
            out.append(torch.zeros(len(one), dtype=torch.int64).index_add(0, self.states(one)[1], frames))
        return out

    def minimum_frames(self, tokens: Tensor) -> int:
        """Frames that a text needs at least."""
        return len(self.states(tokens)[0])

    def search(self, states: Sequence[Tensor], features: Sequence[Tensor], diagonal: float = 0.0) -> list[Tensor]:
        """Frames of each state (T',) of each clip.

        Args:
            states: (T',) each.
            features: (L, F) each.
            diagonal: `diagonal (t / T' - j / L)^2` is subtracted, so that states get about equally many frames.
        """
        optional = torch.tensor([token * STATES for token in self.config["optional"]])
        order = sorted(range(len(features)), key=lambda row: len(features[row]))
        out: list[Any] = [None] * len(order)
        for first in range(0, len(order), BATCH):
            rows = order[first : first + BATCH]
            x = pad_sequence([features[row] for row in rows], batch_first=True).transpose(1, 2)
            at = pad_sequence([states[row] for row in rows], batch_first=True)
            sizes = torch.tensor([len(states[row]) for row in rows])
            frames = torch.tensor([len(features[row]) for row in rows])
            precision = 1 / self.var[at]
            mean = self.mean[at]
            offset = (mean.square() * precision + self.var[at].log()).sum(-1, keepdim=True)
            scores = torch.bmm(precision * mean, x) - 0.5 * (torch.bmm(precision, x.square()) + offset)
            if diagonal:
                t = (torch.arange(at.shape[1]) + 0.5) / sizes[:, None]
                j = (torch.arange(x.shape[2]) + 0.5) / frames[:, None]
                scores = scores - diagonal * (t[:, :, None] - j[:, None]).square()
            durations = monotonic_durations(scores, sizes, frames, torch.isin(at, optional))
            for place, row in enumerate(rows):
                out[row] = durations[place, : len(states[row])]
        return out


def monotonic_durations(scores: Tensor, tokens: Tensor, frames: Tensor, optional: Tensor | None = None) -> Tensor:
    """Frames of each token along the monotonic path of the highest sum of scores.

        Q[t, j] = scores[t, j] + max(Q[t, j - 1], Q[t - 1, j - 1], Q[t - 2, j - 1] where t - 1 is optional)

    The path begins at the first token and ends at the last. A token gets at least one frame, but for optional ones
    (gaps between words), which may be skipped. All samples of the batch take a step at once.

    Args:
        scores: (B, T, L), of token t at frame j.
        tokens: (B,), tokens of each sample.
        frames: (B,), frames of each sample, at least as many.
        optional: (B, T) bool, never for two tokens in a row nor for the first or the last; None: none is.

    Returns:
        (B, T) int64.

    References:
        Kim, Kim, Kong, Yoon 2020, arXiv:2005.11129.
    """
    s: Any = scores.detach().cpu().numpy().astype(np.float32)
    B, T, L = s.shape
    last_token: Any = tokens.cpu().numpy() - 1
    last_frame: Any = frames.cpu().numpy() - 1
    skip = np.full((B, T), -np.inf, np.float32)  # 0 where the token before may be skipped
    if optional is not None:
        skip[:, 2:][optional.cpu().numpy()[:, 1:-1]] = 0
    best = np.full((B, T), -np.inf, np.float32)
    best[:, 0] = s[:, 0, 0]
    moved = np.zeros((L, B, T), np.int8)  # how many tokens before frame j - 1 was
    columns = np.ascontiguousarray(s.transpose(2, 0, 1))
    before = np.full((B, T), -np.inf, np.float32)
    two = np.full((B, T), -np.inf, np.float32)
    for j in range(1, L):
        before[:, 1:] = best[:, :-1]
        two[:, 2:] = best[:, :-2] + skip[:, 2:]
        moved[j] = before > best
        np.maximum(before, best, out=best)
        moved[j][two > best] = 2
        np.maximum(two, best, out=best)
        best += columns[j]
    rows, at = np.arange(B), last_token.copy()
    durations = np.zeros((B, T), np.int64)
    for j in range(L - 1, -1, -1):
        inside = j <= last_frame
        durations[rows, at] += inside
        at -= np.where(inside, np.minimum(moved[j, rows, at], at), 0)
    return torch.from_numpy(durations).to(scores.device)
