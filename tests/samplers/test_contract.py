"""The contract of every sampler: order of convergence, both ends, plan, noise, evaluations."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput, HastenError
from hasten.exact import g8
from hasten.plan import plan
from hasten.plan.draw import draw
from hasten.samplers import DDIM, DDPM, DEIS, PLMS, DPMSolver, Heun, UniPC
from hasten.sampling import Noise, walk
from tests.samplers.problems import (
    ALL,
    CASES,
    ENDS,
    F64,
    FOUR,
    LINEAR,
    Basis,
    between,
    declared,
    discovered,
    drive,
    ends,
    is_stochastic,
    label,
    mixture,
    mixture_ode,
    normals,
    rms,
    unlowered,
)

STOCHASTIC = [s for s in LINEAR if is_stochastic(s)]
DETERMINISTIC = [s for s in LINEAR if s not in STOCHASTIC]
over_schedules = pytest.mark.parametrize("schedule", ALL.values(), ids=list(ALL))
over_ends = pytest.mark.parametrize("schedule", ENDS.values(), ids=list(ENDS))
over_four = pytest.mark.parametrize("schedule", FOUR.values(), ids=list(FOUR))


def over(samplers: list[Any]) -> Any:
    return pytest.mark.parametrize("sampler", samplers, ids=[label(s) for s in samplers])


def test_one_public_sampler_a_file() -> None:
    found = discovered()
    assert len(found) >= 7 and all(len(classes) == 1 for classes in found.values()), found


@over([c for found in discovered().values() for c in found])
def test_a_sampler_is_a_frozen_documented_dataclass(sampler: type) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler().linear = False
    doc = inspect.getdoc(sampler) or ""
    assert all(word in doc for word in ("References:", "NFE", "rder")), (
        f"{sampler.__name__}: say formula, order, NFE, reference"
    )


# ---- order of convergence -----------------------------------------------------------------------------------------

COUNTS = (40, 120)
Q0, Q1 = 6.0, 0.1


def grid_for(sampler: Any, schedule: Any, steps: int) -> Tensor:
    """Equal steps in lam. Multistep methods are given exact starting values by a warm-up of ever longer steps; one-step
    methods need none, and PLMS, whose weights are those of a uniform grid, must have none. Groups of 3 must leave a
    last group of 2, not of 1: the counts are made 2 modulo 3."""
    alone = isinstance(sampler, (DDIM, Heun, PLMS)) or (isinstance(sampler, DPMSolver) and not sampler.multistep)
    return between(
        schedule, Q0, Q1, steps + (2 - steps % 3 if alone and sampler.order == 3 else 0), warm=0 if alone else 12
    )


@over_four
@over(DETERMINISTIC)
def test_order_of_convergence(sampler: Any, schedule: Any) -> None:
    """The slope of the error over a factor of 3 in steps is the declared order, from q = 6 to q = 0.1, on the Gaussian G8
    (against its closed form) and on the mixture M2 (against DOP853), both in one run."""
    gaussian, modes = g8(schedule), mixture("M2", schedule)
    mean, v = gaussian.mean, gaussian.variance
    start = mean + normals(16, 8) * torch.sqrt(v + Q0**2)
    exact = mean + (start - mean) * torch.sqrt((v + Q1**2) / (v + Q0**2))
    starts, ends_ = (torch.cat(pair, 1) for pair in zip((start, exact), mixture_ode("M2", 16, Q0, Q1)))

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        return torch.cat([gaussian(z[:, :8], t), modes(z[:, 8:], t)], 1)

    errors = []
    for steps in COUNTS:
        times = grid_for(sampler, schedule, steps)
        z, _ = drive(unlowered(sampler), schedule, denoise, starts * schedule.alpha(times[0]), times)
        wrong = z / schedule.alpha(times[-1]) - ends_
        errors.append([part.square().mean().sqrt().item() for part in (wrong[:, :8], wrong[:, 8:])])
    slopes = [math.log(a / b) / math.log(COUNTS[1] / COUNTS[0]) for a, b in zip(*errors)]
    assert declared(sampler) - 0.3 < slopes[0] < declared(sampler) + 0.8, (slopes, errors)
    assert declared(sampler) - 0.3 < slopes[1], (slopes, errors)


def variance_error(sampler: Any, schedule: Any, steps: int, v: float = 0.25) -> float:
    """Relative error of the variance at the end of a stochastic run on N(0, v); exact, as the run is linear in its noises."""
    times = between(schedule, 5.0, 0.2, steps)
    basis = Basis()
    a, s = schedule.alpha(times), schedule.sigma(times)
    x = torch.sqrt(a[0] ** 2 * v + s[0] ** 2) * basis()

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return (alpha * v / (alpha**2 * v + sigma**2)) * z

    z, _ = drive(unlowered(sampler), schedule, denoise, x, times, basis)
    return (z.pow(2).sum() / (a[-1] ** 2 * v + s[-1] ** 2) - 1).abs().item()


@over_four
@over(STOCHASTIC)
def test_order_in_law_on_a_gaussian(sampler: Any, schedule: Any) -> None:
    coarse, fine = variance_error(sampler, schedule, 40), variance_error(sampler, schedule, 160)
    assert math.log2(coarse / fine) / 2 > declared(sampler) - 0.25, (coarse, fine)


# ---- both ends of every schedule ----------------------------------------------------------------------------------


def noise_form(sampler: Any, schedule: Any) -> float:
    """What rounding may add where differences of eps stand for differences of x0: they are amplified by up to q^2."""
    q = torch.exp(-schedule.lam(ends(schedule, 9)))
    return 2e-14 * q[q.isfinite()].max().item() ** 2 if vars(sampler).get("predict") == "eps" else 0.0


@over_schedules
@over(LINEAR)
def test_states_follow_the_schedule(sampler: Any, schedule: Any) -> None:
    """When every output is x, the state at every node is alpha x plus noise of variance sigma^2, from end to end.

    Exact for all but: DDPM "large" (its variance is larger by definition) and the noise-prediction SDE (to first order
    only).
    """
    basis = Basis()
    x = torch.zeros(basis.size, dtype=F64)
    x[-1] = 1.0
    times = ends(schedule, 9)
    alphas, sigmas = schedule.alpha(times), schedule.sigma(times)
    rounding = 1e-11 * sigmas.max().item() + noise_form(sampler, schedule)
    states: list[Tensor] = []

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        states.append(torch.stack([schedule.alpha(t), schedule.sigma(t), z[-1], z[:-1].norm()]))
        return x

    z, _ = drive(sampler, schedule, denoise, alphas[0] * x + sigmas[0] * basis(), times, basis)
    alpha, sigma, mean, spread = torch.stack(states).T
    torch.testing.assert_close(mean, alpha, rtol=0, atol=rounding)
    if getattr(sampler, "variance", "small") == "small" and not (
        is_stochastic(sampler) and vars(sampler).get("predict") == "eps"
    ):
        torch.testing.assert_close(spread, sigma, rtol=1e-10, atol=rounding)
    torch.testing.assert_close(z, alphas[-1] * x, rtol=0, atol=rounding)


@over_ends
@over(CASES)
def test_plan_is_the_coroutine(sampler: Any, schedule: Any) -> None:
    """The table gives what the algorithm gives, from end to end, with the same draws; and evaluates as often as declared."""
    if not sampler.linear:
        with pytest.raises(HastenError, match="linear|compiled"):
            plan(sampler, schedule, ends(schedule, 3))
        return
    model = mixture("M2", schedule)
    for steps in (1, 2, 7):
        times = ends(schedule, steps)
        compiled = plan(sampler, schedule, times)
        noise = Noise([3, 4, 5], (2,), dtype=F64)
        x = schedule.prior_std(times[0]) * noise.initial()
        direct, evaluated = drive(sampler, schedule, model, x, times, noise.draw)
        noise = Noise([3, 4, 5], (2,), dtype=F64)
        noise.initial()
        table = compiled(model, x, noise)
        assert torch.isfinite(direct).all()
        torch.testing.assert_close(table, direct, rtol=1e-12, atol=1e-12 + noise_form(sampler, schedule))
        assert len(evaluated) == sampler.nfe(steps) == compiled.nfe
        torch.testing.assert_close(torch.stack(evaluated), compiled.times[:-1], rtol=0, atol=0)


# ---- calls --------------------------------------------------------------------------------------------------------


class Batched(torch.nn.Module):
    """Hands the network one time per sample rather than one for all."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner, self.schedule = inner, inner.schedule

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.inner(x_t, t.expand(len(x_t)), **cond)


@over(CASES)
def test_one_time_for_all_or_one_each(sampler: Any) -> None:
    schedule = FOUR["Flow"]
    model, times = mixture("M2", schedule), ends(schedule, 5)
    one, each = (
        walk(sampler, m, n.initial(), times, n)
        for m in (model, Batched(model))
        for n in [Noise([0, 1], (2,), dtype=F64)]
    )
    torch.testing.assert_close(one, each, rtol=1e-12, atol=1e-12)


@over(CASES)
def test_a_sample_depends_on_its_own_seed_only(sampler: Any) -> None:
    schedule = FOUR["EDM"]
    model, times = mixture("M2", schedule), ends(schedule, 6)
    seeds = [11, 12, 13, 14, 15]
    together = draw(model, sampler, times, Noise(seeds, (2,), dtype=F64))
    alone = torch.cat([draw(model, sampler, times, Noise([seed], (2,), dtype=F64)) for seed in reversed(seeds)])
    torch.testing.assert_close(together, alone.flip(0), rtol=1e-10, atol=1e-10)
    assert rms(together[0], together[1]) > 1e-3


@over(LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_keep_their_dtype(sampler: Any, dtype: torch.dtype) -> None:
    schedule = FOUR["VPCosine"]
    noise = Noise([0], (2,), dtype=dtype)
    seen = []

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        seen.append((z.dtype, t.dtype, t.ndim))
        return 0.5 * z

    z, _ = drive(sampler, schedule, denoise, noise.initial(), ends(schedule, 4), noise.draw)
    assert z.dtype == dtype and set(seen) == {(dtype, F64, 0)}


@over([UniPC(3), DPMSolver(3), DPMSolver(2, sde=True), DEIS(3), PLMS(), Heun(), DDIM(eta=0.5)])
@over_ends
def test_times_can_be_optimised(sampler: Any, schedule: Any) -> None:
    """The result is differentiable in the inner times, with finite gradients at both ends, and the gradient is the
    difference quotient."""
    weights = torch.linspace(0.5, 1.5, 12, dtype=F64)
    draws = [torch.full((), 0.3 * (-1) ** k, dtype=F64) for k in range(12)]

    def run(times: Tensor) -> Tensor:
        outputs, noises = iter(weights), iter(draws)
        z, _ = drive(
            sampler,
            schedule,
            lambda z, t: next(outputs) * torch.sin(z),
            torch.ones((), dtype=F64),
            times,
            lambda: next(noises),
        )
        return z

    times = ends(schedule, 6)
    times[1:-1] -= 3.3e-4  # off the table's entries, where a Discrete schedule has kinks
    times.requires_grad_()
    (gradient,) = torch.autograd.grad(run(times), times)
    assert torch.isfinite(gradient).all()
    step = 1e-6 * torch.eye(7, dtype=F64)
    for k in range(1, 6):
        difference = (run(times.detach() + step[k]) - run(times.detach() - step[k])) / 2e-6
        assert gradient[k].item() == pytest.approx(difference.item(), rel=2e-4, abs=1e-5)


@over([c() for found in discovered().values() for c in found])
@pytest.mark.parametrize("times", [[1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0]])
def test_times_must_decrease(sampler: Any, times: list[float]) -> None:
    with pytest.raises(BadInput, match="decrease|at least 2|needs|sampler of"):  # or what it lacks
        walk(sampler, lambda z, t: z, torch.ones(1, 1), torch.tensor(times, dtype=F64), schedule=FOUR["Flow"])


@pytest.mark.parametrize(
    ("make", "word"),
    [
        ((DPMSolver, {"order": 4}), "1, 2 or 3"),
        ((DPMSolver, {"third": "ture"}), "did you mean 'true'"),
        ((DPMSolver, {"predict": "v"}), "eps"),
        ((DPMSolver, {"sde": True, "multistep": False}), "multistep=True"),
        ((UniPC, {"variant": "bh3"}), "bh2"),
        ((UniPC, {"order": 0}), "1, 2, 3 or 4"),
        ((DEIS, {"variable": "rh"}), "did you mean 'rho'"),
        ((PLMS, {"order": 5}), "1, 2, 3 or 4"),
        ((PLMS, {"start": "hun"}), "heun"),
        ((DDPM, {"variance": "smal"}), "did you mean 'small'"),
        ((DDIM, {"eta": 2.0}), r"\[0, 1\]"),
        ((Heun, {"churn": -1.0}), "churn"),
    ],
)
def test_bad_options_name_the_good_ones(make: Any, word: str) -> None:
    with pytest.raises(BadInput, match=word):
        make[0](**make[1])
