"""The reverse-time SDE with adaptive step sizes, for each sample on its own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, HastenError, check_choices, check_numbers
from ..predictions import precise, spread
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ..schedules.continuous import VPLinear
from ..times import check_times
from ._exponential import Known, ddim, make_node

CLOCK = VPLinear()
MAX_LEVEL = 200.0  # sigma / alpha; CLOCK starts at 152
MIN_STEP = 1e-8
FINISHED = 1 << 60


@dataclass(frozen=True)
class AdaptiveSDE(SamplerBase):
    """The reverse-time SDE by an embedded pair of orders 1 and 2 whose difference sets the step ("gotta go fast").

    On the variance-preserving path of linear beta, u its time, x = z / sqrt(alpha^2 + sigma^2):

        D(x, u) = beta_u (x / 2 + score(x, u)),   score = -(x - alpha_u x0) / sigma_u^2,   W ~ N(0, h)
        x'  = x + h D(x, u) + sqrt(beta_u) W,     x'' = (x' + x + h D(x', u - h) + sqrt(beta_{u-h}) W) / 2
        E   = || (x' - x'') / max(e_abs, e_rel max(|x'|, |x'_before|)) ||_rms      over the entries of one sample
        E <= 1: accept x'' at u - h.      In both cases h <- min(remaining interval, safety h E^-power).

    Every schedule is integrated on that one path (the time of an evaluation follows from sigma / alpha), so that the
    tolerances mean the same on all of them. h and u are each sample's own, and only unfinished samples are evaluated.
    Only the ends of the grid matter: it starts at times[0] and stops at the last positive time, times[-2] (the
    schedule's t_min if the grid is one step into 0), where the output is the result; on a grid that ends above 0 the
    result is the state there. Where it would start above sigma / alpha = 200, as from alpha = 0 (which is infinitely
    far on that path), the first step is DDIM to that level.

    Order 1 in law at least, as e_rel goes to 0. NFE not known in advance: 2 a step and 1 more for each rejected step,
    as the first output is reused (the paper counts 2 for each). Not linear.

    Args:
        e_rel: relative tolerance, at least 0.
        e_abs: absolute tolerance, at least 0; 2/256 for data in [-1, 1].
        retry: the noise of a shorter step after a rejection. "bridge": the same Brownian path, of which every point
            that a step has used is stored until it is passed, so that no draw is ever discarded. "redraw" is the
            paper's code: fresh noise; as large draws are rejected more often, the rest is biased (4 to 25 % too much
            variance, means off by .1 standard deviations).
        first_step: the first h, in (0, 1].
        safety, power: of the step size rule, in (0, 1].

    Raises:
        HastenError: while sampling, where a model output is not finite.

    References:
        Jolicoeur-Martineau, Li, Piche-Taillefer, Kachman, Mitliagkas 2021, arXiv:2105.14080; the general scheme of the
        bridge: Rackauckas, Nie 2017, arXiv:1411.5058.
    """

    e_rel: float = 0.02
    e_abs: float = 2 / 256
    retry: str = "bridge"
    first_step: float = 0.01
    safety: float = 0.9
    power: float = 0.9
    linear: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False
    order: ClassVar[int] = 1
    why: ClassVar[str] = "the length of its next step follows the error of the last one, for each sample"

    def __post_init__(self) -> None:
        if self.e_rel < 0 or self.e_abs < 0 or not self.e_rel + self.e_abs > 0:
            raise BadInput(f"{self}: e_rel and e_abs must not be negative, and one of them positive")
        if not (0 < self.first_step <= 1 and 0 < self.safety <= 1 and 0 < self.power <= 1):
            raise BadInput(f"{self}: first_step, safety and power must lie in (0, 1]")
        check_choices(self, retry=("bridge", "redraw"))
        check_numbers(self)

    def nfe(self, steps: int) -> None:
        """None: the number of model evaluations depends on the values."""
        return

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        top, last = integration_interval(schedule, times)
        start, end = make_node(schedule, top), make_node(schedule, last)
        if start.lam < -math.log(MAX_LEVEL):
            known = Known(start, x, (yield Query(x, top)))
            start = make_node(schedule, schedule.time(torch.tensor(-math.log(MAX_LEVEL), dtype=torch.float64)))
            x = ddim(x, known, start)
        run = _Run(self, x / float(torch.hypot(start.alpha, start.sigma)), float(CLOCK.time(start.lam)), noise)
        u_end = float(CLOCK.time(end.lam))
        denoise = bool(times[-1] == 0)
        while True:
            if not denoise:
                run.live &= run.u > u_end
            rows = run.live.nonzero().flatten()
            if not len(rows):
                break
            first = ~run.trying[rows]
            u = torch.where(first, run.u[rows], run.u[rows] - run.h[rows])
            t = torch.where(u > u_end, schedule.time(CLOCK.lam(u)), end.t)
            state = torch.where(_expand_bool(first, x), run.x[rows], run.predicted[rows])
            scale = spread(torch.hypot(schedule.alpha(t), schedule.sigma(t)), x)
            everyone = len(rows) == len(x)
            x0 = yield Query(scale * state, t, rows=None if everyone else rows.to(x.device))
            drift = _drift(state, x0, u)
            done = first & (u <= u_end)
            run.x[rows[done]] = x0[done.to(x.device)]
            run.live[rows[done]] = False
            run.path.release(rows[done])
            begun, tried = first & ~done, ~first
            run.begin(rows[begun], drift[begun.to(x.device)], u_end)
            run.finish(rows[tried], drift[tried.to(x.device)], u_end)
        return run.x if denoise else float(torch.hypot(end.alpha, end.sigma)) * run.x


class _Run:
    """The state of every sample of a batch: u, h (B,) float64 on the CPU; x, predicted = x', drift = D(x, u) (B, *S).

    live: not finished. trying: its next evaluation is at x', not at x.
    """

    def __init__(self, rule: AdaptiveSDE, x: Tensor, u: float, noise: Callable[[], Tensor]) -> None:
        self.rule, self.x = rule, x.clone()
        self.u = torch.full((len(x),), u, dtype=torch.float64)
        self.h = torch.full_like(self.u, rule.first_step)
        self.live = torch.ones(len(x), dtype=torch.bool)
        self.trying = torch.zeros_like(self.live)
        self.predicted, self.drift, self.before = self.x.clone(), torch.zeros_like(self.x), self.x.clone()
        self.increment = torch.zeros_like(self.x)
        self.path = _Path(self.x, noise, store=rule.retry == "bridge")

    def begin(self, rows: Tensor, drift: Tensor, u_end: float) -> None:
        """Use the output at x: try a step."""
        self.drift[rows] = drift
        self.h[rows] = torch.minimum(self.h[rows], self.u[rows] - u_end)
        self.trying[rows] = True
        self._try(rows)

    def finish(self, rows: Tensor, drift: Tensor, u_end: float) -> None:
        """Use the output at x': accept the step or try again."""
        if not len(rows):
            return
        rule, u, h = self.rule, self.u[rows], self.h[rows]
        x, first, W = self.x[rows], self.predicted[rows], self.increment[rows]
        # exactly u_end after the last step, whatever the rounding of u - (u - u_end)
        after = torch.where(h >= u - u_end, u_end, u - h)
        second = x + spread(h, x) * drift + spread(_beta(after).sqrt(), x) * W
        better = 0.5 * (first + second)
        allowed = (rule.e_rel * torch.maximum(first.abs(), self.before[rows].abs())).clamp(min=rule.e_abs)
        E = ((first - better) / allowed).flatten(1)
        E = precise(E).square().mean(1).sqrt().cpu().double()
        if not bool(torch.isfinite(E).all()):
            raise HastenError("adaptive: the output of the network is not finite")
        good = E <= 1
        passed, on = rows[good], good.to(x.device)
        self.x[passed] = better[on]
        self.before[passed] = first[on]
        self.u[passed] = after[good]
        self.trying[passed] = False
        self.path.advance(passed, h[good])
        wanted = rule.safety * h * E.clamp(min=1e-12) ** -rule.power
        self.h[rows] = torch.minimum(wanted, torch.where(good, after, u) - u_end)
        if bool((wanted < MIN_STEP).any()):
            raise HastenError(f"adaptive: a step had to be shorter than {MIN_STEP}: e_rel={rule.e_rel} is too small")
        self._try(rows[~good])

    def _try(self, rows: Tensor) -> None:
        """Compute x' of these samples."""
        if not len(rows):
            return
        h, x = self.h[rows], self.x[rows]
        W = self.path.reveal(rows, h)
        self.increment[rows] = W
        self.predicted[rows] = x + spread(h, x) * self.drift[rows] + spread(_beta(self.u[rows]).sqrt(), x) * W


class _Path:
    """The Brownian motion of every sample from its current time on, stored at the points that steps have used.

    `ahead` (B, P) are their distances, inf where there is none, `value` (P, B, *S) the motion there. Sample k uses its
    own draws in order, whatever the others do: what noise() returned is stored until every sample has used it.
    """

    def __init__(self, like: Tensor, noise: Callable[[], Tensor], store: bool) -> None:
        self.noise, self.store = noise, store
        self.ahead = torch.full((len(like), 1), math.inf, dtype=torch.float64)
        self.value = like.new_zeros((1, *like.shape))
        self.used = torch.zeros(len(like), dtype=torch.long)
        self.draws: deque[Tensor] = deque()
        self.dropped = 0

    def reveal(self, rows: Tensor, h: Tensor) -> Tensor:
        """The motion at distance h (R,) ahead of these samples, (R, *S): N(0, h) given the stored points."""
        xi = self._draw(rows)
        if not self.store:
            return spread(h.sqrt(), xi) * xi
        near, far = torch.zeros_like(h), torch.full_like(h, math.inf)
        low, high = torch.zeros_like(xi), torch.zeros_like(xi)
        for p in range(self.ahead.shape[1]):
            at, value = self.ahead[rows, p], self.value[p, rows]
            below, above = (at <= h) & (at > near), (at > h) & (at < far)
            near, far = torch.where(below, at, near), torch.where(above, at, far)
            low = torch.where(_expand_bool(below, xi), value, low)
            high = torch.where(_expand_bool(above, xi), value, high)
        bridge = torch.isfinite(far)
        fraction = torch.where(bridge, (h - near) / (far - near), 0.0)  # from one stored point to the next
        W = low + spread(fraction, xi) * (high - low) + spread(((h - near) * (1 - fraction)).sqrt(), xi) * xi
        self._note(rows, h, W)
        return W

    def advance(self, rows: Tensor, h: Tensor) -> None:
        """Move these samples ahead by h, to a point that was revealed: distances and values are relative to it."""
        if not self.store or not len(rows):
            return
        here = self.ahead[rows] == h[:, None]
        moved = torch.zeros_like(self.value[0, rows])
        for p in range(self.ahead.shape[1]):
            moved = torch.where(_expand_bool(here[:, p], moved), self.value[p, rows], moved)
        self.value[:, rows] -= moved
        left = self.ahead[rows] - h[:, None]
        self.ahead[rows] = torch.where(left > 0, left, math.inf)

    def release(self, rows: Tensor) -> None:
        """These samples need no more draws."""
        self.used[rows] = FINISHED

    def _note(self, rows: Tensor, h: Tensor, W: Tensor) -> None:
        """Store W at distance h in the first free slot of each sample; add a slot where one has none."""
        if bool(torch.isfinite(self.ahead[rows]).all(1).any()):
            self.ahead = torch.nn.functional.pad(self.ahead, (0, 1), value=math.inf)
            self.value = torch.cat([self.value, torch.zeros_like(self.value[:1])])
        place = torch.isfinite(self.ahead[rows]).long().argmin(1)
        self.ahead[rows, place] = h
        self.value[place, rows] = W

    def _draw(self, rows: Tensor) -> Tensor:
        """The next draw of each of these samples."""
        need = self.used[rows]
        while self.dropped + len(self.draws) <= int(need.max()):
            self.draws.append(self.noise())
        xi = torch.empty_like(self.draws[-1][rows])
        for j in need.unique().tolist():
            mine = need == j
            xi[mine] = self.draws[j - self.dropped][rows[mine]]
        self.used[rows] += 1
        while self.draws and int(self.used.min()) > self.dropped:
            self.draws.popleft()
            self.dropped += 1
        return xi


def integration_interval(schedule: Schedule, times: Tensor) -> tuple[Tensor, Tensor]:
    """The first time and the last positive time of a grid, between which an adaptive method integrates.

    For a single step into 0 the latter is the schedule's t_min.

    Args:
        schedule: of the denoiser.
        times: (steps + 1,), decreasing.
    """
    times = check_times(times).detach().double()
    if times[-1] > 0:
        return times[0], times[-1]
    last = times[-2] if len(times) > 2 else times.new_tensor(schedule.t_min)
    return times[0], torch.minimum(last, times[0])


def _beta(u: Tensor) -> Tensor:
    """beta at times u of the path."""
    return CLOCK.beta_min + (CLOCK.beta_max - CLOCK.beta_min) * u


def _drift(x: Tensor, x0: Tensor, u: Tensor) -> Tensor:
    """D(x, u) = beta_u (x / 2 - (x - alpha_u x0) / sigma_u^2)."""
    beta, alpha, sigma2 = _beta(u), CLOCK.alpha(u), CLOCK.sigma(u) ** 2
    return spread(beta * (0.5 - 1 / sigma2), x) * x + spread(beta * alpha / sigma2, x) * x0


def _expand_bool(mask: Tensor, like: Tensor) -> Tensor:
    """One bool per sample, (R,), broadcast to samples like these, (R, 1, ...)."""
    return mask.to(like.device).reshape(-1, *[1] * (like.ndim - 1))
