"""Denoising errors of all classes at one noisy sample, with the same noise."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...accelerators._caching.split import SplitPoint, repeat_batch, split_point_of
from ...denoiser import Denoiser, evaluating
from ...errors import Notice
from ...predictions import spread
from .adapters import Active, ClassAdapters, Factors, adapted

__all__ = ["ClassErrors"]


class SharedEncoder(nn.Module):
    """A network whose encoder runs once for all classes, without adapters and with conditions that they share.

    Args:
        net: the network.
        split: its split point.
        common: conditions (1, ...) of the encoder.

    Attributes:
        active: the adapters of the decoder.
        repeats: of the same samples in the batch, of which the encoder gets one; 1 under `torch.vmap`.
    """

    def __init__(self, net: nn.Module, split: SplitPoint, common: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.net, self.split, self.common = net, split, dict(common)
        self.active, self.repeats = Active(), 1

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """Raw output (B, *S) at noisy x (B, *S); `cond` are those of the decoder."""
        rows = len(x) // self.repeats
        shared = {key: value.expand(rows, *value.shape[1:]) for key, value in self.common.items()}
        with self.active.removed():
            features = self.split.encode(*self.split.enter(x[:rows], time[:rows], shared))
        emb = self.split.enter(x, time, cond)[1]
        return self.split.decode(repeat_batch(features, self.repeats), emb)


class ClassErrors:
    """`mean || eps - eps_c(alpha x0 + sigma eps, t) ||^2` of classes c, whatever the network predicts.

    Args:
        denoiser: of the model.
        adapters: of all classes, or None.
        common: conditions (1, ...) that all classes have.
        own: conditions (K, 1, ...) of each class, in place of those.
        scale: multiplies the adapters' change.
        split: whether adapters, and the classes' own conditions, are behind the network's split point alone.

    Attributes:
        evaluations: samples times classes that were evaluated.
        mapped: whether the network runs under `torch.vmap`; False: in one batch of all classes.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        adapters: ClassAdapters | None = None,
        common: Mapping[str, Tensor] | None = None,
        own: Mapping[str, Tensor] | None = None,
        scale: float = 1.0,
        split: bool = False,
    ) -> None:
        self.denoiser, self.adapters, self.scale = denoiser, adapters, scale
        self.common, self.own = dict(common or {}), dict(own or {})
        self.evaluations, self.mapped = 0, True
        self.shared: SharedEncoder | None = None
        if split:
            point = split_point_of(denoiser.net, "few-shot classification", None)
            self.shared = SharedEncoder(denoiser.net, point, self.common)
            self.split = denoiser.replace(net=self.shared)

    def __call__(
        self, x0: Tensor, noise: Tensor, t: Tensor, classes: Tensor, factors: Factors | None = None, own: bool = False
    ) -> Tensor:
        """The errors (k, B) of k classes.

        Args:
            x0: clean samples (B, *S) that all classes are evaluated at; with `own` (k, B, *S), those of each.
            noise: (B, *S), the same for all classes.
            t: (B,) in (0, 1].
            classes: indices (k,).
            factors: of these classes, in place of the adapters' own: those that are trained.
            own: see `x0`.
        """
        schedule, prediction = self.denoiser.schedule, self.denoiser.prediction
        t = t.double().cpu()
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x_t = spread(alpha, noise) * x0 + spread(sigma, noise) * noise
        shape = (-1, *[1] * (noise.ndim - 1))
        target = prediction.target(x0, noise, alpha.reshape(shape), sigma.reshape(shape))
        c_out = prediction.coefficients(alpha, sigma)[2]
        factor = (c_out * alpha / sigma).square()  # of the error of the raw output, to that of eps
        if factors is None:
            factors = {} if self.adapters is None else self.adapters.select(classes)
        cond = {key: value[classes.to(value.device)] for key, value in self.own.items()}
        self.evaluations += len(classes) * len(noise)
        with (
            adapted(self.denoiser.net, list(factors)) as active,
            evaluating(self.denoiser),
            attention_that_maps(x_t.device),
        ):
            active.scale = self.scale * (1.0 if self.adapters is None else self.adapters.scale)
            raw = self._raw(x_t, t, len(classes), factors, cond, own, active)
        return (raw - target).square().flatten(2).mean(2) * factor.to(raw.dtype).to(raw.device)

    def _raw(
        self, x_t: Tensor, t: Tensor, k: int, factors: Factors, cond: dict[str, Tensor], own: bool, active: Active
    ) -> Tensor:
        """The network's output (k, B, *S)."""
        rows = x_t.shape[1] if own else len(x_t)
        common = {key: value.expand(rows, *value.shape[1:]) for key, value in self.common.items()}
        if not factors and not cond and not own:
            return self.denoiser.raw(x_t, t, **common).expand(k, *x_t.shape)
        denoiser = self.denoiser
        if self.shared is not None and (cond or not self.mapped):
            denoiser, self.shared.active = self.split, active
            self.shared.repeats = 1 if self.mapped or own else k
        if not self.mapped:
            return self._one_batch(denoiser, x_t, t, k, cond, own, factors, active)

        def one(factors: Factors, cond: dict[str, Tensor], x: Tensor) -> Tensor:
            active.factors = factors
            return denoiser.raw(
                x, t, **{**common, **{key: value.expand(rows, *value.shape[1:]) for key, value in cond.items()}}
            )

        try:
            return torch.vmap(one, in_dims=(0, 0, 0 if own else None))(factors, cond, x_t)
        except (RuntimeError, NotImplementedError) as error:
            if "vmap" not in str(error) and "functorch" not in str(error):
                raise
            self.mapped = False
            warnings.warn(
                f"{type(self.denoiser.net).__name__} cannot be mapped over classes by torch.vmap "
                f"({' '.join(str(error).split())[:80]}): all classes are one batch, which is slower",
                Notice,
                stacklevel=4,
            )
            return self._raw(x_t, t, k, factors, cond, own, active)

    def _one_batch(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: Tensor,
        k: int,
        cond: dict[str, Tensor],
        own: bool,
        factors: Factors,
        active: Active,
    ) -> Tensor:
        """The network's output (k, B, *S) without `torch.vmap`: the rows of the classes one after the other."""
        rows = x_t.shape[1] if own else len(x_t)
        x = x_t.flatten(0, 1) if own else x_t.repeat(k, *[1] * (x_t.ndim - 1))
        given = {key: value.expand(k * rows, *value.shape[1:]) for key, value in self.common.items()}
        for key, value in cond.items():
            given[key] = value.expand(k, rows, *value.shape[2:]).flatten(0, 1)
        active.factors, active.groups = factors, k
        return denoiser.raw(x, t.repeat(k), **given).unflatten(0, (k, rows))


def attention_that_maps(device: torch.device) -> Any:
    """Attention of which torch knows how to map it: on the CPU that by matrix products alone."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
