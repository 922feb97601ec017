"""The stochastic differential equation with steps as long as the error allows, each sample at its own pace."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, HastenError, check_numbers, nearest
from ..predictions import precise
from ..sampling import Query
from ..schedules.base import Schedule
from ..schedules.continuous import VPLinear
from ..times import check_times
from ._exponential import Known, ddim, make_node

CLOCK = VPLinear()
NOISIEST = 200.0  # sigma / alpha; CLOCK starts at 152
SHORTEST = 1e-8
FINISHED = 1 << 60


@dataclass(frozen=True)
class AdaptiveSDE:
    """The reverse-time SDE by a pair of rules of order 1 and 2 whose difference sets the step ("gotta go fast").

    On the variance-preserving path of linear beta, u its time, x = z / sqrt(alpha^2 + sigma^2):

        D(x, u) = beta_u (x / 2 + score(x, u)),   score = -(x - alpha_u x0) / sigma_u^2,   W ~ N(0, h)
        x'  = x + h D(x, u) + sqrt(beta_u) W,     x'' = (x' + x + h D(x', u - h) + sqrt(beta_{u-h}) W) / 2
        E   = || (x' - x'') / max(e_abs, e_rel max(|x'|, |x'_before|)) ||_rms      over the entries of one sample
        E <= 1: go on from x'' at u - h.      Either way h <- min(what is left, safety h E^-power).

    Every schedule is run on that one path (which time the network is asked at follows from sigma / alpha), so that the
    tolerances mean the same on all of them: e_abs for data in [-1, 1] is 2/256. h and u are each sample's own, and only
    samples that still move are asked about. Of the grid it uses both ends: it starts at times[0] and stops at the last
    positive time, times[-2] (the schedule's t_min if the grid is one step into 0), where the answer is the result; a
    grid that ends above 0 gives the state there. Where it would start above sigma / alpha = 200, as from alpha = 0
    (which is infinitely far on that path), the first step is DDIM to that level.

    retry: what noise a shorter step takes after a rejection. "bridge": the same Brownian path, of which every point
    that a trial has seen is kept until it is passed, so that no draw is ever discarded. "redraw" is the paper's code:
    fresh noise; as large draws are rejected more often, what is left is biased (4 to 25 % too much variance, means
    off by .1 standard deviations).

    linear: no. Order 1 in law at least, as e_rel goes to 0; NFE not known before: 2 a step and 1 more for each
    rejected trial, as the first answer is kept (the paper counts 2 for each trial).

    Reference: Jolicoeur-Martineau, Li, Piche-Taillefer, Kachman, Mitliagkas 2021, 2105.14080; bridge: Rackauckas, Nie
    2017, 1411.5058 is the general scheme. Errors: HastenError where the network's answers are not finite.
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
        if self.retry not in ("bridge", "redraw"):
            raise BadInput(f"AdaptiveSDE(retry={self.retry!r}): {nearest(str(self.retry), ['bridge', 'redraw'])}")
        check_numbers(self)

    def nfe(self, steps: int) -> None:
        return None

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        top, last = integration_interval(schedule, times)
        start, end = make_node(schedule, top), make_node(schedule, last)
        if start.lam < -math.log(NOISIEST):
            known = Known(start, x, (yield Query(x, top)))
            start = make_node(schedule, schedule.time(torch.tensor(-math.log(NOISIEST), dtype=torch.float64)))
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
            state = torch.where(_wide(first, x), run.x[rows], run.guess[rows])
            scale = _wide(torch.hypot(schedule.alpha(t), schedule.sigma(t)), x)
            everyone = len(rows) == len(x)
            x0 = yield Query(scale * state, t, rows=None if everyone else rows.to(x.device))
            slope = _slope(state, x0, u)
            done = first & (u <= u_end)
            run.x[rows[done]] = x0[done.to(x.device)]
            run.live[rows[done]] = False
            run.path.release(rows[done])
            begun, tried = first & ~done, ~first
            run.begin(rows[begun], slope[begun.to(x.device)], u_end)
            run.judge(rows[tried], slope[tried.to(x.device)], u_end)
        return run.x if denoise else float(torch.hypot(end.alpha, end.sigma)) * run.x


class _Run:
    """Where every sample of a batch is: u, h (B,) float64 on the CPU; x, guess = x', drift = D(x, u) (B, *S).

    live: not finished. trying: the answer it waits for is that at x', not that at x.
    """

    def __init__(self, rule: AdaptiveSDE, x: Tensor, u: float, noise: Callable[[], Tensor]) -> None:
        self.rule, self.x = rule, x.clone()
        self.u = torch.full((len(x),), u, dtype=torch.float64)
        self.h = torch.full_like(self.u, rule.first_step)
        self.live = torch.ones(len(x), dtype=torch.bool)
        self.trying = torch.zeros_like(self.live)
        self.guess, self.drift, self.before = self.x.clone(), torch.zeros_like(self.x), self.x.clone()
        self.increment = torch.zeros_like(self.x)
        self.path = _Path(self.x, noise, keep=rule.retry == "bridge")

    def begin(self, rows: Tensor, slope: Tensor, u_end: float) -> None:
        """The answer at x has come: try a step."""
        self.drift[rows] = slope
        self.h[rows] = torch.minimum(self.h[rows], self.u[rows] - u_end)
        self.trying[rows] = True
        self._try(rows)

    def judge(self, rows: Tensor, slope: Tensor, u_end: float) -> None:
        """The answer at x' has come: accept or try again."""
        if not len(rows):
            return
        rule, u, h = self.rule, self.u[rows], self.h[rows]
        x, guess, W = self.x[rows], self.guess[rows], self.increment[rows]
        # what is left after the last step is 0, not what float64 makes of u - (u - u_end)
        after = torch.where(h >= u - u_end, u_end, u - h)
        second = x + _wide(h, x) * slope + _wide(_beta(after).sqrt(), x) * W
        better = 0.5 * (guess + second)
        allowed = (rule.e_rel * torch.maximum(guess.abs(), self.before[rows].abs())).clamp(min=rule.e_abs)
        E = ((guess - better) / allowed).flatten(1)
        E = precise(E).square().mean(1).sqrt().cpu().double()
        if not bool(torch.isfinite(E).all()):
            raise HastenError("adaptive: the network gave an answer that is not finite")
        good = E <= 1
        passed, on = rows[good], good.to(x.device)
        self.x[passed] = better[on]
        self.before[passed] = guess[on]
        self.u[passed] = after[good]
        self.trying[passed] = False
        self.path.advance(passed, h[good])
        wanted = rule.safety * h * E.clamp(min=1e-12) ** -rule.power
        self.h[rows] = torch.minimum(wanted, torch.where(good, after, u) - u_end)
        if bool((wanted < SHORTEST).any()):
            raise HastenError(f"adaptive: a step had to be shorter than {SHORTEST}: e_rel={rule.e_rel} is too small")
        self._try(rows[~good])

    def _try(self, rows: Tensor) -> None:
        if not len(rows):
            return
        h, x = self.h[rows], self.x[rows]
        W = self.path.reveal(rows, h)
        self.increment[rows] = W
        self.guess[rows] = x + _wide(h, x) * self.drift[rows] + _wide(_beta(self.u[rows]).sqrt(), x) * W


class _Path:
    """The Brownian motion of every sample ahead of where it stands, known at the points that trials have looked at.

    `ahead` (B, P) are their distances, inf where there is none, `value` (P, B, *S) the motion there. Sample k uses its
    own draws in order, however the others fare: what noise() gave is kept until every sample has used it.
    """

    def __init__(self, like: Tensor, noise: Callable[[], Tensor], keep: bool) -> None:
        self.noise, self.keep = noise, keep
        self.ahead = torch.full((len(like), 1), math.inf, dtype=torch.float64)
        self.value = like.new_zeros((1, *like.shape))
        self.used = torch.zeros(len(like), dtype=torch.long)
        self.draws: deque[Tensor] = deque()
        self.dropped = 0

    def reveal(self, rows: Tensor, h: Tensor) -> Tensor:
        """The motion at distance h (R,) ahead of these samples, (R, *S): N(0, h) given what is known."""
        xi = self._draw(rows)
        if not self.keep:
            return _wide(h.sqrt(), xi) * xi
        near, far = torch.zeros_like(h), torch.full_like(h, math.inf)
        low, high = torch.zeros_like(xi), torch.zeros_like(xi)
        for p in range(self.ahead.shape[1]):
            at, value = self.ahead[rows, p], self.value[p, rows]
            below, above = (at <= h) & (at > near), (at > h) & (at < far)
            near, far = torch.where(below, at, near), torch.where(above, at, far)
            low = torch.where(_wide(below, xi), value, low)
            high = torch.where(_wide(above, xi), value, high)
        bridge = torch.isfinite(far)
        share = torch.where(bridge, (h - near) / (far - near), 0.0)  # of the way from one known point to the next
        W = low + _wide(share, xi) * (high - low) + _wide(((h - near) * (1 - share)).sqrt(), xi) * xi
        self._note(rows, h, W)
        return W

    def advance(self, rows: Tensor, h: Tensor) -> None:
        """These samples have gone h ahead, to a point that was revealed: distances and values count from there."""
        if not self.keep or not len(rows):
            return
        here = self.ahead[rows] == h[:, None]
        moved = torch.zeros_like(self.value[0, rows])
        for p in range(self.ahead.shape[1]):
            moved = torch.where(_wide(here[:, p], moved), self.value[p, rows], moved)
        self.value[:, rows] -= moved
        left = self.ahead[rows] - h[:, None]
        self.ahead[rows] = torch.where(left > 0, left, math.inf)

    def release(self, rows: Tensor) -> None:
        """These samples need no more draws."""
        self.used[rows] = FINISHED

    def _note(self, rows: Tensor, h: Tensor, W: Tensor) -> None:
        """Keep W at distance h in the first free place of each sample; make a place where one has none."""
        if bool(torch.isfinite(self.ahead[rows]).all(1).any()):
            self.ahead = torch.nn.functional.pad(self.ahead, (0, 1), value=math.inf)
            self.value = torch.cat([self.value, torch.zeros_like(self.value[:1])])
        place = torch.isfinite(self.ahead[rows]).long().argmin(1)
        self.ahead[rows, place] = h
        self.value[place, rows] = W

    def _draw(self, rows: Tensor) -> Tensor:
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
    """Where an adaptive integration begins and stops, of a grid: times[0] and its last positive time.

    A single step into 0 has no other positive time: then the schedule's t_min.
    """
    times = check_times(times).detach().double()
    if times[-1] > 0:
        return times[0], times[-1]
    last = times[-2] if len(times) > 2 else times.new_tensor(schedule.t_min)
    return times[0], torch.minimum(last, times[0])


def _beta(u: Tensor) -> Tensor:
    return CLOCK.beta_min + (CLOCK.beta_max - CLOCK.beta_min) * u


def _slope(x: Tensor, x0: Tensor, u: Tensor) -> Tensor:
    """D(x, u) = beta_u (x / 2 - (x - alpha_u x0) / sigma_u^2)."""
    beta, alpha, sigma2 = _beta(u), CLOCK.alpha(u), CLOCK.sigma(u) ** 2
    return _wide(beta * (0.5 - 1 / sigma2), x) * x + _wide(beta * alpha / sigma2, x) * x0


def _wide(value: Tensor, like: Tensor) -> Tensor:
    """One number a sample, (R,), as what multiplies samples like these, (R, 1, ...)."""
    value = value.to(like.device) if value.dtype == torch.bool else value.to(like.device, like.dtype)
    return value.reshape(-1, *[1] * (like.ndim - 1))
