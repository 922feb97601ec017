"""DDPM: the variance of its samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.plan import Plan, plan
from hasten.samplers import DDIM, DDPM
from hasten.schedules import Discrete, Schedule
from tests.samplers.problems import F64


def plan_variances(table: Plan, schedule: Schedule, v: float) -> Tensor:
    """Variance at every node of N(0, v) data under the plan with the exact linear denoiser, from the table alone."""
    K, M = len(table.a), table.C.shape[1]
    state = torch.zeros(1 + M, dtype=F64)
    state[0] = torch.sqrt(schedule.alpha(table.times[0]) ** 2 * v + schedule.sigma(table.times[0]) ** 2)
    states, answers, variances = [state], [], []
    for k in range(K):
        alpha, sigma = schedule.alpha(table.times[k]), schedule.sigma(table.times[k])
        answers.append(alpha * v / (alpha**2 * v + sigma**2) * states[k])
        draws = torch.cat([torch.zeros(1, dtype=F64), table.C[k]])
        old = sum((table.A[k, j] * states[j] for j in range(k)), torch.zeros(1 + M, dtype=F64))
        states.append(table.a[k] * states[k] + old + sum(table.B[k, j] * answers[j] for j in range(k + 1)) + draws)
        variances.append(states[-1].pow(2).sum())
    return torch.stack(variances)


@pytest.mark.parametrize(
    ("count", "large", "small", "deterministic"),
    [(100, 0.258652, 0.218981, 0.236041), (20, 0.298455, 0.150507, 0.185283), (10, 0.358521, 0.104222, 0.130759),
     (5, 0.558423, 0.043970, 0.050644)],
)  # fmt: skip
def test_ddpm_variance_on_a_gaussian(count: int, large: float, small: float, deterministic: float) -> None:
    """On N(.3, .25): known values at the end, and at every node the closed recursion of the variance."""
    schedule, v = Discrete.linear(), 0.25
    index = torch.linspace(999, 0, count, dtype=F64).round()
    times = torch.cat([(index + 1) / 1000, torch.zeros(1, dtype=F64)])
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    for sampler, final in ((DDPM("large"), large), (DDPM(), small), (DDIM(), deterministic), (DDIM(eta=1.0), small)):
        found = plan_variances(plan(sampler, schedule, times), schedule, v)
        assert found[-1].item() == pytest.approx(final, abs=1.5e-6)
        if not isinstance(sampler, DDPM):
            continue
        expected, now = [], alpha[0] ** 2 * v + sigma[0] ** 2
        for r in range(count):
            s, gain = r + 1, alpha[r] * v / (alpha[r] ** 2 * v + sigma[r] ** 2)
            beta = sigma[r] ** 2 - (alpha[r] / alpha[s] * sigma[s]) ** 2
            mean = alpha[r] / alpha[s] * sigma[s] ** 2 / sigma[r] ** 2 + alpha[s] * beta / sigma[r] ** 2 * gain
            added = beta if sampler.variance == "large" else beta * sigma[s] ** 2 / sigma[r] ** 2
            now = mean**2 * now + (0 if s == count else added)
            expected.append(now)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=0)
