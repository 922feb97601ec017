"""A multistep sampler that integrates exactly, in each direction of the data, what a Gaussian of its variance would
do."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_choices, check_numbers
from ..plan.basis import Basis
from ..sampling import Query, SamplerBase, schedule_of
from ..schedules.base import Schedule
from ..times import MAX_Q, check_times
from ..utils.random import make_generator
from ._exponential import Node, make_node, make_nodes

QUADRATURE = 40
MIN_SCALE = 0.15  # of the RMS deviation of the data: the scale within a mode where it is less, or was not measured
CHOICES = {
    "variable": ("asinh", "log_q", "atan"),
    "form": ("mean", "angle"),
    "moments": ("spectrum", "scalar", "full"),
    "nodes": ("own", "given"),
    "first": ("teleport", "conditional"),
}


@dataclass(frozen=True, eq=False)
class LocalVariance:
    """Variances of the data around x0, measured at several noise levels.

    Args:
        levels: (L,), ascending.
        values: (L, G), one per group of the basis.
    """

    levels: Tensor
    values: Tensor

    def at(self, q: Tensor) -> Tensor:
        """(G,) at the 0-d level q, interpolated linearly in log-log; constant beyond the levels."""
        x, log_q = self.levels.log(), q.log()
        k = int(torch.searchsorted(x, log_q.detach()).clamp(1, len(x) - 1))
        part = ((log_q - x[k - 1]) / (x[k] - x[k - 1])).clamp(0, 1)
        return torch.exp((1 - part) * self.values[k - 1].log() + part * self.values[k].log())

    @cached_property
    def _key(self) -> tuple[bytes, bytes]:
        """All numbers, for comparison."""
        return self.levels.numpy().tobytes(), self.values.numpy().tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalVariance) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class Output(NamedTuple):
    """The state u and the denoiser's output d at a node, both in the coordinates of the basis."""

    node: Node
    u: Any
    d: Any


@dataclass(frozen=True)
class Preconditioned(SamplerBase):
    """Skip ahead to the noise level where the data begin to show, then a multistep method in the coordinates of the
    data.

    With the data's mean m, directions U and variances v, in u = U^T (z - alpha m), d = U^T (x0 - m), for each direction
    separately, q = sigma/alpha, R = sqrt(sigma^2 + alpha^2 v), g = v/(v + q^2):

        exact flow of N(m, U diag(v) U^T):   u_t = (R_t/R_0) u_0
        form "mean":    u_t = R_t (u_0/R_0 + int M d(alpha/R)),        M = (d - g u/alpha)/(1 - g)
        form "angle":   u_t = R_t (u_0/R_0 + int F dphi),              F = M sigma/(R sqrt(v)),   phi = atan(q/sqrt(v))

    integrals from t to 0. M is the mean of the Gaussian of variance v with this output: 0 for the data above, constant
    for a mode of variance v; F = -v-prediction for v = 1, m = 0. Both are finite at both ends.

    1. First the flow of the Gaussian, without an evaluation, from times[0] down to q_s = kappa sqrt(max v) (the
    "teleport"). 2. M (or F) is interpolated by Lagrange polynomials in `variable` through the last `order` outputs,
    with weights by
       40-point Gauss-Legendre quadrature for each step and direction, float64.
    3. `correct`: with the new output the last step is repeated with one more node, as UniPC does.
    4. The last step, into q = 0, has order 2 (log_q: 1).
    5. Where the variances of the data *around x0* were measured at several noise levels (`local`), each step uses those
    of
       its midpoint for v, in place of the data's own: at small q a mode is narrower than the data.

    Order p, p + 1 with the correction, from exact starting values. NFE = steps.

    Args:
        order: p, 1 to 4.
        kappa: > 0; inf: no teleport.
        variable: "asinh": asinh(q/w), "log_q": log q, "atan": atan(q/sqrt(max v)). w: the scale within a mode, the RMS
            of the local deviations at the lowest level, at least 0.15 of that of the data.
        correct: whether to correct.
        form: "mean" or "angle".
        moments: "spectrum": v of each cosine (DCT-II) coefficient. "scalar": their mean for all. "full": the full
            covariance, for small data.
        nodes: "own": len(times) - 1 of them, equal in log q from q_s to 5 w/N, then times[-1]; only the ends of `times`
            matter. "given": the times, those above q_s (and the first) moved below it, equal in log q.
        first: "teleport", or "conditional", which spends the first evaluation at times[0] and teleports after it: its
            output is the mean of the requested class, while m is that of all classes.
        groups: maximum number of different v; a plan stores a number for each.
        low: the last q above 0 where nodes="own", in place of 5 w/N.
        basis, top, local: set by `bind`.

    References:
        teleport: Wang, Vastola 2024, arXiv:2412.09726. Per-direction coefficients from measured statistics: Zheng, Lu,
        Chen, Zhu 2023 (DPM-Solver-v3), arXiv:2310.13268. Correction: Zhao, Bai, Rao, Zhou, Lu 2023 (UniPC),
        arXiv:2302.04867.
    """

    order: int = 3
    kappa: float = 4.0
    variable: str = "asinh"
    correct: bool = True
    form: str = "mean"
    moments: str = "spectrum"
    nodes: str = "own"
    first: str = "teleport"
    groups: int = 64
    low: float | None = None
    basis: Basis | None = field(default=None, repr=False, metadata={"bound": True})
    top: float | None = field(default=None, repr=False, metadata={"bound": True})
    local: LocalVariance | None = field(default=None, repr=False, metadata={"bound": True})
    linear: ClassVar[bool] = True
    infinite: ClassVar[tuple[str, ...]] = ("kappa",)
    needs: ClassVar[str] = "the mean and the spectrum of the data"

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise BadInput(f"Preconditioned(order={self.order}): order must be 1, 2, 3 or 4")
        if not self.kappa > 0 or self.groups < 1 or (self.low is not None and not self.low > 0):
            found = f"kappa={self.kappa}, groups={self.groups}, low={self.low}"
            raise BadInput(f"Preconditioned({found}): they must be positive")
        check_choices(self, **CHOICES)
        if self.local is not None and (self.basis is None or self.local.values.shape[1] != self.basis.groups):
            raise BadInput("Preconditioned: local variances belong to a basis, one for each of its groups")
        check_numbers(self)

    @property
    def convergence(self) -> int:
        """The measured order of convergence, after exact starting values: the correction adds one."""
        return self.order + self.correct

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def bind(self, statistics: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> Preconditioned:
        """The sampler with the model's statistics.

        Args:
            statistics: `mean` and `spectrum` (both (C, H, W)) and, optionally, `local_levels` (L,) and `local_variance`
                (L, C, H, W), see `local_variance`; for moments="full" `mean`, `covariance` (D, D) and `local_variance`
                (L, D) in the directions of `torch.linalg.eigh`, in its order.
            parts: not used.

        Raises:
            BadInput: where they are missing.
        """
        for key in ("mean", "covariance" if self.moments == "full" else "spectrum"):
            if key not in statistics:
                raise BadInput(
                    f"preconditioned needs the {key} of the data: run hasten tune MODEL --method moments --data IMAGES"
                )
        mean = statistics["mean"].double()
        if self.moments == "full":
            variance, matrix = torch.linalg.eigh(statistics["covariance"].double())
            basis = Basis(mean, _clamp_positive(variance).reshape(mean.shape), "matrix", matrix)
        else:
            variance = _clamp_positive(statistics["spectrum"].double())
            basis = Basis(mean, variance if self.moments == "spectrum" else variance.mean(), "dct")
        basis = basis.grouped(self.groups)
        local = None
        if "local_variance" in statistics and "local_levels" in statistics:
            variances = statistics["local_variance"].double().flatten(1)
            if self.moments == "scalar":
                q2 = statistics["local_levels"].double().square()[:, None]
                error = (variances * q2 / (variances + q2)).mean(1, keepdim=True)
                variances = error * q2 / (q2 - error)
            local = LocalVariance(statistics["local_levels"].double(), _by_group(basis, variances))
        return replace(self, basis=basis, top=float(variance.max().sqrt()), local=local)

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        basis, v = self._basis, self._basis.values
        if times.requires_grad:
            raise BadInput(
                "preconditioned cannot be differentiated in its times: it chooses nodes and variances by them"
            )
        begin, path = make_node(schedule, check_times(times).double()[0]), self._path(schedule, times.double())
        u = (_radius(path[0], v) / _radius(begin, v)) * basis.to(x, begin.alpha)
        past: list[Output] = []
        v_step, moved = v, u  # of the step before: its variances, and what it added
        for start, end in pairwise(path):
            known = Output(start, u, basis.to((yield Query(basis.back(u, start.alpha), start.t))))
            if self.correct and past:
                # in terms of the evaluated state, so that the rows of a plan stay short
                u = u - moved + self._move(past[0].node, start, [known, *past[: self.order]], v_step)
            past = [known, *past[: self.order]]
            v_step = self._variance(start, end)
            moved = self._move(start, end, past[: self._usable(past, end)], v_step)
            u = (_radius(end, v_step) / _radius(start, v_step)) * u + moved
        return basis.back(u, path[-1].alpha)

    @property
    def _basis(self) -> Basis:
        """The basis of a bound sampler."""
        if self.basis is None:
            raise BadInput("preconditioned needs the mean and variances of the data: bind() them, or give basis=")
        return self.basis

    @cached_property
    def _top(self) -> float:
        """The largest standard deviation of the data."""
        return self.top or float(self._basis.values[-1].sqrt())

    @cached_property
    def _scale(self) -> float:
        """w, the scale within a mode."""
        basis = self._basis
        counts = torch.bincount(basis.index.flatten(), minlength=basis.groups).double()
        measured = 0.0 if self.local is None else float((counts @ self.local.values[0] / counts.sum()).sqrt())
        return max(measured, MIN_SCALE * float((counts @ basis.values / counts.sum()).sqrt()))

    def _path(self, schedule: Schedule, times: Tensor) -> list[Node]:
        """The nodes of the evaluations, and the end."""
        path = make_nodes(schedule, times)
        remaining, end, top = path[:-1], path[-1], self.kappa * self._top
        q0 = math.inf if path[0].pure else path[0].q.item()
        teleports = q0 > top and (end.clean or end.q.item() < top)
        conditional = remaining[:1] if not teleports or self.first == "conditional" else []
        remaining = remaining[len(conditional) :]
        moved = (
            remaining if self.nodes == "own" else [n for n in remaining if teleports and (n.pure or n.q.item() >= top)]
        )
        if not moved:
            return [*conditional, *remaining, end]
        rest = remaining[len(moved) :]
        goal, high = (rest or [end])[0], top if teleports else min(q0, MAX_Q)
        low = min(self.low or 5 * self._scale / (len(path) - 1), high / 2) if goal.clean else goal.q.item()
        above = not teleports  # a conditional first node has the highest level itself
        count = above + len(moved) + (not goal.clean)  # to the goal itself, which stays where it is
        levels = torch.linspace(-math.log(high), -math.log(low), count, dtype=torch.float64)[above:]
        new_nodes = [make_node(schedule, t) for t in schedule.time(levels[: len(moved)]).unbind()]
        return [*conditional, *new_nodes, *rest, end]

    def _variance(self, start: Node, end: Node) -> Tensor:
        """v of a step, (G,): the data's own, or around x0 at the level in the middle of the step."""
        if self.local is None or start.pure:
            return self._basis.values
        return self.local.at(0.5 * start.q if end.clean else torch.sqrt(start.q * end.q))

    def _usable(self, past: list[Output], end: Node) -> int:
        """The number of outputs in the next step: those of finite q, fewer where the step ends at q = 0."""
        if self.variable == "log_q" and end.clean:
            return 1
        finite = next((k for k, output in enumerate(past) if output.node.pure), len(past))
        return max(1, min(finite, 2 if end.clean else self.order))

    def _move(self, start: Node, end: Node, known: list[Output], v: Tensor) -> Any:
        """R_end times the integral of the interpolated M or F from `end` to `start`."""
        pure = next((k for k, output in enumerate(known) if output.node.pure), None)
        if pure is not None and len(known) > 1:
            known = known[: pure + (pure == 1 and start.pure)]
        if len(known) > 1 and start.pure:  # the trapezoid in alpha/R
            weights = [0.5 * end.alpha / _radius(end, v)] * 2
        else:
            weights = self._weights(start, end, [output.node for output in known], v)
        total = 0
        for weight, output in zip(weights, known, strict=True):
            alpha, sigma, R = output.node.alpha, output.node.sigma, _radius(output.node, v)
            factor = weight * _radius(end, v) * ((R / sigma) ** 2 if self.form == "mean" else R / (sigma * v.sqrt()))
            total = factor * output.d - (factor * (alpha * v / R**2)) * output.u + total
        return total

    def _weights(self, start: Node, end: Node, known: list[Node], v: Tensor) -> list[Tensor]:
        """Integrals (G,) of the Lagrange polynomials in `variable` through the known nodes: over alpha/R, or over phi.

        With s = asinh(q/sqrt(v)):  d(alpha/R) = sinh(s)/(sqrt(v) cosh(s)^2) ds,  dphi = ds/cosh(s).
        """
        root = v.sqrt()
        if len(known) == 1:
            if self.form == "mean":
                return [end.alpha / _radius(end, v) - start.alpha / _radius(start, v)]
            first, last = (torch.atan2(n.sigma, n.alpha * root) if not n.clean else 0 * root for n in (start, end))
            return [first - last]
        x, w = _gauss_legendre()
        first = torch.asinh(start.q / root)
        last = 0 * root if end.clean else torch.asinh(end.q / root)
        s = last + (first - last) * x[:, None]
        measure = (first - last) * w[:, None] / torch.cosh(s)
        if self.form == "mean":
            measure = measure * torch.tanh(s) / root
        at, seen = self._where(root * torch.sinh(s)), [self._where(n.q) for n in known]
        weights = []
        for i, own in enumerate(seen):
            others = [(at - other) / (own - other) for j, other in enumerate(seen) if j != i]
            weights.append((math.prod(others[1:], start=others[0]) * measure).sum(0))
        return weights

    def _where(self, q: Tensor) -> Tensor:
        """The variable in which outputs are interpolated."""
        if self.variable == "log_q":
            return torch.log(q)
        return torch.asinh(q / self._scale) if self.variable == "asinh" else torch.atan(q / self._top)


def local_variance(
    denoiser: Callable[..., Tensor],
    images: Tensor,
    levels: Tensor,
    basis: Basis,
    label: Tensor | None = None,
    seed: int = 0,
    batch: int = 64,
) -> Tensor:
    """The variance of the data around x0, at each level q, in each direction of the basis: (L, *S) float64.

        v_j(q) = q^2 mean_j (U^T (x0 - x))^2 / mean_j (U^T (y - x0))^2,        y = x + q e,  x0 the output at y

    For the exact denoiser the first mean is the variance of x given y, and the second q^2 minus that: for Gaussian data
    v_j is their variance at every q. NFE: n L, without guidance.

    Args:
        denoiser: with a `schedule`.
        images: (n, *S); 200 are enough.
        levels: (L,), ascending; 24 from below the finest detail of the data to 4 times their largest deviation.
        basis: the directions.
        label: (n,), the classes.
        seed: of the noise.
        batch: images per evaluation.
    """
    schedule = schedule_of(denoiser)
    generator = make_generator(seed)
    rows = []
    for t, q in zip(schedule.time(-torch.log(levels.double())), levels.double(), strict=True):
        error, rest = (torch.zeros(basis.mean.shape, dtype=torch.float64) for _ in range(2))
        for part in torch.arange(len(images)).split(batch):
            x = images[part]
            y = x + float(q) * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            with torch.no_grad():
                x0 = denoiser(y * float(schedule.alpha(t)), t, **({} if label is None else {"label": label[part]}))
            error += basis.coordinates((x0 - x).cpu().double(), 0.0).square().sum(0)
            rest += basis.coordinates((y - x0).cpu().double(), 0.0).square().sum(0)
        rows.append(q**2 * error / rest)
    return torch.stack(rows)


def _radius(at: Node, v: Tensor) -> Tensor:
    """R = sqrt(sigma^2 + alpha^2 v), (G,); sigma is not touched at q = 0, where its derivative may be infinite."""
    return at.alpha * v.sqrt() if at.clean else torch.sqrt(at.sigma**2 + at.alpha**2 * v)


def _clamp_positive(v: Tensor) -> Tensor:
    """Variances without zeros, which constant pixels have."""
    return v.clamp(min=1e-6 * float(v.max()))


def _by_group(basis: Basis, table: Tensor) -> Tensor:
    """The geometric means (L, G) over each group of a table (L, D), at most the variances of the basis."""
    index = basis.index.flatten().expand(table.shape[1])
    total = torch.zeros(len(table), basis.groups, dtype=torch.float64).index_add(1, index, _clamp_positive(table).log())
    mean = torch.exp(total / torch.bincount(index, minlength=basis.groups))
    return torch.minimum(mean, basis.values)


@lru_cache(maxsize=1)
def _gauss_legendre() -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], by the eigenvalues of the Jacobi matrix (Golub, Welsch 1969)."""
    with torch.inference_mode(False):  # cached values may be used under autograd later
        k = torch.arange(1, QUADRATURE, dtype=torch.float64)
        off = k / torch.sqrt(4 * k**2 - 1)
        values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
        return (values + 1) / 2, vectors[0] ** 2
