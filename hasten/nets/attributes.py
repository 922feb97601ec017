"""What the middle features of a denoising network say about the image that is coming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pool_features(middle: Tensor, pool: int) -> Tensor:
    """Middle features (B, C, h, w) averaged over pool x pool parts (0: as they are), (B, D) float32."""
    middle = middle.float()
    return (F.adaptive_avg_pool2d(middle, pool) if pool else middle).flatten(1)


class Attributes(nn.Module):
    """Linear classifiers of middle features, whose weights move with time: `(B, C, h, w), t -> logits (B, K)`.

    `logits = W(t) pool(middle) + b(t)`, with W and b linear in t between the knots and constant beyond them; float32
    whatever the precision around. Several attributes, each with its own number of classes, are read side by side.

    Beside them, where `means`, the mean features of each class, unpooled and linear in t in the same way.

    shape: (C, h, w) of the middle features. classes: number of classes of each attribute by name, at least 2.
    times: the knots, increasing, in [0, 1]. pool: the classifiers read features that are averaged over pool x pool
    parts of the map; 0: not averaged.

    Reference: Parihar et al. 2024, arXiv:2402.18206 (there: one classifier for every sampling step).
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: Mapping[str, int],
        times: Sequence[float],
        pool: int = 2,
        means: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.times = tuple(shape), tuple(times)
        self.classes, self.pool, self.means = dict(classes), pool, means
        if len(self.shape) != 3 or not 0 <= pool <= min(self.shape[1:]):
            raise ValueError(f"attributes need features (C, h, w) and 0 <= pool <= h, w, got {self.shape} and {pool}")
        if not self.classes or min(self.classes.values()) < 2:
            raise ValueError(f"attributes need at least 2 classes each, got {self.classes}")
        if not self.times or list(self.times) != sorted(set(self.times)):
            raise ValueError(f"attributes need increasing times, got {self.times}")
        self.config = {
            "shape": list(self.shape), "classes": self.classes, "times": list(self.times), "pool": pool,
            "means": means,
        }  # fmt: skip
        C, h, w = self.shape
        width = C * pool * pool if pool else C * h * w
        knots = len(self.times)
        self.weight = nn.ParameterDict({name: torch.zeros(knots, K, width) for name, K in self.classes.items()})
        self.bias = nn.ParameterDict({name: torch.zeros(knots, K) for name, K in self.classes.items()})
        self.mean = nn.ParameterDict(
            {name: torch.zeros(knots, K, C * h * w) for name, K in self.classes.items()} if means else {}
        )

    def blend(self, t: Tensor) -> Tensor:
        """How much each knot counts at the times `t` (n,): (n, T) float32, rows that sum to 1."""
        knots = torch.tensor(self.times, dtype=torch.float64)
        t = t.detach().cpu().double().clamp(knots[0], knots[-1])
        if len(knots) == 1:
            return torch.ones(len(t), 1)
        i = torch.searchsorted(knots, t, right=True).clamp(1, len(knots) - 1)
        share = (t - knots[i - 1]) / (knots[i] - knots[i - 1])
        out = torch.zeros(len(t), len(knots), dtype=torch.float64)
        out.scatter_(1, (i - 1)[:, None], 1 - share[:, None])
        return out.scatter_(1, i[:, None], share[:, None]).float()

    def at(self, name: str, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """The classifier of one attribute at one time, as it acts on the flattened middle: (K, C h w) and (K,)."""
        W, b = self.weight[name].float(), self.bias[name].float()
        share = self.blend(torch.as_tensor(t, dtype=torch.float64).reshape(1))[0].to(W.device)
        W, b = torch.einsum("t,tkd->kd", share, W), share @ b
        C, h, w = self.shape
        if not self.pool:
            return W, b
        # averaging is linear: what it does to each pixel of an (h, w) map, as (pool^2, h w)
        pixels = torch.eye(h * w, device=W.device).reshape(h * w, 1, h, w)
        averages = F.adaptive_avg_pool2d(pixels, self.pool).reshape(h * w, -1).T
        return (W.reshape(-1, C, self.pool**2) @ averages).reshape(len(W), -1), b

    def towards(self, name: str, t: Tensor | float) -> Tensor:
        """Mean features of each class at one time, less the average of these: (K, C h w) float32."""
        mean = self.mean[name].float()
        share = self.blend(torch.as_tensor(t, dtype=torch.float64).reshape(1))[0].to(mean.device)
        mean = torch.einsum("t,tkd->kd", share, mean)
        return mean - mean.mean(0)

    def forward(self, middle: Tensor, t: Tensor | float, name: str) -> Tensor:
        """Logits (B, K) of an attribute; t () or (B,)."""
        with torch.autocast(middle.device.type, enabled=False):
            t = torch.as_tensor(t, dtype=torch.float64).reshape(-1)
            share = self.blend(t).to(middle.device).expand(len(middle), -1)
            each = (
                torch.einsum("bd,tkd->btk", pool_features(middle, self.pool), self.weight[name].float())
                + self.bias[name].float()
            )
            return torch.einsum("bt,btk->bk", share, each)
