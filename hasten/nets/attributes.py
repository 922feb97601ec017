"""Classifiers that predict attributes of the final image from the middle features of a denoising network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pool_features(middle: Tensor, pool: int) -> Tensor:
    """Average middle features (B, C, h, w) over a pool x pool grid (0: no pooling): (B, D) float32."""
    middle = middle.float()
    return (F.adaptive_avg_pool2d(middle, pool) if pool else middle).flatten(1)


class Attributes(nn.Module):
    """Time-dependent linear classifiers of middle features: `(B, C, h, w), t -> logits (B, K)`.

    `logits = W(t) pool(middle) + b(t)`, with W and b linear in t between the knots and constant beyond them; float32
    in any autocast. There are several attributes, each with its own number of classes. With `means`, also the mean
    features of each class, unpooled and interpolated in the same way.

    Args:
        shape: (C, h, w) of the middle features.
        classes: number of classes of each attribute by name, at least 2.
        times: the knots, increasing, in [0, 1].
        pool: the classifiers read features averaged over a pool x pool grid; 0: not averaged.
        means: store the mean features of each class.

    Raises:
        ValueError: for shapes, class counts or knots that are not valid.

    References:
        Parihar et al. 2024, arXiv:2402.18206 (there: one classifier per sampling step).
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
            "shape": list(self.shape),
            "classes": self.classes,
            "times": list(self.times),
            "pool": pool,
            "means": means,
        }
        C, h, w = self.shape
        width = C * pool * pool if pool else C * h * w
        knots = len(self.times)
        self.weight = nn.ParameterDict({name: torch.zeros(knots, K, width) for name, K in self.classes.items()})
        self.bias = nn.ParameterDict({name: torch.zeros(knots, K) for name, K in self.classes.items()})
        self.mean = nn.ParameterDict(
            {name: torch.zeros(knots, K, C * h * w) for name, K in self.classes.items()} if means else {}
        )

    def blend(self, t: Tensor) -> Tensor:
        """Interpolation weights of the knots at the times `t` (n,): (n, T) float32, rows that sum to 1."""
        knots = torch.tensor(self.times, dtype=torch.float64)
        t = t.detach().cpu().double().clamp(knots[0], knots[-1])
        if len(knots) == 1:
            return torch.ones(len(t), 1)
        i = torch.searchsorted(knots, t, right=True).clamp(1, len(knots) - 1)
        fraction = (t - knots[i - 1]) / (knots[i] - knots[i - 1])
        out = torch.zeros(len(t), len(knots), dtype=torch.float64)
        out.scatter_(1, (i - 1)[:, None], 1 - fraction[:, None])
        return out.scatter_(1, i[:, None], fraction[:, None]).float()

    def at(self, name: str, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Weight (K, C h w) and bias (K,) of one attribute's classifier at one time, for flattened middle features."""
        W, b = self.weight[name].float(), self.bias[name].float()
        W, b = self._at_time(W, t), self._at_time(b, t)
        C, h, w = self.shape
        if not self.pool:
            return W, b
        # pooling is linear: its matrix (pool^2, h w) from its effect on each pixel of an (h, w) map
        pixels = torch.eye(h * w, device=W.device).reshape(h * w, 1, h, w)
        averages = F.adaptive_avg_pool2d(pixels, self.pool).reshape(h * w, -1).T
        return (W.reshape(-1, C, self.pool**2) @ averages).reshape(len(W), -1), b

    def towards(self, name: str, t: Tensor | float) -> Tensor:
        """Mean features of each class at one time, minus their average: (K, C h w) float32."""
        mean = self.mean[name].float()
        mean = self._at_time(mean, t)
        return mean - mean.mean(0)

    def _at_time(self, knots: Tensor, t: Tensor | float) -> Tensor:
        """Values (T, ...) at the knots interpolated to one time; the weights are numbers, which are not copied."""
        weights = self.blend(torch.as_tensor(t, dtype=torch.float64).reshape(1))[0].tolist()
        return torch.stack([knots[k] * w for k, w in enumerate(weights) if w]).sum(0)

    def forward(self, middle: Tensor, t: Tensor | float, name: str) -> Tensor:
        """Logits (B, K) of the attribute `name` for middle features (B, C, h, w) at times t, () or (B,)."""
        with torch.autocast(middle.device.type, enabled=False):
            t = torch.as_tensor(t, dtype=torch.float64).reshape(-1)
            weights = self.blend(t).to(middle.device).expand(len(middle), -1)
            features = pool_features(middle, self.pool)
            logits = torch.einsum("bd,tkd->btk", features, self.weight[name].float()) + self.bias[name].float()
            return torch.einsum("bt,btk->bk", weights, logits)
