"""All steps at once, repeated until they agree: sampling that is parallel in time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_numbers, nearest
from ..plan.draw import compile_plan
from ..predictions import precise
from ..sampling import Query
from ..schedules.base import Schedule
from .ddim import DDIM
from .ddpm import DDPM


@dataclass(frozen=True)
class Picard:
    """The states of many steps of DDIM or DDPM together, by Picard iteration (ParaDiGMS): fewer rounds, more work.

    The base sampler is z_{i+1} = a_i z_i + b_i x0(z_i, t_i) + c_i xi_i, with all xi_i drawn in advance. A round asks
    about a window of W states z_lo, ..., at once. From z_lo on, with the answers x0_i at the old z_i, they become

        z_{i+1} <- k_i (new z_i) + (a_i - k_i) (old z_i) + b_i x0_i + c_i xi_i

    form "paper": k = 1, z_{i+1} = z_lo + the sum of the changes step_j(z_j) - z_j, j = lo .. i.
    form "recursion": k = a + b g, g = alpha s^2 / (alpha^2 s^2 + sigma^2): as if an answer followed its state as it
    does for Gaussian data of standard deviation s = data_std (0: answers do not move). On mixtures, with ddim s = 1 is
    the paper's form and s = 0 slower; with ddpm, whose states first run away in the paper's form, s = .5 needs fewer
    rounds. On a network with 32 steps it stopped no closer to the base sampler for its rounds than the paper's form.

    Then the window slides: over its first step, whose start is settled, and over each further one as long as the states
    at their starts changed by no more than |change|^2 / d <= tolerance^2 V, V the variance that DDPM adds in arriving
    there. So at least one step a round, and the last state, where V = 0, is settled only by an answer at a settled
    state before it. States that enter the window start as a copy of the last one in it, scaled to their time.

    Every sample has its own window, and what is settled is not asked about again: a sample is the same in any batch.
    window: W, None is all steps. tolerance: 0 gives the base sampler's own result, in at most as many rounds as it has
    steps; window 1 is the base sampler. rounds: stop after so many and give the last state as it is.

    Fewer rounds are faster where one batch of W B states takes little longer than one of B: on a large device, or on
    several, with 100 to 1000 steps, hardly below 20. It never saves work, and keeps all states and draws of a run.

    linear: no. Order: that of the base, 1. NFE not known before: more than `steps`, in far fewer rounds.

    Reference: Shih, Belkhale, Ermon, Sadigh, Anari 2023, 2305.16317 (algorithm 1; tolerance .1).
    """

    base: str = "ddim"
    eta: float = 0.0
    window: int | None = None
    tolerance: float = 0.1
    form: str = "paper"
    data_std: float = 0.5
    rounds: int | None = None
    linear: ClassVar[bool] = False
    order: ClassVar[int] = 1
    why: ClassVar[str] = "how often it asks about a step follows from when the answers agree"

    def __post_init__(self) -> None:
        for name, choices in (("base", ("ddim", "ddpm")), ("form", ("paper", "recursion"))):
            if getattr(self, name) not in choices:
                raise BadInput(f"Picard({name}={getattr(self, name)!r}): {nearest(str(getattr(self, name)), choices)}")
        if self.eta != 0 and self.base == "ddpm":
            raise BadInput(f"Picard(base='ddpm', eta={self.eta}): eta belongs to ddim; ddpm is ddim with eta=1")
        _ = self.sampler  # which looks at eta
        for name in ("window", "rounds"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise BadInput(f"Picard({name}={getattr(self, name)}): must be 1 or more, or None")
        for name in ("tolerance", "data_std"):
            if not getattr(self, name) >= 0:
                raise BadInput(f"Picard({name}={getattr(self, name)}): must not be negative")
        check_numbers(self)

    @property
    def sampler(self) -> Any:
        """The base sampler, which this one agrees with."""
        return DDIM(eta=self.eta) if self.base == "ddim" else DDPM()

    def nfe(self, steps: int) -> None:
        return None

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        table = compile_plan(self.sampler, schedule, times.detach())
        N, B = table.nfe, len(x)
        W = min(self.window or N, N)
        a, b = table.a, torch.diagonal(table.B)
        k = self._follow(schedule, table.times[:-1], a, b)
        drift = torch.zeros((N, *x.shape), dtype=x.dtype, device=x.device)  # c_i xi_i
        for column in table.C.T:
            xi = noise()
            for i in column.nonzero().flatten().tolist():
                drift[i] += float(column[i]) * xi
        V, size = _variances(schedule, table.times), schedule.prior_std(table.times)
        z = torch.stack([float(s / size[0]) * x for s in size])  # (N + 1, B, *S)
        each, lo = torch.arange(B, device=x.device), torch.zeros(B, dtype=torch.long)
        done = 0
        while bool((lo < N).any()) and (self.rounds is None or done < self.rounds):
            at = lo + torch.arange(W)[:, None]  # (W, B), the step that each place of the window stands for
            live = at < N
            step, place = at[live], live.to(x.device)
            row = each.expand(W, B)[place]
            here, after = (step.to(x.device), row), (step.to(x.device) + 1, row)
            old = z[here]
            x0 = yield Query(old, table.times[step], rows=row)
            change = torch.zeros((W, *x.shape), dtype=x.dtype, device=x.device)
            change[place] = _wide((a - k)[step], x) * old + _wide(b[step], x) * x0 + drift[here]
            new, state = change, z[lo.to(x.device), each]
            for w in range(W):
                state = new[w] = _wide(k[at[w].clamp(max=N - 1)], x) * state + change[w]
            moved = torch.full((W, B), torch.inf, dtype=torch.float64)
            moved[live] = precise(new[place] - z[after]).flatten(1).square().mean(1).cpu().double()
            z[after] = new[place]
            agreed = moved <= self.tolerance**2 * V[(at + 1).clamp(max=N)]
            stride = 1 + agreed.long().cumprod(0).sum(0)
            high = (lo + W).clamp(max=N)  # the last state of the window
            lo = (lo + stride.clamp(max=W)).clamp(max=N)
            at = high + 1 + torch.arange(W)[:, None]
            fresh = at <= (lo + W).clamp(max=N)
            entered, source = at[fresh], high.expand(W, B)[fresh]
            row = each.expand(W, B)[fresh.to(x.device)]
            z[entered.to(x.device), row] = _wide(size[entered] / size[source], x) * z[source.to(x.device), row]
            done += 1
        return z[N]

    def _follow(self, schedule: Schedule, t: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """k of every step, (N,)."""
        if self.form == "paper":
            return torch.ones_like(a)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return a + b * alpha * self.data_std**2 / (alpha**2 * self.data_std**2 + sigma**2)


def _variances(schedule: Schedule, times: Tensor) -> Tensor:
    """V of every state, (N + 1,): the noise that DDPM adds in the step into it; 0 for the first and for a clean one."""
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    decay = alpha[:-1] * sigma[1:] / (alpha[1:] * sigma[:-1])  # e^{-h}
    return torch.cat([sigma.new_zeros(1), sigma[1:] ** 2 * (1 - decay**2)])


def _wide(value: Tensor, like: Tensor) -> Tensor:
    """Float64 numbers (R,), one for each of as many samples, as what multiplies samples (R, *S) like these."""
    return value.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))
