"""The exact likelihood of the probability-flow ODE."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BadInput, HastenError, check_choices, check_numbers
from ..predictions import precise
from ..schedules.base import Schedule
from ._base import Likelihood, check_levels, check_schedule, dequantise, level_indices, uniforms


@dataclass(frozen=True)
class OdeLikelihood:
    """`-log p(x)` by the probability-flow ODE from the data to the noise, and the divergence along it.

    With the angle `phi = atan(sigma / alpha)`, `y = x_t / sqrt(alpha^2 + sigma^2)` and `w = log tan(phi / 2)` the ODE
    and the log-density are, on every schedule, up to pure noise (w = 0),

        dy/dw = cos(phi) y - x0(x_t, t),     d log p / dw = -(D cos(phi) - div_y x0).

    The sample is taken for `x_t / alpha` at `t_min`, the prior for `y ~ N(0, I)` at `t_max`: where samplers start. The
    result is the likelihood of a normalised density whatever the network, up to the solver's error. Data of K levels
    are dequantised uniformly: the result is then an upper bound of `-log P` in the mean.

    Solved by scipy's RK45 in float64, with one step size for all samples of a call.

    Args:
        rtol, atol: tolerances of the solver.
        divergence: "hutchinson", one product with a random sign vector for each probe, the same at all times; unbiased,
            but single samples are off by several nats: average over many. "exact": D products, for small D.
        probes: of "hutchinson".
        t_min: first time. None: the schedule's, the smallest that the network was trained on.

    References:
        Song et al. 2021, arXiv:2011.13456, section 4.3; Grathwohl et al. 2019, arXiv:1810.01367 (estimator).
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    divergence: str = "hutchinson"
    probes: int = 1
    t_min: float | None = None

    def __post_init__(self) -> None:
        check_choices(self, divergence=("hutchinson", "exact"))
        if not (self.rtol > 0 and self.atol > 0) or self.probes < 1:
            raise BadInput(f"ode needs rtol and atol above 0 and probes of 1 or more, found {self}")
        check_numbers(self)

    @property
    def protocol(self) -> str:
        """How the figure is obtained, for reports."""
        how = "exact divergence" if self.divergence == "exact" else f"Hutchinson estimator, {self.probes} Rademacher"
        at = "" if self.t_min is None else f", t_min {self.t_min:g}"
        return f"probability-flow ODE, RK45 with rtol {self.rtol:g} and atol {self.atol:g}, {how}{at}"

    def dequantisation(self, levels: int) -> str:
        """What is done with data of some levels, for reports."""
        return f"uniform, {levels} levels, bins of width 2/{levels - 1}"

    def __call__(
        self, denoiser: nn.Module, x: Tensor, seeds: Sequence[int], levels: int | None = None, **cond: Any
    ) -> Likelihood:
        """The negative log-likelihood of each sample.

        Args:
            denoiser: `forward(x_t, t, **cond) -> x0`, in evaluation mode.
            x: (B, *S), in [-1, 1] if they have levels.
            seeds: B integers: of the dequantisation and the probes.
            levels: K of the data; None: they are continuous, and the result is that of a density.
            cond: conditions, each (B, ...).

        Raises:
            BadInput: for data of other levels, and another process than `x_t = alpha x + sigma eps`.
            HastenError: where the solver fails.
        """
        check_levels(levels)
        u, noise = uniforms(seeds, x.shape[1:])
        signs = torch.stack([torch.where(noise() < 0, -1.0, 1.0).double() for _ in range(self.probes)])
        offset = 0.0
        if levels is not None:
            x = dequantise(level_indices(x, levels), levels, u).to(x.device)
            offset = x[0].numel() * math.log(2 / (levels - 1))
        log_p, nfe = self.log_density(denoiser, x, signs, **cond)
        return Likelihood(-(log_p + offset), nfe=nfe)

    def log_density(
        self,
        denoiser: nn.Module,
        x: Tensor,
        signs: Tensor | None = None,
        log_prior: Callable[[Tensor], Tensor] | None = None,
        **cond: Any,
    ) -> tuple[Tensor, int]:
        """`log p(x)` (B,) float64 of continuous data, and the number of evaluations of the network.

        Args:
            denoiser, x, cond: as above.
            signs: of the probes, (P, B, *S); needed by "hutchinson".
            log_prior: the log-density of `x_t` at `t_max`, (B, *S) -> (B,). None: that of N(0, alpha^2 + sigma^2).
        """
        from scipy.integrate import solve_ivp

        schedule: Schedule = denoiser.schedule  # type: ignore[assignment]
        start, end = check_schedule(schedule, self.t_min)
        n, D = len(x), x[0].numel()
        if self.divergence == "hutchinson" and signs is None:
            raise BadInput("the Hutchinson estimator needs the signs of its probes")
        directions = None if self.divergence == "exact" else precise_on(signs, x)
        (alpha0, norm0), (_, norm1) = [alpha_and_norm(schedule, t) for t in (start, end)]
        calls = 0

        def derivative(w: float, state: Any) -> Any:
            nonlocal calls
            calls += 1
            t = min(max(float(schedule.time(-math.log(math.tan(2 * math.atan(math.exp(w)))))), start), end)
            alpha, norm = alpha_and_norm(schedule, t)
            y = precise_on(torch.from_numpy(state[: n * D]).reshape(x.shape), x)
            x0, trace = with_divergence(denoiser, y * norm, t, directions, cond)
            dy = (alpha / norm) * y - precise(x0)
            div = D * alpha / norm - norm * trace
            return np.concatenate([dy.double().cpu().numpy().ravel(), div.double().cpu().numpy()])

        first = np.concatenate([(x.double() * (alpha0 / norm0)).cpu().numpy().ravel(), np.zeros(n)])
        span = [math.log(math.tan(math.atan2(*reversed(angle_of(schedule, t))) / 2)) for t in (start, end)]
        solution = solve_ivp(derivative, span, first, method="RK45", rtol=self.rtol, atol=self.atol)
        if not solution.success or not np.isfinite(solution.y[:, -1]).all():
            raise HastenError(f"the solver of the probability-flow ODE failed: {solution.message}")
        y = torch.from_numpy(solution.y[: n * D, -1].copy()).reshape(x.shape)
        gained = torch.from_numpy(solution.y[n * D :, -1].copy())
        if log_prior is None:
            at_end = -0.5 * (y.flatten(1) ** 2).sum(1) - 0.5 * D * math.log(2 * math.pi)
        else:
            at_end = log_prior(y * norm1).double().cpu() + D * math.log(norm1)
        return at_end + gained + D * math.log(alpha0 / norm0), calls


def with_divergence(
    denoiser: nn.Module, x_t: Tensor, t: float, directions: Tensor | None, cond: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """x0 (B, *S) and the trace (B,) of its Jacobian in `x_t`, by all unit vectors where `directions` is None."""
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_(True)
        x0 = denoiser(x_t, t, **cond)
        trace = torch.zeros(len(x_t), dtype=x_t.dtype, device=x_t.device)
        count = x_t[0].numel() if directions is None else len(directions)
        for j in range(count):
            keep = j + 1 < count
            if directions is None:
                (row,) = torch.autograd.grad(x0.flatten(1)[:, j].sum(), x_t, retain_graph=keep)
                trace += row.flatten(1)[:, j]
            else:
                (row,) = torch.autograd.grad(x0, x_t, directions[j].to(x0.dtype), retain_graph=keep)
                trace += (row * directions[j]).flatten(1).sum(1) / count
    return x0.detach(), trace.detach()


def angle_of(schedule: Schedule, t: float) -> tuple[float, float]:
    """(alpha, sigma) of one time."""
    return float(schedule.alpha(t)), float(schedule.sigma(t))


def alpha_and_norm(schedule: Schedule, t: float) -> tuple[float, float]:
    """alpha and sqrt(alpha^2 + sigma^2) of one time."""
    alpha, sigma = angle_of(schedule, t)
    return alpha, math.hypot(alpha, sigma)


def precise_on(value: Tensor | None, like: Tensor) -> Tensor:
    """A float64 tensor on the device of `like`, in float32 where that has no float64."""
    assert value is not None
    return value.float().to(like.device) if like.device.type == "mps" else value.to(like.device)
