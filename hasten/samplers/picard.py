"""All steps at once, iterated until they agree: sampling that is parallel in time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_choices, check_numbers
from ..plan.draw import compile_plan
from ..predictions import precise, spread
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from .ddim import DDIM
from .ddpm import DDPM


@dataclass(frozen=True)
class Picard(SamplerBase):
    """The states of many steps of DDIM or DDPM together, by Picard iteration (ParaDiGMS): fewer rounds, more
    evaluations.

    The base sampler is z_{i+1} = a_i z_i + b_i x0(z_i, t_i) + c_i xi_i, with all xi_i drawn in advance. A round
    evaluates a window of W states z_lo, ..., at once. From z_lo on, with the outputs x0_i at the old z_i, they become

        z_{i+1} <- k_i (new z_i) + (a_i - k_i) (old z_i) + b_i x0_i + c_i xi_i

    Then the window slides: over its first step, whose initial state is converged, and over each further one as long as
    the states at their starts changed by no more than |change|^2 / d <= tolerance^2 V, V the variance that DDPM adds in
    that step. So at least one step a round, and the last state, where V = 0, converges only by an output at a converged
    state before it. States that enter the window are initialised with the last one in it, scaled to their time.

    Every sample has its own window, and converged steps are not evaluated again: a sample is the same in any batch.

    Fewer rounds are faster where one batch of W B states takes little longer than one of B: on a large device, or on
    several, with 100 to 1000 steps, hardly below 20. It never saves evaluations, and stores all states and draws of a
    run.

    Not linear. Order: that of the base, 1. NFE not known in advance: more than `steps`, in far fewer rounds.

    Args:
        base: "ddim" or "ddpm".
        eta: of DDIM.
        window: W; None is all steps; 1 is the base sampler.
        tolerance: at least 0; 0 gives the base sampler's own result, in at most as many rounds as it has steps.
        form: "paper": k = 1, z_{i+1} = z_lo + the sum of the changes step_j(z_j) - z_j, j = lo .. i. "recursion":
            k = a + b g, g = alpha s^2 / (alpha^2 s^2 + sigma^2): as if an output followed its state as it does for
            Gaussian data of standard deviation s = data_std (0: outputs do not change). On mixtures, with ddim s = 1 is
            the paper's form and s = 0 slower; with ddpm, whose states first diverge in the paper's form, s = .5 needs
            fewer rounds. On a network with 32 steps its result was no closer to the base sampler for its rounds than
            the paper's form.
        data_std: s, at least 0.
        rounds: maximum number of rounds, after which the last state is returned as it is; None: no maximum.

    References:
        Shih, Belkhale, Ermon, Sadigh, Anari 2023, arXiv:2305.16317 (algorithm 1; tolerance .1).
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
    why: ClassVar[str] = "the number of evaluations of a step depends on when the states converge"

    def __post_init__(self) -> None:
        check_choices(self, base=("ddim", "ddpm"), form=("paper", "recursion"))
        if self.eta != 0 and self.base == "ddpm":
            raise BadInput(f"Picard(base='ddpm', eta={self.eta}): eta belongs to ddim; ddpm is ddim with eta=1")
        _ = self.sampler  # which checks eta
        for name in ("window", "rounds"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise BadInput(f"Picard({name}={getattr(self, name)}): must be 1 or more, or None")
        for name in ("tolerance", "data_std"):
            if not getattr(self, name) >= 0:
                raise BadInput(f"Picard({name}={getattr(self, name)}): must not be negative")
        check_numbers(self)

    @property
    def sampler(self) -> Any:
        """The base sampler, whose result this one approximates."""
        return DDIM(eta=self.eta) if self.base == "ddim" else DDPM()

    def nfe(self, steps: int) -> None:
        """None: the number of model evaluations depends on the values."""
        return

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
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
            at = lo + torch.arange(W)[:, None]  # (W, B), the step of each slot of the window
            live = at < N
            step, slot = at[live], live.to(x.device)
            row = each.expand(W, B)[slot]
            here, after = (step.to(x.device), row), (step.to(x.device) + 1, row)
            old = z[here]
            x0 = yield Query(old, table.times[step], rows=row)
            change = torch.zeros((W, *x.shape), dtype=x.dtype, device=x.device)
            change[slot] = spread((a - k)[step], x) * old + spread(b[step], x) * x0 + drift[here]
            new, state = change, z[lo.to(x.device), each]
            for w in range(W):
                state = new[w] = spread(k[at[w].clamp(max=N - 1)], x) * state + change[w]
            moved = torch.full((W, B), torch.inf, dtype=torch.float64)
            moved[live] = precise(new[slot] - z[after]).flatten(1).square().mean(1).cpu().double()
            z[after] = new[slot]
            agreed = moved <= self.tolerance**2 * V[(at + 1).clamp(max=N)]
            stride = 1 + agreed.long().cumprod(0).sum(0)
            high = (lo + W).clamp(max=N)  # the last state of the window
            lo = (lo + stride.clamp(max=W)).clamp(max=N)
            at = high + 1 + torch.arange(W)[:, None]
            fresh = at <= (lo + W).clamp(max=N)
            entered, source = at[fresh], high.expand(W, B)[fresh]
            row = each.expand(W, B)[fresh.to(x.device)]
            z[entered.to(x.device), row] = spread(size[entered] / size[source], x) * z[source.to(x.device), row]
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
