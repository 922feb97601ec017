"""A parametrisation of deterministic plans that are consistent for all parameters."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import BadInput
from ..plan.basis import Basis
from ..plan.branches import branch_evaluator
from ..plan.program import multiplier
from ..plan.table import Plan
from ..schedules.base import Schedule
from ..schedules.serialize import schedule_from_dict
from ..times import MAX_Q

__all__ = ["PlanParametrization", "coordinate", "time_at"]

KNEE = 2.0  # of the coordinate: linear in 1/q above it, in log q below
SMALLEST_Q = 1e-3


def coordinate(schedule: Schedule, t: Tensor) -> Tensor:
    """`u = log(1 + 2 / q)` of times t: like 2/q at high noise, like -log q at low noise, 0 at pure noise."""
    return torch.log1p(KNEE / schedule.q(t))


def time_at(schedule: Schedule, u: Tensor) -> Tensor:
    """The inverse of `coordinate`, differentiable for u > 0."""
    return schedule.time(torch.log(torch.expm1(u) / KNEE))


class PlanCoefficients(NamedTuple):
    """The numbers that determine a plan.

    Args:
        query: (K,), times passed to the network.
        level: (K+1,), times whose alpha and sigma the states have.
        gain: (), factor of the first state.
        D: (K, K), strictly lower triangular, coefficients of x0_j - x0_k in row k; in a basis of G groups (K, K, G).
    """

    query: Tensor
    level: Tensor
    gain: Tensor
    D: Tensor


class PlanParametrization:
    """Plans of K model evaluations, exact for constant x0, as functions of one float64 vector `theta` (P,).

    State k has a level s_k: if all model outputs are x and the start is `alpha(s_0) x + sigma(s_0) eps`, it is
    `alpha(s_k) x + sigma(s_k) eps`. That is, with any numbers D,

        x_{k+1} = a_k x_k + b_k x0_k + sum_{j<k} D[k, j] (x0_j - x0_k),
        a_k = sigma(s_{k+1}) / sigma(s_k),    b_k = alpha(s_{k+1}) - a_k alpha(s_k).

    s_0 is the time of the initial noise and s_K the end of the grid; both are fixed. Free are the other levels and D.
    With `shift` the times passed to the network are free as well, otherwise they are the levels. With `teleport`
    (skip-ahead) the first time is free too, and the first state is `gain` times the start: what a solver's first step
    learns from pure noise is known beforehand, so the plan may evaluate the noise as if it were the state at a lower
    level.

    Args:
        base: a deterministic plan, with states at the levels of its times.
        top: s_0; the start is noise times `prior_std(top)`. Default: the first time of the base.
        teleport: free the first time.
        shift: free the other times passed to the network.
        answers: how many model outputs a row uses. Default: all.
        basis: with mean 0; D is then free for each of its groups of directions. Default: one D for all.

    Raises:
        BadInput: for a plan that draws noise or does not have this form.
    """

    def __init__(
        self,
        base: Plan,
        *,
        top: float | None = None,
        teleport: bool = True,
        shift: bool = True,
        answers: int | None = None,
        basis: Basis | None = None,
    ) -> None:
        self.basis, self.groups = basis, () if basis is None else (basis.groups,)
        if base.stochastic:
            raise BadInput(f"{base.sampler} draws noise in its steps: only a deterministic plan can be fitted")
        self.schedule = schedule_from_dict(base.schedule)
        self.sampler, self.spec = base.sampler, base.schedule
        self.branches, self.guidance_scale = base.branches, base.guidance_scale
        self.K, self.teleport, self.shift = base.nfe, teleport, shift
        self.top = base.times[0].detach() if top is None else torch.tensor(top, dtype=torch.float64)
        self.end = base.times[-1].detach()
        self.lowest = float(coordinate(self.schedule, self.top))
        if self.lowest == 0:
            self.lowest = math.log1p(KNEE / MAX_Q)
        self.highest = math.log1p(KNEE / SMALLEST_Q)
        self.first = base.times[0].detach()
        K = self.K
        used = torch.ones(K, K, dtype=torch.bool).tril(-1)
        self.free = used if answers is None else used & ~torch.ones(K, K, dtype=torch.bool).tril(-answers)
        # row k of D is base[k] + z @ frames[k], z a part of theta; see `whiten`
        frames = [torch.eye(int(row.sum()), dtype=torch.float64) for row in self.free]
        self.frames: list[Tensor] = [frame.expand(*self.groups, *frame.shape) for frame in frames]
        self.base = self._differences(base)
        u = coordinate(self.schedule, base.times[:-1].detach()).clamp(self.lowest, self.highest)
        blocks = {
            "level": u[1:].clone(),
            "query": u[0 if teleport else 1 :].clone() if shift else u[:teleport].clone(),
            "gain": torch.zeros(int(teleport), dtype=torch.float64),
            "D": torch.zeros(int(self.free.sum()) * math.prod(self.groups), dtype=torch.float64),
        }
        self.sizes = {name: len(block) for name, block in blocks.items()}
        self.initial = torch.cat(list(blocks.values()))

    def split(self, theta: Tensor) -> dict[str, Tensor]:
        """The blocks of `theta` by name: coordinates of the levels and times, log gain, weights."""
        return dict(zip(self.sizes, theta.split(list(self.sizes.values())), strict=True))

    def bounds(self) -> list[tuple[float | None, float | None]]:
        """Lower and upper bounds of theta, as `scipy.optimize.minimize` takes them."""
        times = self.sizes["level"] + self.sizes["query"]
        return [(self.lowest, self.highest)] * times + [(None, None)] * (len(self.initial) - times)

    def coefficients(self, theta: Tensor) -> PlanCoefficients:
        """Times and weights of theta, differentiable."""
        block = self.split(theta)
        inner = time_at(self.schedule, block["level"])
        level = torch.cat([self.top[None], inner, self.end[None]])
        query = time_at(self.schedule, block["query"])
        first = query[:1] if self.teleport else self.first[None]
        rest = query[int(self.teleport) :] if self.shift else inner
        rows, z = [], block["D"].split([int(row.sum()) * math.prod(self.groups) for row in self.free])
        for k, frame in enumerate(self.frames):
            free = self.free[k].reshape(-1, *[1] * len(self.groups)).expand(self.base[k].shape)
            change = (z[k].reshape(*self.groups, 1, -1) @ frame)[..., 0, :] if frame.numel() else z[k]
            rows.append(torch.zeros_like(self.base[k]).masked_scatter(free, change.movedim(-1, 0)))
        D = self.base + torch.stack(rows)
        return PlanCoefficients(torch.cat([first, rest]), level, torch.exp(block["gain"].sum()), D)

    def plan(self, theta: Tensor) -> Plan:
        """The plan of theta, differentiable; float64."""
        return self.compose(self.coefficients(theta))

    def compose(self, n: PlanCoefficients) -> Plan:
        """The plan of these coefficients, differentiable; float64."""
        a, b = self.steps(n.level)
        start = n.gain * self.schedule.prior_std(n.query[0]) / self.schedule.prior_std(self.top)
        a = torch.cat([a[:1] / start, a[1:]])
        start = start.reshape(1)
        if self.groups:
            a, b, start = (value[:, None].expand(-1, *self.groups) for value in (a, b, start))
        B = n.D + torch.diag_embed((b - n.D.sum(1)).movedim(0, -1)).movedim((-2, -1), (0, 1))
        zero = torch.zeros(self.K, self.K, *self.groups, dtype=torch.float64)
        return Plan(
            times=torch.cat([n.query, self.end[None]]),
            start=start,
            a=a,
            A=zero,
            B=B,
            C=zero[:, :0],
            sampler=f"fitted:{self.sampler}",
            schedule=self.spec,
            basis=self.basis,
            begin=float(self.top) if self.teleport else None,
            branches=self.branches,
            guidance_scale=self.guidance_scale,
        )

    def steps(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """a (K,) and b (K,), the sum of the coefficients of the model outputs, of levels (K+1,)."""
        alpha, sigma = self.schedule.alpha(level), self.schedule.sigma(level)
        a = sigma[1:] / sigma[:-1]
        return a, alpha[1:] - a * alpha[:-1]

    def whiten(self, theta: Tensor, grams: list[Tensor]) -> Tensor:
        """Change the basis of D so that its parameters move a state by one RMS unit each, in uncorrelated directions.

        Args:
            theta: parameters.
            grams: for each row, the mean products (k, k) of x0_j - x0_k, j < k, per entry; in a basis (G, k, k).

        Returns:
            The parameters of the same plan in the new basis.
        """
        n = self.coefficients(theta.detach())
        for k, gram in enumerate(grams):
            use = self.free[k, :k]
            if use.any():
                gram = gram[..., use, :][..., use]
                ridge = 1e-6 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] + 1e-12
                self.frames[k] = torch.linalg.inv(torch.linalg.cholesky(gram + ridge * torch.eye(gram.shape[-1])))
        return self.theta_of(n)

    def theta_of(self, n: PlanCoefficients) -> Tensor:
        """The parameters of these coefficients; D becomes the new base."""
        self.base = n.D.detach().clone()
        level, query = (coordinate(self.schedule, t).clamp(self.lowest, self.highest) for t in (n.level[1:-1], n.query))
        query = query[0 if self.teleport else 1 :] if self.shift else query[: int(self.teleport)]
        gain = torch.log(n.gain).reshape(1)[: int(self.teleport)]
        zero = torch.zeros(self.sizes["D"], dtype=torch.float64)
        return torch.cat([level, query, gain, zero]).detach()

    def _differences(self, base: Plan) -> Tensor:
        """D of a base plan; raises BadInput if it does not have this form."""
        K = self.K
        X = base.A + torch.diag(base.a)
        # coefficients of the initial noise and of the model outputs in each state
        start, outputs = torch.zeros(K + 1, dtype=torch.float64), torch.zeros(K + 1, K, dtype=torch.float64)
        start[0] = base.start[0]
        for k in range(K):
            start[k + 1] = X[k, : k + 1] @ start[: k + 1]
            outputs[k + 1] = X[k, : k + 1] @ outputs[: k + 1] + base.B[k]
        sigma = self.schedule.sigma(base.times)
        if not torch.allclose(start, sigma / sigma[0], atol=1e-6):
            raise BadInput(f"{base.sampler} is not a solver of the probability-flow ODE: its plan cannot be fitted")
        a, _ = self.steps(base.times)
        D = torch.where(self.free, outputs[1:] - a[:, None] * outputs[:-1], 0.0)
        return D.reshape(K, K, *[1] * len(self.groups)).expand(K, K, *self.groups).clone()


def difference_grams(x0: list[Any], basis: Basis | None = None) -> list[Tensor]:
    """For each row k, the mean products (k, k) per entry of x0_j - x0_k, j < k, of model outputs (B, *S); in a basis
    (G, k, k), each of the directions of one group."""
    stacked = torch.stack(x0)
    if basis is not None:
        groups = [difference_grams(list(stacked[..., basis.index == g])) for g in range(basis.groups)]
        return [torch.stack(rows) for rows in zip(*groups, strict=True)]
    stacked, grams = stacked.flatten(1), list[Tensor]()
    for k in range(len(x0)):
        off = stacked[:k] - stacked[k]
        grams.append((off @ off.T).cpu().double() / stacked.shape[1])
    return grams


def run_plan(plan: Plan, denoiser: Any, x: Tensor, **cond: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Run a plan without A and C, differentiably in all its coefficients, including those that are 0.

    Args:
        plan: the plan.
        denoiser: the model.
        x: initial noise (B, *S).
        cond: conditions of the samples.

    Returns:
        The K + 1 states and K model outputs; for a plan with a basis (of mean 0) the outputs in its coordinates.
    """
    evaluate, basis = branch_evaluator(denoiser, plan), plan.basis
    outputs: list[Tensor] = []
    if basis is None:
        states = [x * multiplier(plan.start[0], x)]
        for k in range(plan.nfe):
            outputs.append(evaluate(k, states[k], plan.times[k], cond))
            state = multiplier(plan.a[k], x) * states[k]
            for j in range(k + 1):
                state = state + multiplier(plan.B[k, j], x) * outputs[j]
            states.append(state)
        return states, outputs
    u = basis.coordinates(x)
    u = basis.spread(plan.start[0], u) * u
    states = [basis.pixels(u)]
    for k in range(plan.nfe):
        outputs.append(basis.coordinates(evaluate(k, states[k], plan.times[k], cond).to(x.dtype)))
        u = basis.spread(plan.a[k], u) * u
        for j in range(k + 1):
            u = u + basis.spread(plan.B[k, j], u) * outputs[j]
        states.append(basis.pixels(u))
    return states, outputs
