"""Denoisers in closed form, for distributions simple enough: what tests, docs and benchmarks measure samplers with.

Each has the call signature of `Denoiser`, `forward(x_t (B, *S), t () or (B,), label=None) -> x0`, computes in float64,
returns the dtype of `x_t`, and is finite at both ends of every schedule (alpha = 0 and sigma = 0).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .errors import BadInput
from .schedules.base import Schedule

__all__ = ["Gaussian", "GaussianMixture", "PointSet", "g8", "m2", "m64"]


class Gaussian(nn.Module):
    """Data N(mean, diag(variance)): `x0 = mean + alpha v / (alpha^2 v + sigma^2) (x_t - alpha mean)`.

    Args:
        mean, variance: (D,) or the shape S of a sample; variance > 0.
        schedule: of the noise.

    Raises:
        BadInput: for a variance that is not positive.
    """

    null_label: int | None = None
    mean: Tensor
    variance: Tensor

    def __init__(self, mean: Tensor, variance: Tensor, schedule: Schedule) -> None:
        super().__init__()
        mean, variance = torch.broadcast_tensors(_double(mean), _double(variance))
        if not bool((variance > 0).all()):
            raise BadInput("Gaussian needs variance > 0: a point has its own class, PointSet")
        self.register_buffer("mean", mean.clone())
        self.register_buffer("variance", variance.clone())
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """x0 (B, *S) at `x_t` (B, *S) and time `t`, () or (B,)."""
        alpha, sigma = _coefficients(self.schedule, t, x_t)
        x = x_t.double()
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        return (self.mean + gain * (x - alpha * self.mean)).to(x_t.dtype)

    def endpoint(self, x_t: Tensor, t_from: Tensor | float, t_to: Tensor | float = 0.0) -> Tensor:
        """Where the probability-flow ODE takes `x_t` (B, *S) from `t_from` to `t_to`, exactly.

        `y(q) = mean + (y(q') - mean) sqrt((v + q^2) / (v + q'^2))`, y = x / alpha, q = sigma / alpha.
        """
        (a, s), (a0, s0) = (_coefficients(self.schedule, t, x_t) for t in (t_to, t_from))
        ratio = torch.sqrt((a**2 * self.variance + s**2) / (a0**2 * self.variance + s0**2))
        return (a * self.mean + ratio * (x_t.double() - a0 * self.mean)).to(x_t.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` samples of the data, (n, *S) float64."""
        noise = torch.randn(n, *self.mean.shape, generator=generator, dtype=torch.float64)
        return self.mean + self.variance.sqrt() * noise.to(self.mean.device)


class GaussianMixture(nn.Module):
    """Data `sum_k w_k N(mu_k, diag(V_k))`: `x0 = sum_k p_k(x_t) [mu_k + alpha V_k / c_k (x_t - alpha mu_k)]` with
    `c_k = alpha^2 V_k + sigma^2` and `p_k ~ w_k N(x_t; alpha mu_k, c_k)`, by log-sum-exp.

    Args:
        weights: (K,), positive; normalised here.
        means, variances: (K, *S); variances > 0.
        schedule: of the noise.
        labels: the class of each component, K integers from 0. `forward(..., label=(B,))` is then the denoiser of the
            components of that class; the null label (the number of classes), or no label, means all of them.

    Raises:
        BadInput: for shapes that do not fit and for weights or variances that are not positive.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor
    labels: Tensor | None

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        variances: Tensor,
        schedule: Schedule,
        labels: Tensor | list[int] | None = None,
    ) -> None:
        super().__init__()
        weights, means, variances = _double(weights), _double(means), _double(variances)
        if weights.shape != means.shape[:1] or means.shape != variances.shape:
            raise BadInput(
                f"GaussianMixture needs weights (K,), means and variances (K, *S), found {tuple(weights.shape)}, "
                f"{tuple(means.shape)}, {tuple(variances.shape)}"
            )
        if not bool((weights > 0).all()) or not bool((variances > 0).all()):
            raise BadInput("GaussianMixture needs weights > 0 and variances > 0")
        self.shape = tuple(means.shape[1:])
        self.register_buffer("weights", weights / weights.sum())
        self.register_buffer("means", means.flatten(1))
        self.register_buffer("variances", variances.flatten(1))
        self.register_buffer("labels", _labels(labels, len(weights)))
        self.schedule = schedule

    @property
    def null_label(self) -> int | None:
        """The label that means "no class": the number of classes, None without classes."""
        return None if self.labels is None else int(self.labels.max()) + 1

    def forward(self, x_t: Tensor, t: Tensor | float, label: Tensor | None = None, **cond: Any) -> Tensor:
        """x0 (B, *S) at `x_t` (B, *S) and time `t`, () or (B,), of the classes `label` (B,)."""
        alpha, sigma = _coefficients(self.schedule, t, x_t.flatten(1))
        return self._x0(x_t.double().flatten(1), alpha, sigma, label).reshape(x_t.shape).to(x_t.dtype)

    def log_prob(self, x_t: Tensor, t: Tensor | float = 0.0, label: Tensor | None = None) -> Tensor:
        """log p(x_t), (B,) float64, at `x_t` (B, *S) and time `t`, () or (B,), of the classes `label` (B,)."""
        x = x_t.double().flatten(1)
        alpha, sigma = (value.reshape(-1, 1, 1) for value in _coefficients(self.schedule, t, x))
        total = alpha**2 * self.variances + sigma**2
        log_p = -0.5 * ((x[:, None] - alpha * self.means) ** 2 / total + torch.log(2 * math.pi * total)).sum(-1)
        log_w = torch.log_softmax(torch.log(self.weights) + _masked(self.labels, label, self.null_label), -1)
        return torch.logsumexp(log_w + log_p, 1)

    def _x0(self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """x (B, D), alpha and sigma () or (B, 1) -> (B, D)."""
        alpha, sigma = alpha.reshape(-1, 1, 1), sigma.reshape(-1, 1, 1)
        total = alpha**2 * self.variances + sigma**2
        offset = x[:, None] - alpha * self.means
        log_p = torch.log(self.weights) - 0.5 * (offset**2 / total + torch.log(total)).sum(-1)
        log_p = log_p + _masked(self.labels, label, self.null_label)
        component_x0 = self.means + alpha * self.variances / total * offset
        return torch.einsum("bk,bkd->bd", torch.softmax(log_p, 1), component_x0)

    def ode(
        self,
        x_t: Tensor,
        t_from: Tensor | float,
        t_to: Tensor | float = 0.0,
        label: Tensor | None = None,
        rtol: float = 1e-10,
        atol: float = 1e-11,
    ) -> Tensor:
        """Where the probability-flow ODE takes `x_t` (B, *S) from `t_from` to `t_to`, to about `rtol`; needs scipy.

        DOP853 on `Y = y / sqrt(1 + q^2)`: in the angle atan(q) above q = 1, where it is finite up to pure noise, and in
        log q below it, to q = 1e-7 and then the denoiser where `t_to` is the clean end.

        Args:
            x_t: (B, *S), the states at `t_from`.
            t_from, t_to: times, t_to < t_from.
            label: (B,), the classes.
            rtol, atol: tolerances of the solver.

        Raises:
            BadInput: where the solver fails.
        """
        from scipy.integrate import solve_ivp

        (a0, s0), (a1, s1) = [[float(f(t)) for f in (self.schedule.alpha, self.schedule.sigma)] for t in (t_from, t_to)]
        shape = (len(x_t), self.means.shape[1])
        Y = x_t.double().flatten(1) / math.hypot(a0, s0)

        def x0(Y: Tensor, angle: float) -> Tensor:
            c, s = (torch.tensor(f(angle), dtype=torch.float64) for f in (math.cos, math.sin))
            return self._x0(Y, c, s, label)

        def by_angle(angle: float, Y: Any) -> Any:
            Y = torch.from_numpy(Y).reshape(shape)
            return ((Y * math.cos(angle) - x0(Y, angle)) / math.sin(angle)).flatten().numpy()

        def by_log_q(log_q: float, Y: Any) -> Any:
            Y, angle = torch.from_numpy(Y).reshape(shape), math.atan(math.exp(log_q))
            c = math.cos(angle)
            return (Y * c**2 - x0(Y, angle) * c).flatten().numpy()

        def solve(derivative: Any, start: float, end: float, Y: Tensor) -> Tensor:
            if start <= end:
                return Y
            solution = solve_ivp(derivative, (start, end), Y.flatten().numpy(), method="DOP853", rtol=rtol, atol=atol)
            if not solution.success:
                raise BadInput(f"the reference solution failed: {solution.message}")
            return torch.from_numpy(solution.y[:, -1]).reshape(shape)

        start, end = math.atan2(s0, a0), math.atan2(s1, a1)
        Y = solve(by_angle, start, max(end, math.pi / 4), Y)
        last = max(math.tan(end), 1e-7)
        Y = solve(by_log_q, math.log(min(math.tan(min(start, 1.5)), 1.0)), math.log(last), Y)
        result = a1 * x0(Y, math.atan(last)) if s1 < a1 * 1e-7 else Y * math.hypot(a1, s1)
        return result.reshape(x_t.shape).to(x_t.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None, label: int | None = None) -> Tensor:
        """`n` samples of the data (of one class), (n, *S) float64."""
        weights = self.weights
        if label is not None:
            weights = weights * _masked(self.labels, torch.tensor([label]), self.null_label).exp()[0]
        k = torch.multinomial(weights.cpu(), n, replacement=True, generator=generator).to(self.means.device)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return (self.means[k] + self.variances[k].sqrt() * noise.to(self.means.device)).reshape(n, *self.shape)


class PointSet(nn.Module):
    """Data that are a finite set of points, equally likely: `x0 = softmax(-|x_t - alpha p|^2 / (2 sigma^2)) p`.

    At sigma = 0 the nearest point. The denoiser that a network with unlimited capacity would learn from a training set.

    Args:
        points: (P, *S).
        schedule: of the noise.
        labels: the class of each point; see `GaussianMixture`.

    Raises:
        BadInput: for points or labels of another shape.
    """

    points: Tensor
    labels: Tensor | None

    def __init__(self, points: Tensor, schedule: Schedule, labels: Tensor | list[int] | None = None) -> None:
        super().__init__()
        points = _double(points)
        if points.ndim < 2 or not len(points):
            raise BadInput(f"PointSet needs points (P, *S), found shape {tuple(points.shape)}")
        self.shape = tuple(points.shape[1:])
        self.register_buffer("points", points.flatten(1))
        self.register_buffer("labels", _labels(labels, len(points)))
        self.schedule = schedule

    @property
    def null_label(self) -> int | None:
        """The label that means "no class": the number of classes, None without classes."""
        return None if self.labels is None else int(self.labels.max()) + 1

    def forward(self, x_t: Tensor, t: Tensor | float, label: Tensor | None = None, **cond: Any) -> Tensor:
        """x0 (B, *S) at `x_t` (B, *S) and time `t`, () or (B,), of the classes `label` (B,)."""
        x = x_t.double().flatten(1)
        alpha, sigma = _coefficients(self.schedule, t, x)
        # |x - alpha p|^2 without the |x|^2 that all points share
        distance = alpha**2 * self.points.square().sum(1) - 2 * alpha * (x @ self.points.T)
        distance = distance - 2 * _masked(self.labels, label, self.null_label)
        nearest = distance == distance.min(1, keepdim=True).values
        weights = torch.softmax(-0.5 * distance / torch.where(sigma > 0, sigma, 1.0) ** 2, 1)
        weights = torch.where(sigma > 0, weights, nearest.double() / nearest.sum(1, keepdim=True))
        return (weights @ self.points).reshape(x_t.shape).to(x_t.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` of the points, drawn with replacement, (n, *S) float64."""
        return self.points[torch.randint(len(self.points), (n,), generator=generator)].reshape(n, *self.shape)


def g8(schedule: Schedule) -> Gaussian:
    """A Gaussian in 8 dimensions: mean `0.3 cos j`, variance `0.25 / (j + 1)`, j = 0 .. 7."""
    j = torch.arange(8, dtype=torch.float64)
    return Gaussian(0.3 * torch.cos(j), 0.25 / (j + 1), schedule)


def m2(schedule: Schedule, labels: Tensor | list[int] | None = None) -> GaussianMixture:
    """Six components on a ring in 2 dimensions: `mu_k = .8 (cos(2 pi k / 6), sin(2 pi k / 6))`,
    `V_k = .0225 (1 + .5 cos k, 1 + .5 sin k)`, `w_k ~ 1 + .5 cos k`, k = 0 .. 5."""
    k = torch.arange(6, dtype=torch.float64)
    angle = 2 * math.pi * k / 6
    means = 0.8 * torch.stack([angle.cos(), angle.sin()], 1)
    variances = 0.0225 * torch.stack([1 + 0.5 * k.cos(), 1 + 0.5 * k.sin()], 1)
    return GaussianMixture(1 + 0.5 * k.cos(), means, variances, schedule, labels)


def m64(schedule: Schedule, labels: Tensor | list[int] | None = None) -> GaussianMixture:
    """Ten components in 64 dimensions: `mu_kj = (j + 1)^-.5 cos(1.3 (k + 1)(j + 1) + .7 j)`,
    `V_kj = .25 / (j + 1) (1 + .5 cos(k + 2 j))`, `w_k ~ 1 + .5 cos k`, k = 0 .. 9, j = 0 .. 63."""
    k, j = torch.arange(10, dtype=torch.float64)[:, None], torch.arange(64, dtype=torch.float64)
    means = (j + 1) ** -0.5 * torch.cos(1.3 * (k + 1) * (j + 1) + 0.7 * j)
    variances = 0.25 / (j + 1) * (1 + 0.5 * torch.cos(k + 2 * j))
    return GaussianMixture(1 + 0.5 * k[:, 0].cos(), means, variances, schedule, labels)


def _double(value: Tensor) -> Tensor:
    """The value as a float64 tensor."""
    return torch.as_tensor(value, dtype=torch.float64)


def _coefficients(schedule: Schedule, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma, () or (B, 1, ...), on the device of x."""
    t = torch.as_tensor(t, dtype=torch.float64)
    shape = (-1, *[1] * (x.ndim - 1)) if t.ndim else ()
    return schedule.alpha(t).reshape(shape).to(x.device), schedule.sigma(t).reshape(shape).to(x.device)


def _labels(labels: Tensor | list[int] | None, count: int) -> Tensor | None:
    """The classes of the components (count,) int64."""
    if labels is None:
        return None
    classes = torch.as_tensor(labels, dtype=torch.long)
    if classes.shape != (count,) or not bool((classes >= 0).all()):
        raise BadInput(f"labels must be {count} whole numbers from 0, found {classes.tolist()}")
    return classes


def _masked(labels: Tensor | None, label: Tensor | None, null: int | None) -> Tensor:
    """0 where a component is of the class of a sample, -inf where not: (B, K), or 0-d for all."""
    if label is None:
        return torch.zeros((), dtype=torch.float64)
    if labels is None or null is None:
        raise BadInput("this distribution has no classes, but a label was given")
    label = torch.as_tensor(label, device=labels.device)
    if not bool(((label >= 0) & (label <= null)).all()):
        raise BadInput(f"labels must lie in 0 .. {null} ({null}: no class), found {sorted(set(label.tolist()))}")
    wanted = (labels == label[:, None]) | (label[:, None] == null)
    return torch.where(wanted, 0.0, -math.inf).double()
