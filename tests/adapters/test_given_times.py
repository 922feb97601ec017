"""Sigmas, timesteps and shifts of pipelines: Euler on them is diffusers' own scheduler, a multistep plan the plan."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten.adapters.diffusers import as_scheduler, times_like
from hasten.errors import BadInput
from hasten.plan import plan
from hasten.samplers import UniPC
from hasten.schedules import Flow

from . import tiny

SIGMAS = [1.0, 0.85, 0.5, 0.2]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flow_euler(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def sampled(scheduler: Any, x: Tensor, **more: Any) -> Tensor:
    """All steps with a network that depends on the state and on its time input."""
    for t in scheduler.timesteps:
        x = scheduler.step((x + float(t) / 700).sin(), t, x, **more).prev_sample
    return x


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shift": 3.0},
        {"shift": 0.5, "invert_sigmas": True},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1},
        {"shift": 2.0, "shift_terminal": 0.05},
        {"use_karras_sigmas": True},
        {"shift": 3.0, "use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_euler_is_the_flow_scheduler_of_diffusers(options: dict[str, Any]) -> None:
    """Given sigmas, the usual default sigmas, and a number of steps: the same timesteps, sigmas and samples."""
    theirs = flow_euler(**options)
    ours = as_scheduler("ddim", "like", like=theirs)
    mu = {"mu": 0.9} if options.get("use_dynamic_shifting") else {}
    calls: list[dict[str, Any]] = [{"sigmas": SIGMAS}, {"sigmas": np.linspace(1.0, 1 / 5, 5)}]
    for call in [*calls, {"num_inference_steps": 5}]:
        theirs.set_timesteps(**call, **mu)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours.set_timesteps(**call, **mu)
        assert torch.allclose(ours.timesteps, theirs.timesteps, atol=2e-3)
        assert torch.allclose(ours.sigmas, theirs.sigmas, atol=2e-6)
        assert torch.allclose(sampled(ours, noise(2, 3)), sampled(theirs, noise(2, 3)), atol=2e-5)
    again = type(ours).from_config(ours.config)  # as a saved pipeline has it
    again.set_timesteps(5, **mu)
    assert torch.equal(again.timesteps, ours.timesteps)


@pytest.mark.parametrize("spec", ["unipc:order=3", "dpm:order=3,multistep=false", "heun", "deis", "plms"])
def test_a_multistep_plan_is_the_plan_run_by_hand(spec: str) -> None:
    """Inside the scheduler, on sigmas of the pipeline: the plan of the sampler on these times, step by step."""
    from hasten.pick import pick

    scheduler = as_scheduler(spec, like=flow_euler(shift=3.0, use_dynamic_shifting=True, shift_terminal=0.05))
    with pytest.warns(UserWarning, match="keeps these"):
        scheduler.set_timesteps(sigmas=SIGMAS, mu=0.7)
    x, schedule = noise(2, 3).double(), Flow(math.exp(0.7))
    assert abs(float(schedule.sigma(scheduler.grid[-2])) - 0.05) < 1e-6  # as shift_terminal says
    table = plan(pick("samplers", spec), schedule, scheduler.grid)

    def denoiser(z: Tensor, t: Tensor) -> Tensor:
        sigma = schedule.sigma(t)
        return z - sigma * (z + 1000 * float(sigma) / 700).sin()

    assert torch.allclose(sampled(scheduler, x.float()).double(), table(denoiser, x), atol=2e-5)
    given = as_scheduler(table, like=flow_euler(use_dynamic_shifting=True, shift_terminal=0.05))
    given.set_timesteps(sigmas=SIGMAS, mu=0.7) if table.nfe == len(SIGMAS) else given.set_timesteps(table.nfe, mu=0.7)
    assert torch.allclose(sampled(given, x.float()), sampled(again(scheduler, 0.7), x.float()), atol=1e-6)


def again(scheduler: Any, mu: float) -> Any:
    """A copy at the beginning of the same sampling."""
    other = copy.deepcopy(scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.set_timesteps(sigmas=SIGMAS, mu=mu)
    return other


def test_default_sigmas_say_the_number_of_steps() -> None:
    """linspace(1, 1 / n, n), which pipelines pass by default, leaves `times`, and a plan, as they are."""
    theirs = flow_euler(shift=3.0)
    ours, kept = (as_scheduler("unipc", "lambda", like=theirs, override_sigmas=k) for k in (False, True))
    ours.set_timesteps(4)
    want = ours.timesteps
    hunyuan, cosmos = np.linspace(1.0, 0.0, 5)[:-1], np.linspace(1 - 1 / 1000, 0.0, 5)[:-1]
    cogview = np.linspace(1000, 1.0, 4).astype(np.int64) / 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sigmas in (np.linspace(1.0, 1 / 4, 4), hunyuan, cosmos, cogview, torch.linspace(1.0, 1 / 4, 4)):
            ours.set_timesteps(sigmas=sigmas)
            assert torch.equal(ours.timesteps, want) and ours.num_inference_steps == 4
        kept.set_timesteps(sigmas=[*SIGMAS, 0.0])
        assert torch.equal(kept.timesteps, want)
    with pytest.warns(UserWarning, match="in place of times='lambda'"):
        ours.set_timesteps(sigmas=SIGMAS)
    assert not torch.allclose(ours.timesteps, want, atol=1.0)
    table = plan(UniPC(), Flow(3.0), kept.grid)
    planned = as_scheduler(table, like=theirs)
    planned.set_timesteps(sigmas=np.linspace(1.0, 1 / 4, 4))
    assert torch.equal(planned.timesteps, want)
    with pytest.raises(BadInput, match="requested other timesteps; as_scheduler.*override_sigmas=True. keeps the plan"):
        planned.set_timesteps(sigmas=SIGMAS)
    free = as_scheduler(table, like=theirs, override_sigmas=True)
    free.set_timesteps(sigmas=SIGMAS)
    assert torch.equal(free.timesteps, want)


def test_timesteps_beside_sigmas() -> None:
    """As CogView4 has it: the network gets the unshifted timesteps, the steps are those of the shifted sigmas."""
    theirs = flow_euler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75)
    timesteps = np.linspace(1000, 1.0, 5).astype(np.int64).astype(np.float32)
    call = {"timesteps": timesteps, "sigmas": timesteps / 1000, "mu": 0.6}
    theirs.set_timesteps(**call)
    ours, own = (as_scheduler("ddim", times, like=theirs) for times in ("like", "angle"))
    ours.set_timesteps(**call)
    assert torch.equal(ours.timesteps, theirs.timesteps) and torch.allclose(ours.sigmas, theirs.sigmas, atol=1e-6)
    assert torch.allclose(sampled(ours, noise(2, 3)), sampled(theirs, noise(2, 3)), atol=1e-5)
    own.set_timesteps(**call)  # the default of that pipeline: the times are those of as_scheduler
    unshifted = own.grid[:-1] * 1000
    assert torch.allclose(own.timesteps.double(), unshifted, atol=1.5) and not torch.allclose(own.grid, ours.grid)
    x, at = noise(2, 3), ours.timesteps[2]
    mixed = ours.scale_noise(x, at.reshape(1), torch.zeros(2, 3))  # img2img noises to the shifted sigma
    assert torch.allclose(mixed, (1 - theirs.sigmas[2]) * x, atol=1e-5)
    with pytest.raises(BadInput, match="5 steps and 3 timesteps"):
        ours.set_timesteps(5, timesteps=[900, 500, 100], sigmas=np.linspace(1, 0.2, 5), mu=0.6)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
def test_sigmas_of_a_table_are_read_unrounded(name: str, kind: str) -> None:
    """Karras, exponential and beta sigmas of a table lie between its entries; DPM and UniPC round their timesteps."""
    theirs = tiny.scheduler(name, **{f"use_{kind}_sigmas": True})
    ours = as_scheduler("ddim", "like", like=theirs)
    theirs.set_timesteps(6)
    ours.set_timesteps(6)
    schedule = ours.hasten_schedule
    ratio = schedule.sigma(ours.grid[:-1]) / schedule.alpha(ours.grid[:-1])
    assert torch.allclose(ratio, theirs.sigmas[:-1].double(), rtol=2e-4)
    assert torch.allclose(ours.timesteps, theirs.timesteps.float(), atol=1.0) and len(ours.timesteps) == 6
    assert bool((ours.timesteps % 1 > 1e-3).any()) and float(ours.grid[-1]) == 0


def test_a_flow_that_ends_at_its_last_sigma() -> None:
    """final_sigmas_type="sigma_min" of UniPC for flows: no evaluation is spent on a step of length 0."""
    from diffusers import UniPCMultistepScheduler

    options: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    theirs = UniPCMultistepScheduler(**options, final_sigmas_type="sigma_min")
    times = times_like(theirs, 5)
    theirs.set_timesteps(5)
    assert len(times) == 5 and abs(float(Flow(3.0).sigma(times[-1])) - float(theirs.sigmas[-1])) < 1e-6
    assert times_like(UniPCMultistepScheduler(**options), 5)[-1] == 0
    epsilon = UniPCMultistepScheduler(**{**options, "prediction_type": "epsilon"})
    assert as_scheduler("ddim", like=epsilon).spec.prediction == "eps"
    assert as_scheduler("ddim", like=theirs).spec.prediction == "flow"


def test_stochastic_sampling_is_the_consistency_sampler() -> None:
    theirs = flow_euler(shift=2.0, stochastic_sampling=True)
    ours = as_scheduler("consistency", "like", like=theirs)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    mine, other = (
        sampled(scheduler, noise(2, 3), generator=torch.Generator().manual_seed(5)) for scheduler in (ours, theirs)
    )
    assert torch.allclose(mine, other, atol=2e-5) and ours.config.stochastic_sampling
    with pytest.warns(UserWarning, match="that is the sampler 'consistency'"):
        as_scheduler("unipc", like=theirs).set_timesteps(4)


def test_tokens_with_timesteps_of_their_own() -> None:
    """Clean tokens stay, the others step, with diffusers' sign; tokens between are refused."""
    theirs = flow_euler(shift=2.0)
    ours = as_scheduler("ddim", "like", like=theirs)
    x = noise(2, 4, 3)
    clean = torch.tensor([[1.0, 0, 1, 1], [1, 1, 1, 0]])
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
        z = x
        for t in scheduler.timesteps:
            z = scheduler.step(-z.sin(), t, z, per_token_timesteps=t * clean).prev_sample
        results.append(z)
    assert torch.allclose(*results, atol=1e-5) and torch.equal(results[0][0, 1], x[0, 1])
    ours.set_timesteps(4)
    with pytest.raises(BadInput, match="condition with strength 1"):
        ours.step(x, ours.timesteps[0], x, per_token_timesteps=ours.timesteps[0] * clean * 0.5)


def test_attributes_of_other_schedulers_are_refused_by_name() -> None:
    table, flow = as_scheduler("ddim", like=tiny.scheduler()), as_scheduler("ddim", like=flow_euler())
    for scheduler, names in ((table, ["sigmas", "model_outputs", "_step_index"]), (flow, ["alphas_cumprod"])):
        for name in names:
            assert not hasattr(scheduler, name)
            with pytest.raises(BadInput, match=f"has no {name} .*use the pipeline with its own scheduler"):
                getattr(scheduler, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        table.nothing  # noqa: B018
    with pytest.raises(BadInput, match="times='like' takes those of a scheduler"):
        as_scheduler("ddim", "like", like=tiny.scheduler()).from_config({"times": "like"})


def test_from_config_of_another_scheduler_knows_it() -> None:
    """The idiom of diffusers, without as_scheduler: sigmas are stretched as the replaced scheduler stretches them."""
    from hasten.adapters.diffusers.scheduler_class import PlanScheduler

    theirs = flow_euler(shift=2.0, shift_terminal=0.1)
    ours = PlanScheduler.from_config(theirs.config, sampler="ddim", times="like")
    assert ours.config.original["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    assert torch.allclose(ours.sigmas, theirs.sigmas, atol=1e-6)
