"""Changes of the original pipeline, and unsupported uses of an accelerated network, warn or are refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch

import hasten
from hasten.adapters.diffusers import accelerate_pipeline, times_like
from hasten.errors import BadInput

from . import tiny
from .test_accelerated_network import CACHE, QUANTIZE, adapted, bare_of, sample_latents, sd


@pytest.mark.parametrize("accelerator", [CACHE, QUANTIZE])
def test_layers_added_to_the_original_later_warn(accelerator: str) -> None:
    pipe = sd()
    fast = accelerate_pipeline(pipe, accelerator, steps=10, prompts=["a cat"])
    first = sample_latents(fast)
    adapted(pipe.unet)
    with pytest.warns(UserWarning, match="other layers or weights"):
        assert torch.equal(sample_latents(fast), first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_latents(fast)  # once is enough
    bare_of(pipe.unet)
    again = accelerate_pipeline(pipe, accelerator, steps=10, prompts=["a cat"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(pipe.unet)
        adapted(again.unet)  # both have them
        sample_latents(again)


def test_replaced_weights_of_the_original_warn() -> None:
    pipe = sd()
    fast = accelerate_pipeline(pipe, CACHE, steps=10)
    pipe.unet.load_state_dict({key: 1.1 * value for key, value in pipe.unet.state_dict().items()}, assign=True)
    with pytest.warns(UserWarning, match="other layers or weights"):
        sample_latents(fast)


def test_weights_of_the_original_changed_in_place_are_those_of_the_accelerated_one() -> None:
    pipe = sd()
    fast = accelerate_pipeline(pipe, "deep_cache:every=1", steps=10)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)
    assert torch.equal(sample_latents(fast), sample_latents(pipe))


def test_an_accelerated_network_is_copied_and_not_pickled() -> None:
    fast = accelerate_pipeline(sd(), CACHE, steps=10)
    for thing in (fast.unet, fast):
        with pytest.raises(BadInput, match="cannot be pickled: pickle or save the original pipeline"):
            pickle.dumps(thing)
    first = sample_latents(fast)
    assert torch.equal(sample_latents(copy.deepcopy(fast)), first) and torch.equal(
        sample_latents(copy.copy(fast)), first
    )
    assert type(copy.copy(fast.unet)) is type(fast.unet)


def test_a_network_conditioned_on_an_image_is_refused() -> None:
    pipe = sd(
        unet=tiny.unet2d_condition(encoder_hid_dim_type="image_proj", encoder_hid_dim=16, addition_embed_type="image")
    )
    for accelerator in (CACHE, QUANTIZE, "compile:backend=eager", []):
        with pytest.raises(BadInput, match="image embedding instead of a text"):
            accelerate_pipeline(pipe, accelerator)


def test_a_scheduler_that_refuses_the_steps_is_one_line() -> None:
    few = tiny.scheduler("LCMScheduler")
    for ask in (
        lambda: times_like(few, 60),
        lambda: accelerate_pipeline(sd(scheduler=few), CACHE, steps=60),
    ):
        with pytest.raises(BadInput, match=r"LCMScheduler.set_timesteps\(60\) fails"):
            ask()


def test_torch_compile_of_an_accelerated_network_runs_it_as_it_is() -> None:
    fast: Any = accelerate_pipeline(sd(), CACHE, steps=10)
    first = sample_latents(fast)
    fast.unet = torch.compile(fast.unet, backend="eager")
    with pytest.warns(UserWarning, match="is not compiled by torch.compile"):
        assert torch.equal(sample_latents(fast), first)


def test_the_velocity_is_that_of_diffusers() -> None:
    theirs = tiny.scheduler("DDIMScheduler")
    ours = hasten.as_scheduler("ddim", like=theirs)
    x, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([20, 700])
    assert torch.allclose(ours.get_velocity(x, noise, t), theirs.get_velocity(x, noise, t), atol=1e-5)
    with pytest.raises(BadInput, match="at most 10000"):
        ours.set_timesteps(10**7)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "a", True])
def test_numbers_of_steps_are_checked(steps: Any) -> None:
    pipe = sd()
    for ask in (lambda: times_like(pipe.scheduler, steps), lambda: accelerate_pipeline(pipe, CACHE, steps=steps)):
        with pytest.raises(BadInput, match="steps must be a whole number of at least 1"):
            ask()


def test_bad_accelerators_samplers_grids_clips_and_schedulers() -> None:
    pipe = sd()
    for wrong in (5, [5], None):
        with pytest.raises(BadInput, match="accelerators are objects"):
            accelerate_pipeline(pipe, wrong)
    for method, more, messages in (
        (5, {}, "takes a sampler"),
        (None, {}, "takes a sampler"),
        ("ddim", {"times": 5}, "takes a time grid"),
        ("ddim", {"clip": -1}, "clip="),
        ("ddim", {"clip": float("nan")}, "clip="),
        ("ddim", {"clip": "x"}, "clip="),
        ("ddim", {"like": 5}, "like="),
        ("ddim", {"like": "fashion"}, "like="),
    ):
        with pytest.raises(BadInput, match=messages):
            hasten.as_scheduler(method, **{"like": pipe, **more})


def test_indices_and_timesteps_outside_are_refused() -> None:
    ours = hasten.as_scheduler("ddim", like=sd())
    ours.set_timesteps(5)
    for place in (5, 99, -1, 2.5, "a"):
        with pytest.raises(BadInput, match="set_begin_index takes an index among 5"):
            ours.set_begin_index(place)
    for timesteps in ([5000, 500], [500, -20]):
        with pytest.raises(BadInput, match="timesteps lie in 0 to 1000"):
            ours.set_timesteps(timesteps=timesteps)
