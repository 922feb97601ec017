"""Finding keys for a network and its sampling: what each reuse does to the final sample, then a shortest path."""

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
from .keys import amount, checked, shortest

if TYPE_CHECKING:
    from .. import SamplingContext


Run = Callable[[Tensor, Tensor, dict[str, Any], Any], tuple[Any, Tensor]]


@torch.no_grad()
def search(
    who: str, denoiser: Denoiser, ahead: SamplingContext, budget: float, samples: int, seed: int, run: Run
) -> tuple[int, ...]:
    """The keys that change the final samples least, as many as `budget` says (see `amount`), by `costs`.

    Args:
        samples, seed: of the plain samplings that are looked at.
        run: `run(net_input, time, cond, kept) -> (kept, raw)`: the network with what an earlier query kept; where that
            is None, the whole network.

    Raises:
        BadInput: where there is nothing to sample, and for too few queries.
    """
    times = ahead.required(who)
    checked(range(len(times)), len(times), who)
    count = amount(budget, len(times))
    calls = ahead.calibration(who, samples, seed)
    if len(calls) != len(times):
        raise BadInput(f"{who} cannot search: {len(calls)} queries were seen where {len(times)} were told")

    def answer(j: int, kept: Any = None) -> tuple[Any, Tensor]:
        x, t, cond = calls[j]
        c_in, c_skip, c_out, clock = denoiser._coefficients(t, x)
        kept, raw = run(*denoiser._inputs(x, c_in, clock), cond, kept)
        return kept, to_x0(x, raw.to(x.dtype), c_skip, c_out)

    cost = costs(count, times, denoiser.schedule, answer, lambda kept, j: answer(j, kept)[1])
    return shortest(cost, count)


@torch.no_grad()
def costs(
    count: int,
    times: Sequence[float],
    schedule: Schedule,
    key: Callable[[int], tuple[Any, Tensor]],
    reuse: Callable[[Any, int], Tensor],
) -> Tensor:
    """cost[i, e] (N, N + 1): the mean square that a group of key i and the queries i + 1 .. e - 1 adds to the final
    sample,

        || sum_j S_j (x0_j(kept at i) - x0_j) ||^2

    The errors within a group point the same way and are added as vectors, those of different groups as squares. S_j is
    the answer's share in the final sample under DDIM on these times, for Gaussian data whose variance along the main
    directions of the batch's own answers is theirs (see `shares`): an early error lies mostly in these directions, in
    which the network follows it; a late one is in the detail, and the network takes it back.

    key(j) -> (kept, x0 (B, *S)): the whole network at query j of the plain trajectory; reuse(kept, j) -> x0.

    Groups are at most three tenths of the queries long, or what `count` of them need. One pass: N keys and about
    0.3 N^2 reuses; nothing but the answers is stored.
    """
    N = len(times)
    longest = max(1, min(N // 2, max(math.ceil(0.3 * N), 2 * math.ceil(N / count))))
    cost = torch.full((N, N + 1), math.inf, dtype=torch.float64)
    answers: dict[int, Tensor] = {}
    directions = weights = rest = None
    for i in reversed(range(N)):
        kept, answers[i] = key(i)
        if directions is None or weights is None or rest is None:
            directions, variance, left = spectrum(answers[i])
            directions = directions.to(answers[i])
            rest = shares(times, schedule, left).to(answers[i])
            weights = torch.stack([rest, *(shares(times, schedule, float(v)).to(rest) for v in variance)])[1:]
        cost[i, i + 1], total = 0.0, torch.zeros_like(answers[i]).flatten(1)
        for j in range(i + 1, min(i + longest, N)):
            error = (reuse(kept, j) - answers[j]).flatten(1)
            main = (error @ directions.T) * (weights[:, j] - rest[j])
            total = total + rest[j] * error + main @ directions
            cost[i, j + 1] = float(total.square().mean())
        answers.pop(i + longest, None)
    return cost


def spectrum(x0: Tensor) -> tuple[Tensor, Tensor, float]:
    """The main directions (r, D) of samples (B, *S), the variance along each, and the mean variance of the others.

    r is half of B, at most 16: what so few samples say of weaker directions is mostly of themselves.
    """
    x = x0.flatten(1).float()
    x = x - x.mean(0)
    _, s, directions = torch.linalg.svd(x, full_matrices=False)
    r = min(len(x) // 2, 16, len(s))
    variance = s.square() / len(x)
    left = float(variance[r:].sum()) / max(x.shape[1] - r, 1)
    return directions[:r], variance[:r], max(left, 1e-4)


def shares(times: Sequence[float], schedule: Schedule, variance: float) -> Tensor:
    """S_j (N,): by how much an error in answer j moves the final sample, for Gaussian data of this variance v.

    DDIM from r to s has x_s = a x_r + b x0 with a = sigma_s / sigma_r, b = alpha_s - a alpha_r, and the network's
    answer follows x_r by g = alpha_r v / (alpha_r^2 v + sigma_r^2), so S_r = b prod (a + b g) over the later steps.
    Queries at the same time share its S; the last step ends at time 0.
    """
    times = [round(t, 12) for t in times]
    path = sorted(set(times) | {0.0}, reverse=True)
    at = torch.tensor(path, dtype=torch.float64)
    alpha, sigma = schedule.alpha(at).tolist(), schedule.sigma(at).tolist()
    share, moved = {0.0: 0.0}, 1.0
    for k in reversed(range(len(path) - 1)):
        a = sigma[k + 1] / sigma[k]
        b = alpha[k + 1] - a * alpha[k]
        share[path[k]] = b * moved
        moved *= a + b * alpha[k] * variance / (alpha[k] ** 2 * variance + sigma[k] ** 2)
    many = Counter(times)
    return torch.tensor([share[t] / many[t] for t in times], dtype=torch.float64)
