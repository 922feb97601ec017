"""Search of key steps for a network and its sampling: the error of each reuse in the final samples, a shortest path."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...denoiser import Denoiser, to_x0
from ...errors import BadInput
from ...schedules.base import Schedule
from .keys import cheapest_key_steps, check_key_steps, key_step_count

if TYPE_CHECKING:
    from .. import SamplingContext

__all__ = ["ErrorGains", "error_gains", "main_directions", "reuse_costs", "search_key_steps"]

Run = Callable[[Tensor, Tensor, dict[str, Any], Any], tuple[Any, Tensor]]


@torch.no_grad()
def search_key_steps(
    who: str, denoiser: Denoiser, context: SamplingContext, budget: float, samples: int, seed: int, run: Run
) -> tuple[int, ...]:
    """The key steps that change the final samples least, by `reuse_costs`.

    Args:
        who: the accelerator, for messages.
        denoiser: without acceleration.
        context: of the sampling.
        budget: how many key steps, see `key_step_count`.
        samples: how many images are sampled for the search.
        seed: of the first of them.
        run: `run(net_input, time, cond, features) -> (features, raw)`, the network with the features of a key step; the
            whole network where these are None.

    Raises:
        BadInput: where nothing can be sampled, and for too few model evaluations.
    """
    times = context.required(who)
    check_key_steps(range(len(times)), len(times), who)
    count = key_step_count(budget, len(times))
    evaluate = recorded_evaluations(who, denoiser, context, samples, seed, run)
    cost = reuse_costs(count, times, denoiser.schedule, evaluate, lambda features, j: evaluate(j, features)[1])
    return cheapest_key_steps(cost, count)


def recorded_evaluations(
    who: str, denoiser: Denoiser, context: SamplingContext, samples: int, seed: int, run: Run
) -> Callable[..., tuple[Any, Tensor]]:
    """Evaluations on plain trajectories that are sampled now, `evaluate(j, features=None) -> (features, x0 (B, *S))`.

    Args:
        who: see `search_key_steps`, likewise the others.

    Raises:
        BadInput: where nothing can be sampled, and where a step has more than one evaluation.
    """
    expected, calls = len(context.required(who)), context.calibration(who, samples, seed)
    if len(calls) != expected:
        raise BadInput(
            f"{who} cannot calibrate: the calibration samples took {len(calls)} model evaluations, expected {expected}"
        )

    def evaluate(j: int, features: Any = None) -> tuple[Any, Tensor]:
        x, t, cond = calls[j]
        c_in, c_skip, c_out, clock = denoiser._coefficients(t, x)
        features, raw = run(*denoiser._inputs(x, c_in, clock), cond, features)
        return features, to_x0(x, raw.to(x.dtype), c_skip, c_out)

    return evaluate


def longest_group(count: int, queries: int) -> int:
    """How many evaluations a key step's features are used in at most: three tenths, or what `count` groups need."""
    return max(1, min(queries // 2, max(math.ceil(0.3 * queries), 2 * math.ceil(queries / count))))


@torch.no_grad()
def reuse_costs(
    count: int,
    times: Sequence[float],
    schedule: Schedule,
    key: Callable[[int], tuple[Any, Tensor]],
    reuse: Callable[[Any, int], Tensor],
) -> Tensor:
    """The mean squared error that each group of key step i and the evaluations i + 1 .. e - 1 adds to the final sample,

        cost[i, e] = || sum_j S_j (x0_j(features of i) - x0_j) ||^2

    The errors within a group point the same way and are added as vectors, those of different groups as squares. S_j is
    the gain of the error of evaluation j in the final sample under DDIM on these times, for Gaussian data whose
    variance along the main directions is that of the batch's own x0 (see `error_gains`): an early error lies mostly in
    these directions, in which the network follows it; a late one is in the detail, which the network corrects.

    Groups are at most three tenths of the evaluations long, or what `count` of them need. One pass: N key steps and
    about 0.3 N^2 reuses; only the x0 are stored.

    Args:
        count: of key steps.
        times: t of the N model evaluations.
        schedule: what they mean.
        key: `key(j) -> (features, x0 (B, *S))`, the whole network at evaluation j of the plain trajectory.
        reuse: `reuse(features, j) -> x0 (B, *S)`.

    Returns:
        (N, N + 1) float64, inf for groups that are too long.
    """
    N = len(times)
    longest = longest_group(count, N)
    cost = torch.full((N, N + 1), math.inf, dtype=torch.float64)
    exact: dict[int, Tensor] = {}
    weigh: ErrorGains | None = None
    for i in reversed(range(N)):
        features, exact[i] = key(i)
        weigh = ErrorGains(exact[i], times, schedule) if weigh is None else weigh
        cost[i, i + 1], total = 0.0, torch.zeros_like(exact[i]).flatten(1)
        for j in range(i + 1, min(i + longest, N)):
            total = total + weigh((reuse(features, j) - exact[j]).flatten(1), j)
            cost[i, j + 1] = float(total.square().mean())
        exact.pop(i + longest, None)
    return cost


class ErrorGains:
    """What an error in x0 of an evaluation does to the final sample, by `error_gains` along each main direction.

    Args:
        x0: (B, *S), of the last evaluation: their main directions are those of the data.
        times: t of the N model evaluations.
        schedule: what they mean.
    """

    def __init__(self, x0: Tensor, times: Sequence[float], schedule: Schedule) -> None:
        directions, variance, residual = main_directions(x0)
        self.directions = directions.to(x0)
        self.rest = error_gains(times, schedule, residual).to(x0)
        gains = [error_gains(times, schedule, float(v)).to(self.rest) for v in variance]
        self.main = torch.stack([self.rest, *gains])[1:]

    def __call__(self, error: Tensor, j: int) -> Tensor:
        """The change of the final sample by an error (B, D) in x0 of evaluation j, to first order."""
        main = (error @ self.directions.T) * (self.main[:, j] - self.rest[j])
        return self.rest[j] * error + main @ self.directions


def main_directions(x0: Tensor) -> tuple[Tensor, Tensor, float]:
    """The main directions of samples, by a singular value decomposition.

    Args:
        x0: (B, *S).

    Returns:
        The directions (r, D), the variance along each (r,), and the mean variance of the others. r is half of B, at
        most 16: so few samples determine no weaker directions.
    """
    x = x0.flatten(1).float()
    x = x - x.mean(0)
    _, s, directions = torch.linalg.svd(x, full_matrices=False)
    r = min(len(x) // 2, 16, len(s))
    variance = s.square() / len(x)
    residual = float(variance[r:].sum()) / max(x.shape[1] - r, 1)
    return directions[:r], variance[:r], max(residual, 1e-4)


def error_gains(times: Sequence[float], schedule: Schedule, variance: float) -> Tensor:
    """S_j, by how much an error in x0 of evaluation j changes the final sample, for Gaussian data of variance v.

    DDIM from r to s has x_s = a x_r + b x0 with a = sigma_s / sigma_r, b = alpha_s - a alpha_r, and the network's x0
    follows x_r by g = alpha_r v / (alpha_r^2 v + sigma_r^2), so S_r = b prod (a + b g) over the later steps.
    Evaluations at the same time share its S; the last step ends at time 0.

    Args:
        times: t of the N model evaluations.
        schedule: what they mean.
        variance: v, above 0.

    Returns:
        (N,) float64.
    """
    times = [round(t, 12) for t in times]
    path = sorted(set(times) | {0.0}, reverse=True)
    at = torch.tensor(path, dtype=torch.float64)
    alpha, sigma = schedule.alpha(at).tolist(), schedule.sigma(at).tolist()
    gain, product = {0.0: 0.0}, 1.0
    for k in reversed(range(len(path) - 1)):
        a = sigma[k + 1] / sigma[k]
        b = alpha[k + 1] - a * alpha[k]
        gain[path[k]] = b * product
        product *= a + b * alpha[k] * variance / (alpha[k] ** 2 * variance + sigma[k] ** 2)
    count = Counter(times)
    return torch.tensor([gain[t] / count[t] for t in times], dtype=torch.float64)
