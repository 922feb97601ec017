"""Samplings of `PlanScheduler` that begin at a later step, as image to image does, against plans run by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.adapters.diffusers import as_scheduler
from hasten.adapters.diffusers.plans import compiled_plan, time_grid
from hasten.errors import BadInput
from hasten.exact import Gaussian
from hasten.pick import pick
from hasten.plan import plan

from . import tiny

STEPS = 8
LINEAR = [
    "ddim",
    "ddim:eta=1",
    "ddpm",
    "consistency",
    "stochastic_distilled",
    "fast",
    "fast:kappa=1",
    "fast:approximation=step",
    "heun",
    "heun:churn=10",
    "plms",
    "plms:order=2",
    "plms:start=ramp",
    "deis",
    "sa",
    "unipc:order=3",
    "dpm:order=3",
    "dpm:sde=true",
    "dpm:order=2,multistep=false",
    "dpm:order=3,multistep=false",
]


def new_scheduler(sampler: str, table: Any = None) -> Any:
    scheduler = as_scheduler(sampler, like=table or tiny.scheduler())
    scheduler.set_timesteps(STEPS)
    return scheduler


def gaussian(scheduler: Any) -> Gaussian:
    return Gaussian(torch.tensor([0.3, -0.2]), torch.tensor([0.4, 0.05]), scheduler.hasten_schedule)


def driven(scheduler: Any, x: Tensor, timesteps: Tensor, network: Gaussian) -> Tensor:
    """As pipelines do: the network is evaluated at the pipeline's timesteps, whatever the scheduler's state."""
    schedule, noise = scheduler.hasten_schedule, torch.Generator().manual_seed(5)
    for t in timesteps:
        at = scheduler.spec.time(t)
        eps = (x - float(schedule.alpha(at)) * network(x, at)) / float(schedule.sigma(at))
        x = scheduler.step(eps, t, x, generator=noise).prev_sample
    return x


def by_hand(scheduler: Any, sampler: str, x: Tensor, first: int, network: Gaussian) -> Tensor:
    """The same trajectory by a plan: on the rest of the grid, or, for chains with times of their own, by whole rows."""
    noise = torch.Generator().manual_seed(5)
    if sampler.startswith("fast"):
        method = pick("samplers", f"{sampler},approximation=step" if ":" in sampler else "ddim")
        times = scheduler._full_plan.times[first:]
    else:
        method = pick(
            "samplers", {"plms": "plms:start=ramp", "plms:order=2": "plms:order=2,start=ramp"}.get(sampler, sampler)
        )
        at = scheduler.spec.time(scheduler.timesteps[first])
        times = scheduler.grid[int((scheduler.grid - at).abs().argmin()) :]
    compiled_plan = plan(method, scheduler.hasten_schedule, times)
    return compiled_plan(network, x, lambda: torch.randn(x.shape, generator=noise))


def places(scheduler: Any) -> range:
    """Where a sampling may begin: whole steps."""
    return range(scheduler.order, len(scheduler.timesteps), scheduler.order)


@pytest.mark.parametrize("sampler", [one for one in LINEAR if one not in ("heun:churn=10", "fast:approximation=step")])
def test_every_sampler_begins_anywhere_as_the_plan_by_hand(sampler: str) -> None:
    scheduler = new_scheduler(sampler)
    network = gaussian(scheduler)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    for first in places(scheduler):
        left = scheduler.timesteps[first:]
        if sampler.startswith("plms") and "ramp" not in sampler and first == 1:
            continue  # the repeated evaluation, below
        for how in ("index", "view", "value"):  # with set_begin_index, and without: by memory location or by value
            scheduler.set_timesteps(STEPS)
            left = scheduler.timesteps[first:].clone() if how == "value" else scheduler.timesteps[first:]
            if how == "index":
                scheduler.set_begin_index(first)
            ours = driven(scheduler, x, left, network)
            hand = by_hand(scheduler, sampler, x, first, network)
            assert torch.allclose(ours, hand, atol=2e-5, rtol=1e-4), (first, how)
            assert scheduler.begin_index == first


@pytest.mark.parametrize("sampler", LINEAR)
def test_the_rest_has_the_times_of_the_pipeline(sampler: str) -> None:
    scheduler = new_scheduler(sampler)
    for first in range(1, len(scheduler.timesteps)):
        scheduler.set_timesteps(STEPS)
        scheduler.set_begin_index(first)
        if "churn" in sampler and first % 2:  # noise was added between: the state of a step is not there any more
            with pytest.raises(BadInput, match=f"cannot begin at timestep {first} of 15: it lies inside"):
                scheduler.step(torch.zeros(1, 2), scheduler.timesteps[first], torch.zeros(1, 2))
            continue
        scheduler.step(torch.zeros(1, 2), scheduler.timesteps[first], torch.zeros(1, 2))
        evaluated = scheduler.spec.timestep(scheduler._trajectory.plan.times[:-1])
        assert torch.allclose(evaluated, scheduler.timesteps[first:].double(), atol=1e-3), first


@pytest.mark.parametrize("sampler", ["plms", "heun"])
def test_a_repeated_evaluation_leaves_the_state(sampler: str) -> None:
    """From the second of two evaluations at one time: as from that time, one evaluation later."""
    scheduler = new_scheduler(sampler)
    network = gaussian(scheduler)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    twice = [k for k in range(1, len(scheduler.timesteps) - 1) if scheduler.timesteps[k] == scheduler.timesteps[k + 1]]
    assert twice
    for first in twice[:3]:
        scheduler.set_timesteps(STEPS)
        scheduler.set_begin_index(first)
        early = driven(scheduler, x, scheduler.timesteps[first:], network)
        scheduler.set_timesteps(STEPS)
        scheduler.set_begin_index(first + 1)
        assert torch.allclose(early, driven(scheduler, x, scheduler.timesteps[first + 1 :], network), atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "fast", "heun", "unipc:order=3"])
def test_resumed_samplings_have_the_exact_end(sampler: str) -> None:
    """With many steps every one of them is near the end of the exact flow, wherever it begins."""
    scheduler = as_scheduler(sampler, like=tiny.scheduler())
    scheduler.set_timesteps(60)
    network = gaussian(scheduler)
    for first in (0, 20, 40):
        scheduler.set_timesteps(60)
        t = scheduler.timesteps[first * scheduler.order]
        x = scheduler.add_noise(torch.tensor([[0.9, 0.1]]), torch.full((1, 2), 0.7), t)
        scheduler.set_begin_index(first * scheduler.order)
        end = driven(scheduler, x, scheduler.timesteps[first * scheduler.order :], network)
        error = (end - network.endpoint(x, scheduler.spec.time(t), 0.0)).abs().max()
        assert error < (0.03 if sampler in ("ddim", "fast") else 0.01), (first, float(error))


def test_timesteps_by_value_and_those_that_are_none() -> None:
    """Timesteps as copies, numbers or rounded are matched; others are refused; an earlier one begins a new sampling."""
    scheduler = new_scheduler("heun")
    network = gaussian(scheduler)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    want = driven(scheduler, x, scheduler.timesteps, network)
    scheduler.set_timesteps(STEPS)
    assert torch.equal(driven(scheduler, x, scheduler.timesteps.clone(), network), want)
    scheduler.set_timesteps(STEPS)
    out = x
    for t in scheduler.timesteps.tolist():  # numbers
        at = scheduler.spec.time(t)
        eps = (out - float(scheduler.hasten_schedule.alpha(at)) * network(out, at)) / float(
            scheduler.hasten_schedule.sigma(at)
        )
        out = scheduler.step(eps, t, out).prev_sample
    assert torch.allclose(out, want, atol=1e-6)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(BadInput, match="timestep 1234 is none of this sampling: 999, "):
        scheduler.step(x, 1234, x)
    with pytest.raises(BadInput, match="all samples at one timestep"):
        scheduler.step(x, torch.tensor([1.0, 2.0, 3.0]), x)
    multistep = new_scheduler("unipc:order=3")
    first = multistep.timesteps[4:]
    want = driven(multistep, x, first, network)
    multistep.set_timesteps(STEPS)
    driven(multistep, x + 1, multistep.timesteps[:7], network)
    assert torch.allclose(driven(multistep, x, multistep.timesteps[4:], network), want, atol=1e-6)
    with pytest.raises(BadInput, match="all are done"):
        multistep.step(x, multistep.timesteps[0], x)


def test_plans_are_compiled_once() -> None:
    """Also in another scheduler for the same network, and for a later begin."""
    scheduler, x = new_scheduler("unipc:order=3"), torch.zeros(1, 2)
    before = compiled_plan.cache_info().misses, time_grid.cache_info().misses
    for other in (scheduler, new_scheduler("unipc:order=3")):
        other.set_timesteps(STEPS)
        other.set_begin_index(3)
        other.step(x, other.timesteps[3], x)
    assert other._full_plan is scheduler._full_plan
    assert (compiled_plan.cache_info().misses - before[0], time_grid.cache_info().misses - before[1]) == (
        1,
        0,
    )  # the rest
    assert new_scheduler("unipc:order=3", tiny.scheduler(beta_end=0.02))._full_plan is not scheduler._full_plan
    scheduler.set_timesteps(STEPS + 1)
    assert scheduler._full_plan.nfe == STEPS + 1
