"""Analytic-DPM: the optimal isotropic variance of every step, from one measured number per time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_choices, check_numbers
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ._exponential import Node, make_node, make_nodes

MIN_VARIANCE = 1e-12  # of a posterior variance: what is interpolated is its logarithm
FAR = 1e3  # the q used for pure noise, where Gam = 1 carries no information
PIXEL = 2 / 255 * math.sqrt(math.pi / 2)  # the deviation of normal noise whose mean absolute value is one grey level
Table = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class AnalyticDPM(SamplerBase):
    """Analytic-DPM: DDPM or DDIM with the variance that minimises the KL divergence of every step from the exact one.

    With C_r the mean variance, per dimension, of x given z_r, and Gam_r = E||eps(z_r)||^2 / d,

        z_s = alpha_s x0 + sqrt(sigma_s^2 - L) eps + sqrt(V) xi,        C_r = (sigma_r^2 / alpha_r^2) (1 - Gam_r),
        V = L + (alpha_s - alpha_r sqrt(sigma_s^2 - L) / sigma_r)^2 C_r,

    L = (1 - e^{-2h}) sigma_s^2 for form="ddpm", 0 for "ddim", h = lam_s - lam_r, for steps of any length. On Gaussian
    data of equal variances the distribution of every z_s is then exact, at any number of steps. No noise is added by
    the step into sigma = 0.

    The bounds of the paper: Gam within [0, 1], so that V >= L; C at most half_range^2; and in the last noisy step V at
    most that of noise of `pixels` grey levels in mean absolute value, (pixels 2/255)^2 pi/2. That is for the chains of
    the paper, whose last positive level lies below that noise; on a grid whose last positive level is higher it would
    remove needed noise, and is not applied. It improves the visual quality; the likelihood is better without.

    One bound is ours: C is at most the measured E||x - x0||^2 / d, which no posterior variance exceeds. Where noise is
    large a small error of the network in Gam is a large one in C, and this bound is then active.

    Between the times of the table log C is interpolated monotonically in lam; below them Gam and above them C is
    constant. Order 1 in law; NFE = steps.

    Args:
        form: "ddpm" or "ddim".
        moments: "gamma" takes C from Gam as above, which holds for the exact denoiser. "mse" takes C = E||x - x0||^2 /
            d, the best for the actual denoiser, errors included.
        half_range: half the range of the data, > 0.
        pixels: of the last bound, at least 0; None: 2 for "ddpm", 1 for "ddim"; 0: no such bound.
        gamma, mse: two tuples (times, values), or functions of t; set by `bind`.

    References:
        Bao, Li, Zhu, Zhang 2022, arXiv:2201.06503; "mse": Bao, Li, Sun, Zhu, Zhang 2022, arXiv:2206.07309.
    """

    form: str = "ddpm"
    moments: str = "gamma"
    half_range: float = 1.0
    pixels: float | None = None
    gamma: Table | Callable[[Tensor], Tensor] | None = field(default=None, repr=False, metadata={"bound": True})
    mse: Table | Callable[[Tensor], Tensor] | None = field(default=None, repr=False, metadata={"bound": True})
    linear: ClassVar[bool] = True
    order: ClassVar[int] = 1
    needs: ClassVar[str] = "moments"

    def __post_init__(self) -> None:
        check_choices(self, form=("ddpm", "ddim"), moments=("gamma", "mse"))
        if not self.half_range > 0 or (self.pixels is not None and not self.pixels >= 0):
            raise BadInput(f"AnalyticDPM needs half_range > 0 and pixels >= 0, found {self.half_range}, {self.pixels}")
        check_numbers(self)

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def bind(self, statistics: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> AnalyticDPM:
        """The sampler with the model's moments.

        Raises:
            BadInput: where they were never measured.
        """
        if getattr(self, self.moments) is not None:
            return self
        table = measured_table(statistics, self.moments)
        if self.moments == "mse":
            return replace(self, mse=table)
        return replace(self, gamma=table, mse=measured_table(statistics, "mse") if "mse" in statistics else None)

    def variance(self, schedule: Schedule, r: Node) -> Tensor:
        """C_r, () float64, within its bounds.

        Args:
            schedule: of the denoiser.
            r: the node.

        Raises:
            BadInput: for a sampler that is not bound to a model.
        """
        if getattr(self, self.moments) is None:
            raise BadInput(missing_moments(self.moments))
        bound = torch.tensor(self.half_range**2, dtype=torch.float64)
        if self.mse is not None:
            error = self.mse(r.t) if callable(self.mse) else curve(self.mse, schedule, "mse")(r.lam)
            bound = torch.minimum(error, bound)
        if self.moments == "mse":
            return bound
        assert self.gamma is not None
        if not callable(self.gamma):
            return torch.minimum(curve(self.gamma, schedule, "gamma")(r.lam), bound)
        if r.pure:
            r = make_node(schedule, schedule.time(-math.log(FAR)))
        return torch.minimum(r.q**2 * (1 - self.gamma(r.t)).clamp(0, 1), bound)

    def variances(self, schedule: Schedule, times: Tensor) -> Tensor:
        """V of the noisy steps of a grid that ends at 0, noisiest first, (steps - 1,) float64."""
        path = make_nodes(schedule, times)
        pairs = zip(path[:-2], path[1:-1], strict=True)
        variances = [self._step(schedule, r, s, k == len(path) - 3)[2] for k, (r, s) in enumerate(pairs)]
        return torch.stack(variances) if variances else torch.zeros(0, dtype=torch.float64)

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        path, z = make_nodes(schedule, times), x
        for k, (r, s) in enumerate(zip(path, path[1:], strict=False)):
            x0 = yield Query(z, r.t)
            if s.clean:
                z = s.alpha * x0
                continue
            scale, gain, V = self._step(schedule, r, s, k + 2 < len(path) and path[k + 2].clean)
            z = scale * z + gain * x0 + torch.sqrt(V) * noise()
        return z

    def _step(self, schedule: Schedule, r: Node, s: Node, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of z_r and of x0, and V."""
        scale, gain, L = weights(r, s, self.form)
        V = L + gain**2 * self.variance(schedule, r)
        return scale, gain, output_bound(V, s, self.form, self.pixels) if last else V


def weights(r: Node, s: Node, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """For a noisy step: the weight of z_r, the weight of x0, and L, the variance for a known x.

    Args:
        r, s: the nodes of the step.
        form: "ddpm" or "ddim".
    """
    if form == "ddim":
        scale, L = s.sigma / r.sigma, torch.zeros_like(s.sigma)
    else:
        decay = (r.alpha * s.sigma) / (s.alpha * r.sigma)  # e^{-h}, 0 from pure noise
        scale, L = decay * s.sigma / r.sigma, (1 - decay) * (1 + decay) * s.sigma**2
    return scale, s.alpha - scale * r.alpha, L


def output_bound(V: Tensor, s: Node, form: str, pixels: float | None) -> Tensor:
    """V of the last noisy step with the paper's bound, where the level of its end lies below that bound."""
    bound = {"ddpm": 2 * PIXEL, "ddim": PIXEL}[form] if pixels is None else pixels * PIXEL
    return V.clamp(max=bound**2) if s.q.item() <= bound else V


def measured_table(statistics: Mapping[str, Tensor], name: str) -> Table:
    """A measured function of time, as two tuples.

    Raises:
        BadInput: where it was never measured.
    """
    if name not in statistics or f"{name}_times" not in statistics:
        raise BadInput(missing_moments(name))
    return tuple(statistics[f"{name}_times"].tolist()), tuple(statistics[name].tolist())


def missing_moments(name: str) -> str:
    """The error message where moments were never measured."""
    what = "noise moments" if name == "gamma" else "squared errors"
    return f"analytic needs the model's {what}: run hasten tune MODEL --method moments --data IMAGES"


@functools.lru_cache(maxsize=32)
def curve(table: Table, schedule: Schedule, moments: str = "gamma") -> Curve:
    """C as a function of lam from a table of (times, Gam) or, for "mse", of (times, C)."""
    with torch.inference_mode(False):  # cached values may be used under autograd later
        return _curve(table, schedule, moments)


def _curve(table: Table, schedule: Schedule, moments: str) -> Curve:
    """`curve` without the cache."""
    t, value = (torch.tensor(column, dtype=torch.float64) for column in table)
    if t.shape != value.shape or len(t) < 2:
        raise BadInput(f"a table of moments needs two or more times with a value each, found {len(t)} and {len(value)}")
    t, order = t.sort(descending=True)
    lam, value = schedule.lam(t), value[order]
    use = torch.isfinite(lam)  # at alpha = 0 there is no lam, and from pure noise on C is the same anyway
    lam, value = lam[use], value[use]
    C = torch.exp(-2 * lam) * (1 - value).clamp(0, 1) if moments == "gamma" else value
    # a posterior variance can only grow with the noise: a decrease is a measurement error
    return Curve(lam, C.clamp(min=MIN_VARIANCE).flip(0).cummax(0).values.flip(0))


class Curve:
    """A positive function of lam that falls, by monotone cubic interpolation of its logarithm (Fritsch, Carlson 1980,
    with Brodlie's weights).

    Args:
        lam: (T,) ascending. value: (T,) positive, not rising. Beyond the last it falls as e^(-2 lam), as q^2 does;
            before the first it is constant.
    """

    def __init__(self, lam: Tensor, value: Tensor) -> None:
        self.lam, self.y = lam, torch.log(value)
        h, d = lam.diff(), self.y.diff() / lam.diff()
        w1, w2 = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
        rises = d[1:] * d[:-1] > 0
        safe = torch.where(d == 0, 1.0, d)
        inner = torch.where(rises, (w1 + w2) / (w1 / safe[:-1] + w2 / safe[1:]), 0.0)
        self.slope = torch.cat([d[:1], inner, d[-1:]])

    def __call__(self, lam: Tensor) -> Tensor:
        """The value at lam, of the same shape, differentiable; -inf is as good as the first."""
        low, high = self.lam[0], self.lam[-1]
        inside = lam.clamp(low, high)
        k = (torch.searchsorted(self.lam, inside.detach().contiguous()) - 1).clamp(0, len(self.lam) - 2)
        h = self.lam[k + 1] - self.lam[k]
        u = (inside - self.lam[k]) / h
        y = (1 + 2 * u) * (1 - u) ** 2 * self.y[k] + u**2 * (3 - 2 * u) * self.y[k + 1]
        y = y + h * u * (1 - u) * ((1 - u) * self.slope[k] - u * self.slope[k + 1])
        return torch.exp(y - 2 * (lam - high).clamp(min=0))
