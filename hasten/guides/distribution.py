"""Distribution guidance: a batch of samples with a given distribution of an attribute."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..denoiser import Wrapper
from ..errors import BadInput, check_choice, check_choices, check_numbers
from ..utils.devices import as_float64
from ._base import Guide

__all__ = ["Distribution", "Steered"]

MIN_BATCH = 8  # samples below which a batch hardly determines a distribution
EPSILON = 1e-6


@dataclass(frozen=True)
class Distribution(Guide):
    """Steer a batch so that its attribute has the distribution `classes`, through the network's middle features h.

    Linear classifiers of h (the network "attributes", which `hasten tune MODEL --method attributes` trains) predict the
    attribute of the samples at every evaluation; with r the target distribution and T the temperature,

        p_b = softmax(logits(h_b) / T),  pbar = mean_b p_b,  L = sum_k (pbar_k - r_k)^2 / r_k  (or sum pbar log(pbar/r))
        h_b <- h_b - scale sum_k B dL/dlogit_bk d_k,   and the decoder of the network continues from there.

    All in closed form: no backward pass through the network, negligible cost. The factor B makes a sample's step
    independent of the batch size. Several attributes are several of these guides: their steps add up, each with its own
    scale. With `target` every sample is steered to one class instead, `L = -sum_b p_b[target]` (without the factor B).

    Image k depends on the other images of its batch: the same seeds in batches of another size, or among others, give
    other images. A batch of 100 is steered well, one below 8 is noise (with a warning).

    Args:
        classes: "uniform", or the target fractions of the attribute's classes, all positive; they are normalised.
        attribute: one of the attributes of the classifiers.
        scale: step size, for a unit gradient: in class means, or in logits along the gradient.
        target: index of the class for all samples; None: the distribution.
        start, stop: guide where stop <= t <= start.
        steps: per evaluation, at least 1.
        loss: "chi2" or "kl".
        temperature: > 0. With 1 and calibrated classifiers pbar is the expected fraction, so that any target
            distribution can be reached; the paper's 8, for its steeper classifiers, draws pbar to uniform.
        along: the directions d. "gradient", the paper's: d_k = W_k / |W|^2, the gradient of the classifier; |W|^2, the
            mean squared distance of a class's weights from the mean of all, makes `scale` independent of the scale of
            the features. "means", ours: d_k = mean features of class k at this time minus the average over the classes.
            It is the gradient in the metric of the features' own covariance S, as for Gaussian classes W_k = S^-1
            mean_k. On the bundled teacher it moved the ratio where the gradient did not: `recipes/fashion_debias.py`
            has the figures.
        heads: the classifiers, set by `bind`.

    References:
        Parihar, Bhat, Basu, Mallick, Kundu, Babu 2024 (Balancing Act), arXiv:2402.18206.
    """

    classes: Literal["uniform"] | tuple[float, ...] = "uniform"
    attribute: str = "class"
    scale: float = 16.0
    target: int | None = None
    start: float = 1.0
    stop: float = 0.0
    steps: int = 1
    loss: Literal["chi2", "kl"] = "chi2"
    temperature: float = 1.0
    along: Literal["means", "gradient"] = "means"
    heads: Any = field(default=None, repr=False, metadata={"bound": True})
    negative: ClassVar[tuple[str, ...]] = ("scale",)

    def __post_init__(self) -> None:
        if self.classes != "uniform" and (len(self.classes) < 2 or not all(0 < r < math.inf for r in self.classes)):
            raise BadInput(
                f'distribution needs classes="uniform" or at least two positive fractions, found {self.classes}'
            )
        if not math.isfinite(self.scale):
            raise BadInput(f"distribution needs a finite scale, found {self.scale}")
        if not 0 <= self.stop <= self.start <= 1:
            raise BadInput(f"distribution needs 0 <= stop <= start <= 1, found start={self.start}, stop={self.stop}")
        if self.steps < 1 or not self.temperature > 0:
            raise BadInput(
                f"distribution needs steps >= 1 and temperature > 0, found {self.steps} and {self.temperature:g}"
            )
        check_choices(self, loss=("chi2", "kl"), along=("means", "gradient"))
        check_numbers(self)

    def bind(self, statistics: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> Distribution:
        """The guide with the model's classifiers.

        Raises:
            BadInput: where they are missing, or have no such attribute or another number of classes.
        """
        heads: Any = parts.get("attributes")
        if heads is None:
            raise BadInput(
                "distribution needs classifiers of the model's middle features: run hasten tune MODEL "
                "--method attributes --data IMAGES"
            )
        known = heads.classes
        check_choice("attribute", self.attribute, known)
        K = known[self.attribute]
        if self.classes != "uniform" and len(self.classes) != K:
            raise BadInput(f"attribute {self.attribute!r} has {K} classes, found {len(self.classes)} fractions")
        if self.target is not None and not 0 <= self.target < K:
            raise BadInput(f"attribute {self.attribute!r} has classes 0 .. {K - 1}, found target {self.target}")
        if self.along == "means" and not heads.means:
            raise BadInput("this model's classifiers know no class means: use along=gradient, or tune them again")
        return replace(self, heads=heads)

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """The steered denoiser, of the same signature.

        Raises:
            BadInput: for a guide that is not bound, and for a network without middle features.
        """
        if self.heads is None:
            raise BadInput("distribution is not bound to a model yet: bind(statistics, parts) comes first")
        if not callable(getattr(denoiser, "features", None)):
            raise BadInput(
                f"{type(denoiser).__name__} has no middle features to steer: what works is a Denoiser around a network "
                "with embed, encode and decode, such as hasten's UNet"
            )
        if isinstance(denoiser, Steered):  # gradients at the same features add up
            return Steered(denoiser.denoiser, (*denoiser.guides, self))
        return Steered(denoiser, (self,))

    def directions(self, t: Tensor | float, W: Tensor) -> Tensor:
        """d, (K, D) float32.

        Args:
            t: the time.
            W: (K, D), the weights of the classifiers.
        """
        if self.along == "means":
            return self.heads.towards(self.attribute, t)
        return W / (W - W.mean(0)).square().sum(1).mean().clamp_min(EPSILON)

    def reference(self) -> Tensor:
        """The target distribution r, (K,) float32."""
        return self._reference_on(torch.device("cpu"))

    def _reference_on(self, device: torch.device) -> Tensor:
        """The target distribution on a device, to which it is copied once."""
        return target_distribution(self.classes, self.heads.classes[self.attribute], device)

    def value(self, logits: Tensor) -> Tensor:
        """The loss L of logits (B, K)."""
        p = torch.softmax(logits / self.temperature, 1)
        if self.target is not None:
            return -p[:, self.target].sum()
        r, pbar = self._reference_on(p.device).to(p.dtype), p.mean(0)
        if self.loss == "chi2":
            return ((pbar - r).square() / r).sum()
        return (pbar * (pbar.clamp_min(EPSILON) / r).log()).sum()

    def gradient(self, logits: Tensor) -> Tensor:
        """`B dL/dlogits`, (B, K); for a target `dL/dlogits`."""
        p = torch.softmax(logits / self.temperature, 1)
        if self.target is not None:
            g = torch.zeros_like(p[0])
            g[self.target] = -1.0
        else:
            r, pbar = self._reference_on(p.device).to(p.dtype), p.mean(0)
            g = 2 * (pbar - r) / r if self.loss == "chi2" else (pbar.clamp_min(EPSILON) / r).log() + 1
        return p * (g - (p * g).sum(1, keepdim=True)) / self.temperature


@functools.lru_cache(maxsize=16)
def target_distribution(classes: str | tuple[float, ...], count: int, device: torch.device) -> Tensor:
    """The fractions of the classes (count,) float32 on a device; "uniform": equal ones."""
    with torch.inference_mode(False):  # the cached value may be used under autograd later
        target = torch.ones(count) if isinstance(classes, str) else torch.tensor(classes)
        return (target / target.sum()).to(device)


class Steered(Wrapper):
    """A denoiser under one `Distribution` or several."""

    def __init__(self, denoiser: nn.Module, guides: tuple[Distribution, ...]) -> None:
        super().__init__(denoiser)
        self.guides = guides

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The inner denoiser's x0 (B, *S), steered."""
        if not self._active(t):
            return self.denoiser(x_t, t, **cond)
        middle, finish = self.features(x_t, t, **cond)
        return finish(middle)

    def features(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The steered middle features."""
        middle, finish = self.denoiser.features(x_t, t, **cond)
        if not self._active(t):
            return middle, finish
        t = as_float64(torch.as_tensor(t))
        with torch.autocast(middle.device.type, enabled=False):
            if not t.ndim:
                return self._moved(middle, t), finish
            moved = middle.float().clone()
            for time in t.unique():  # samples of one time form a batch
                rows = (t == time).to(middle.device)
                moved[rows] = self._moved(middle[rows], time)
            return moved, finish

    def _active(self, t: Tensor | float) -> bool:
        """Whether a guide is active at the time."""
        t = torch.as_tensor(t)
        return any(bool(((t >= guide.stop) & (t <= guide.start)).any()) for guide in self.guides)

    def _moved(self, middle: Tensor, t: Tensor) -> Tensor:
        """The features of one batch after all guides' steps, float32."""
        if len(middle) < MIN_BATCH and any(guide.target is None for guide in self.guides):
            warnings.warn(
                f"distribution guidance of a batch of {len(middle)} is noise: sample {MIN_BATCH} or more at once",
                stacklevel=2,
            )
        h = middle.float().flatten(1)
        guides = [guide for guide in self.guides if guide.stop <= float(t) <= guide.start]
        heads = [guide.heads.at(guide.attribute, t) for guide in guides]
        directions = [guide.directions(t, W) for guide, (W, _) in zip(guides, heads)]
        for step in range(max((guide.steps for guide in guides), default=0)):
            shift = torch.zeros_like(h)
            for guide, (W, b), d in zip(guides, heads, directions):
                if step < guide.steps:
                    shift -= guide.scale * (guide.gradient(h @ W.T + b) @ d)
            h = h + shift
        return h.reshape(middle.shape)
