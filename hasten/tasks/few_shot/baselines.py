"""Few-shot classifiers without a diffusion model, on pixels or features: what a diffusion model has to beat.

All have `fit(X, y)` and `predict(X)` of features (n, D); `PrototypicalNetwork` takes images (n, C, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BadInput, check_int
from ...utils.random import global_seed, make_generator

__all__ = ["LinearProbe", "NearestNeighbour", "PrototypicalNetwork", "TipAdapter"]


class Baseline:
    """What they have in common: classes, `predict` and `score` from `scores` (n, K)."""

    classes_: np.ndarray

    def _classes(self, y: Any) -> Tensor:
        """Note the classes; the index of each label."""
        self.classes_, index = np.unique(np.asarray(y), return_inverse=True)
        if len(self.classes_) < 2:
            raise BadInput(f"classification needs two classes or more, found {len(self.classes_)}")
        return torch.from_numpy(index.reshape(-1))

    def scores(self, X: Tensor) -> Tensor:
        """A score (n, K) of each class, the more the better."""
        raise NotImplementedError

    def predict(self, X: Tensor) -> np.ndarray:
        """The class of each row."""
        predicted: np.ndarray = self.classes_[self.scores(X).argmax(1).numpy()]
        return predicted

    def score(self, X: Tensor, y: Any) -> float:
        """The fraction of rows whose predicted class is that of `y`."""
        return float((self.predict(X) == np.asarray(y)).mean())


@dataclass(eq=False)
class NearestNeighbour(Baseline):
    """The class of the nearest shot."""

    def fit(self, X: Tensor, y: Any) -> NearestNeighbour:
        """Keep the shots (n, D)."""
        self._index, self._shots = self._classes(y), X.float()
        return self

    def scores(self, X: Tensor) -> Tensor:
        """Minus the distance to the nearest shot of each class."""
        far = torch.cdist(X.float(), self._shots)
        return torch.stack([-far[:, self._index == k].amin(1) for k in range(len(self.classes_))], 1)


@dataclass(eq=False)
class LinearProbe(Baseline):
    """Logistic regression on standardised features, with an L2 penalty.

    Args:
        penalty: factor of the squared weights.
        iterations: of L-BFGS.
    """

    penalty: float = 1e-2
    iterations: int = 100

    def fit(self, X: Tensor, y: Any) -> LinearProbe:
        """Fit features (n, D)."""
        index = self._classes(y)
        self._mean, self._std = X.float().mean(0), X.float().std(0).clamp(min=1e-3)
        rows = self._standard(X)
        self._weight = torch.zeros(len(self.classes_), X.shape[1], requires_grad=True)
        self._bias = torch.zeros(len(self.classes_), requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [self._weight, self._bias], max_iter=self.iterations, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimiser.zero_grad()
            value = F.cross_entropy(rows @ self._weight.T + self._bias, index)
            value = value + self.penalty * self._weight.square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimiser.step(loss)  # type: ignore[arg-type]
        self._weight, self._bias = self._weight.detach(), self._bias.detach()
        return self

    def scores(self, X: Tensor) -> Tensor:
        """Logits."""
        return self._standard(X) @ self._weight.T + self._bias

    def _standard(self, X: Tensor) -> Tensor:
        return (X.float() - self._mean) / self._std


@dataclass(eq=False)
class TipAdapter(Baseline):
    """Tip-Adapter: a cache of the shots' features beside a zero-shot classifier,

        alpha exp(-beta (1 - f F^T)) L + 100 f W^T,

    f, F unit features of image and shots, L their classes, W those of the classes' texts. Features without a text
    encoder have none: the mean features of each class stand in for W.

    Args:
        fine_tune: train F (Tip-Adapter-F).
        alpha, beta: see above.
        epochs: of the training, over all shots at once.
        lr: of the training.

    References:
        Zhang, Zhang, Fang, Gao, Li, Dai, Qiao, Li 2022, arXiv:2207.09519.
    """

    fine_tune: bool = False
    alpha: float = 1.0
    beta: float = 5.5
    epochs: int = 20
    lr: float = 1e-3

    def fit(self, X: Tensor, y: Any) -> TipAdapter:
        """Keep, or train, the shots' features (n, D)."""
        index = self._classes(y)
        features = F.normalize(X.float(), dim=1)
        self._values = F.one_hot(index, len(self.classes_)).float()
        self._keys = features.clone()
        means = [features[index == k].mean(0) for k in range(len(self.classes_))]
        self._texts = F.normalize(torch.stack(means), dim=1)
        if self.fine_tune:
            self._keys.requires_grad_(True)
            optimiser = torch.optim.AdamW([self._keys], lr=self.lr, eps=1e-4)
            with torch.enable_grad():
                for _ in range(self.epochs):
                    optimiser.zero_grad()
                    F.cross_entropy(self.scores(X), index).backward()
                    optimiser.step()
            self._keys = self._keys.detach()
        return self

    def scores(self, X: Tensor) -> Tensor:
        """Logits."""
        features = F.normalize(X.float(), dim=1)
        cache = torch.exp(-self.beta * (1 - features @ self._keys.T)) @ self._values
        return self.alpha * cache + 100 * features @ self._texts.T


class Embedding(nn.Sequential):
    """Four blocks of convolution, batch normalisation, ReLU and pooling: `(B, C, H, W) -> (B, D)`."""

    def __init__(self, channels: int, width: int = 64) -> None:
        layers: list[nn.Module] = []
        for level in range(4):
            layers += [nn.Conv2d(channels if level == 0 else width, width, 3, padding=1), nn.BatchNorm2d(width)]
            layers += [nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
        super().__init__(*layers, nn.Flatten())


@dataclass(eq=False)
class PrototypicalNetwork(Baseline):
    """The class whose mean embedding is nearest, of an embedding trained on episodes from other classes.

    Args:
        ways, shots, queries: classes, shots and queries of each class in an episode.
        episodes: of the training.
        width: channels of the embedding.
        lr: of Adam.
        seed: of weights and episodes.

    References:
        Snell, Swersky, Zemel 2017, arXiv:1703.05175.
    """

    ways: int = 20
    shots: int = 1
    queries: int = 5
    episodes: int = 1000
    width: int = 64
    lr: float = 1e-3
    seed: int = 0
    embedding_: Any = field(default=None, init=False, repr=False)

    def train(self, X: Tensor, y: Any) -> PrototypicalNetwork:
        """Train the embedding on background classes.

        Args:
            X: images (n, C, H, W).
            y: n labels, of at least two classes with shots + queries images.

        Raises:
            BadInput: for fewer.
        """
        check_int("episodes", self.episodes, 1)
        _, index = np.unique(np.asarray(y), return_inverse=True)
        per_class = [np.flatnonzero(index == k) for k in range(int(index.max()) + 1)]
        per_class = [rows for rows in per_class if len(rows) >= self.shots + self.queries]
        ways = min(self.ways, len(per_class))
        if ways < 2:
            raise BadInput(f"episodes need two classes of {self.shots + self.queries} images or more")
        with global_seed(self.seed):
            net = Embedding(X.shape[1], self.width)
        optimiser = torch.optim.Adam(net.parameters(), lr=self.lr)
        generator = make_generator(self.seed)
        for _ in range(self.episodes):
            some = torch.randperm(len(per_class), generator=generator)[:ways].tolist()
            count = self.shots + self.queries
            rows = [per_class[k][torch.randperm(len(per_class[k]), generator=generator)[:count].numpy()] for k in some]
            with torch.enable_grad():
                out = net(X[torch.from_numpy(np.concatenate(rows))]).unflatten(0, (ways, count))
                prototypes, queries = out[:, : self.shots].mean(1), out[:, self.shots :].flatten(0, 1)
                logits = -torch.cdist(queries, prototypes).square()
                loss = F.cross_entropy(logits, torch.arange(ways).repeat_interleave(self.queries))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        self.embedding_ = net.eval().requires_grad_(False)
        return self

    def fit(self, X: Tensor, y: Any) -> PrototypicalNetwork:
        """The prototypes of shots (n, C, H, W). Raises BadInput before `train`."""
        if self.embedding_ is None:
            raise BadInput("the embedding of a PrototypicalNetwork is not trained: call train first")
        index, features = self._classes(y), self.embedding_(X)
        self._prototypes = torch.stack([features[index == k].mean(0) for k in range(len(self.classes_))])
        return self

    def scores(self, X: Tensor) -> Tensor:
        """Minus the squared distances to the prototypes."""
        return -torch.cdist(self.embedding_(X), self._prototypes).square()
