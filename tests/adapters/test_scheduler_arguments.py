"""Arguments of `set_timesteps` and `step` beside steps and samples: used, or refused by name."""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hasten
from hasten.adapters.diffusers import as_scheduler, times_like
from hasten.adapters.diffusers.schedules import mu_of, read_scheduler
from hasten.errors import BadInput
from hasten.plan import plan
from hasten.samplers import DDIM
from hasten.schedules import Flow

from . import tiny

CALL = re.compile(r"(scheduler\.step|scheduler\.set_timesteps|retrieve_timesteps)\(")


@cache
def keywords() -> dict[str, set[str]]:
    """Every keyword that a pipeline of the installed diffusers gives to step and set_timesteps, by method."""
    import diffusers

    names: dict[str, set[str]] = defaultdict(set)
    for file in (Path(diffusers.__file__).parent / "pipelines").rglob("*.py"):
        text = file.read_text()
        names["step"] |= set(re.findall(r'extra_step_kwargs\["(\w+)"\]', text))
        for match in CALL.finditer(text):
            if text[: match.start()].endswith("def "):
                continue
            depth, end = 1, match.end()
            while depth:
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                end += 1
            call = ast.parse(text[match.start() : end], mode="eval").body
            assert isinstance(call, ast.Call)
            method = "step" if match[1].endswith("step") else "set_timesteps"
            names[method] |= {word.arg for word in call.keywords if word.arg}
    return names


def test_every_keyword_of_every_pipeline_is_used_or_refused_by_name() -> None:
    known = keywords()
    assert {"eta", "generator", "use_clipped_model_output", "per_token_timesteps"} <= known["step"]
    assert {"mu", "sigmas", "timesteps", "original_inference_steps", "device"} <= known["set_timesteps"]
    scheduler, x = as_scheduler("ddim", like=tiny.scheduler()), torch.zeros(1, 2)
    for method in ("step", "set_timesteps"):
        takes = inspect.signature(getattr(scheduler, method)).parameters
        for name in sorted(known[method] - set(takes)):
            scheduler.set_timesteps(4)
            options = (x, scheduler.timesteps[0], x) if method == "step" else (4,)
            getattr(scheduler, method)(*options, **{name: None})
            scheduler.set_timesteps(4)
            with pytest.raises(BadInput, match=rf"{method}\({name}=.* is not supported by hasten's scheduler"):
                getattr(scheduler, method)(*options, **{name: 17.25})
            assert method == "set_timesteps" or scheduler._trajectory is None  # before anything was done


def test_step_refuses_options_of_the_samplers_noise() -> None:
    x = torch.zeros(1, 2)
    for sampler, eta, fine in [
        ("ddim", 0.0, True),
        ("ddim", 0.5, False),
        ("ddim:eta=1", 1.0, True),
        ("unipc", 1, False),
    ]:
        scheduler = as_scheduler(sampler, like=tiny.scheduler())
        scheduler.set_timesteps(4)
        if fine:
            scheduler.step(x, scheduler.timesteps[0], x, eta=eta)
        else:
            with pytest.raises(BadInput, match="as_scheduler.'ddim:eta=1'"):
                scheduler.step(x, scheduler.timesteps[0], x, eta=eta)
    for name, neutral, evaluated in [("s_churn", 0.0, 1.0), ("s_tmax", math.inf, 5.0), ("s_noise", 1.0, 1.01)]:
        scheduler.set_timesteps(4)
        scheduler.step(x, scheduler.timesteps[0], x, **{name: neutral})
        with pytest.raises(BadInput, match=f"step.{name}="):
            scheduler.step(x, scheduler.timesteps[1], x, **{name: evaluated})
    with pytest.raises(BadInput, match="use_clipped_model_output=True"):
        scheduler.step(x, scheduler.timesteps[1], x, use_clipped_model_output=True)


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, "four"])
def test_steps_are_integers(steps: Any) -> None:
    scheduler = as_scheduler("ddim", like=tiny.scheduler())
    with pytest.raises(BadInput, match="num_inference_steps must be a whole number of at least 1"):
        scheduler.set_timesteps(steps)
    with pytest.raises(BadInput, match="one of them"):
        scheduler.set_timesteps()
    for wrong in ([], [3, 5], [math.nan], 4, ["a"]):
        with pytest.raises(BadInput, match="timesteps must be"):
            scheduler.set_timesteps(timesteps=wrong)
    scheduler.set_timesteps(np.int64(3))
    assert len(scheduler.timesteps) == 3


@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
def test_the_shift_of_a_size(time_shift_type: str) -> None:
    """mu and sigmas give the timesteps, and on them the samples, of the flow scheduler that is replaced."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, time_shift_type=time_shift_type)
    ours = as_scheduler("ddim", "trailing", like=theirs)
    x, sigmas = torch.randn(1, 2, generator=torch.Generator().manual_seed(0)), np.linspace(1.0, 1 / 5, 5)
    for mu in (0.5, 1.3):
        theirs.set_timesteps(sigmas=sigmas, mu=mu)
        ours.set_timesteps(5, mu=mu)  # trailing is what such pipelines give as sigmas
        assert torch.allclose(ours.timesteps, theirs.timesteps, atol=1e-3)
        ours.set_timesteps(sigmas=sigmas, mu=mu, device="cpu")
        assert torch.allclose(ours.timesteps, theirs.timesteps, atol=1e-3)
        assert torch.allclose(ours.sigmas, theirs.sigmas, atol=1e-6)
        theirs.set_timesteps(5, mu=mu)
        own = read_scheduler(theirs, mu=mu).timestep(times_like(theirs, 5, mu=mu)[:-1])
        assert torch.allclose(own, theirs.timesteps.double(), atol=1e-2)
        theirs.set_timesteps(sigmas=sigmas, mu=mu)
        assert torch.allclose(times_like(ours, 5, mu=mu), ours.grid)
        ours.set_timesteps(5, mu=mu)
        a = b = x
        for t, other in zip(ours.timesteps, theirs.timesteps):
            a, b = ours.step(a.sin(), t, a).prev_sample, theirs.step(b.sin(), other, b).prev_sample
        assert torch.allclose(a, b, atol=1e-5)
    with pytest.warns(UserWarning, match="called without mu: mu=0.5 is used"):
        ours.set_timesteps(5)
    with pytest.raises(BadInput, match="depend on the image size"):
        times_like(theirs, 5)
    with pytest.raises(BadInput, match="lie in .0, 1."):
        ours.set_timesteps(sigmas=[2.0, 1.0], mu=1.0)
    again = type(ours).from_config(ours.config)
    again.set_timesteps(5, mu=1.3)
    ours.set_timesteps(5, mu=1.3)
    assert torch.equal(again.timesteps, ours.timesteps) and again.hasten_schedule == ours.hasten_schedule


def test_mu_without_a_shift_that_depends_on_it() -> None:
    """As in diffusers: a flow of constant shift is given mu and does not use it; a table refuses it."""
    flow = as_scheduler("ddim", like=tiny.sd3_pipeline())
    flow.set_timesteps(4)
    want = flow.timesteps
    flow.set_timesteps(4, mu=1.0)
    assert torch.equal(flow.timesteps, want)
    with pytest.raises(BadInput, match="mu=1.0. is for flows"):
        as_scheduler("ddim", like=tiny.scheduler()).set_timesteps(4, mu=1.0)
    result = plan(DDIM(), Flow(2.0), torch.tensor([1.0, 0.5, 0.0]).double())
    scheduled = as_scheduler(result, like=tiny.sd3_pipeline(use_dynamic_shifting=True))
    scheduled.set_timesteps(2, mu=math.log(2.0))
    with pytest.raises(BadInput, match="another shift than 2.718"):
        scheduled.set_timesteps(2, mu=1.0)


def test_sd3_with_dynamic_shifting_is_the_pipeline() -> None:
    """The pipeline computes mu from the image size, and hasten's scheduler uses it."""
    pipe = tiny.sd3_pipeline(use_dynamic_shifting=True)
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs, visited = pipe("a cat", latents=noise, **options).images, pipe.scheduler.timesteps
    mu = mu_of(pipe.scheduler, 4 * 4)
    assert mu is not None and mu < 0.5
    pipe.scheduler = as_scheduler("ddim", times_like(pipe.scheduler, 4, mu=mu), like=pipe)
    ours = pipe("a cat", latents=noise, **options).images
    assert torch.allclose(pipe.scheduler.timesteps, visited, atol=1e-2)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_sigmas_of_a_table_are_those_of_euler() -> None:
    from diffusers import EulerDiscreteScheduler

    theirs = EulerDiscreteScheduler.from_config(tiny.scheduler().config)
    ours = as_scheduler("ddim", like=theirs)
    sigmas = [14.0, 5.0, 1.0, 0.2, 0.0]
    theirs.set_timesteps(sigmas=sigmas)
    with pytest.warns(UserWarning, match="its own sigmas"):
        ours.set_timesteps(sigmas=sigmas)
    assert torch.allclose(ours.timesteps, theirs.timesteps.float(), atol=0.02)
    with pytest.raises(BadInput, match="set_timesteps: 3 steps and 5 sigmas"):
        ours.set_timesteps(3, sigmas=sigmas)


@pytest.mark.parametrize(("original", "strength"), [(50, 1.0), (40, 1.0), (50, 0.6)])
def test_latent_consistency_timesteps(original: int, strength: float) -> None:
    from diffusers import LCMScheduler

    theirs = LCMScheduler.from_config(tiny.scheduler().config)
    ours = as_scheduler("consistency", like=theirs)
    theirs.set_timesteps(4, original_inference_steps=original, strength=strength)
    ours.set_timesteps(4, original_inference_steps=original, strength=strength)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert ours.config.original_inference_steps == 50
    with pytest.raises(BadInput, match="has no 51 steps"):
        ours.set_timesteps(51, original_inference_steps=original, strength=strength)


def stepped(scheduler: Any, x: Tensor, output: Tensor) -> Tensor:
    scheduler.set_timesteps(4)
    return scheduler.step(output, scheduler.timesteps[1], x).pred_original_sample


def test_clipping_and_thresholding_are_those_of_like() -> None:
    """x0 is clipped as by the replaced scheduler, unless clip= says otherwise; entries of other schedulers do not count."""
    from diffusers import DDPMScheduler, EulerDiscreteScheduler

    x, output = 3 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 3, 4, 4)
    for options in (
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 2.0},
        {"clip_sample": False},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
    ):
        theirs = DDPMScheduler(**options)
        ours = as_scheduler("ddim", "trailing", like=theirs)
        theirs.set_timesteps(4)
        ours.set_timesteps(timesteps=theirs.timesteps)
        want = theirs.step(output, theirs.timesteps[1], x).pred_original_sample
        assert torch.allclose(ours.step(output, ours.timesteps[1], x).pred_original_sample, want, atol=1e-5), options
        again = type(ours).from_config(as_scheduler("ddim", like=ours).config)
        assert torch.equal(stepped(again, x, output), stepped(as_scheduler("ddim", like=theirs), x, output))
    theirs = DDPMScheduler(clip_sample=True)
    assert as_scheduler("ddim", like=theirs, clip=False).config.clip is None
    assert as_scheduler("ddim", like=theirs, clip=0.5).config.clip == 0.5
    assert as_scheduler("ddim", like=theirs.config).config.clip == 1.0
    assert as_scheduler("ddim", like=EulerDiscreteScheduler.from_config(theirs.config)).config.clip is None


def test_learned_variances_are_dropped() -> None:
    scheduler, x = as_scheduler("ddim", like=tiny.scheduler()), torch.randn(2, 4, 8, 8)
    output = torch.randn(2, 8, 8, 8)
    scheduler.set_timesteps(4)
    one = scheduler.step(output, scheduler.timesteps[0], x).prev_sample
    scheduler.set_timesteps(4)
    assert torch.equal(scheduler.step(output[:, :4], scheduler.timesteps[0], x).prev_sample, one)
    with pytest.raises(BadInput, match="the network gave .2, 5, 8, 8. for a sample"):
        scheduler.step(torch.randn(2, 5, 8, 8), scheduler.timesteps[1], x)


def test_what_pipelines_read_of_a_scheduler() -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler()
    ours = as_scheduler("ddim", like=theirs)
    assert torch.allclose(ours.betas, theirs.betas, atol=1e-6)
    assert torch.allclose(ours.alphas[5], theirs.alphas[5], atol=1e-6)
    ratio = torch.prod(ours.alphas[torch.tensor(20.0) : torch.tensor(80.5)])  # Text2Video-Zero does this
    low, high = (theirs.alphas_cumprod[k] for k in (20, 80))
    assert theirs.alphas_cumprod[81] / low < ratio < high / low
    assert float(ours.final_alpha_cumprod) == 1.0 and ours.config.variance_type == "fixed_small"
    assert not hasattr(ours, "sigmas")  # of a table they mean other things to pipelines
    ours.set_timesteps(3)
    x = torch.ones(1, 2)
    result = [ours.step(0.1 * x, t, x, return_dict=False) for t in ours.timesteps]
    assert all(len(pair) == 2 for pair in result) and torch.equal(*result[-1])  # (latents, denoised)


def flux() -> Any:
    """Whose noise levels and shift are given to the scheduler by the pipeline."""
    import diffusers

    transformer = tiny.seeded(
        lambda: diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=False,
        )
    )
    table = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return tiny.quiet(diffusers.FluxPipeline(scheduler=table, vae=tiny.vae(), transformer=transformer, **nothing))


def test_flux_is_the_pipeline() -> None:
    """The shift of the image size, and the times passed to as_scheduler, not those of the pipeline."""

    def drawn(pipe: Any) -> Tensor:
        seeds = [torch.Generator().manual_seed(k) for k in range(3)]
        return pipe(
            prompt_embeds=torch.randn(1, 5, 32, generator=seeds[0]),
            num_inference_steps=4,
            height=16,
            width=16,
            pooled_prompt_embeds=torch.randn(1, 16, generator=seeds[1]),
            generator=seeds[2],
            output_type="latent",
        ).images

    pipe = flux()
    theirs, visited = drawn(pipe), pipe.scheduler.timesteps
    pipe.scheduler = as_scheduler("ddim", "trailing", like=flux())
    assert torch.allclose(drawn(pipe), theirs, atol=1e-4) and torch.allclose(
        pipe.scheduler.timesteps, visited, atol=1e-2
    )
    pipe.scheduler = as_scheduler("unipc:order=3", "angle", like=flux())
    assert torch.isfinite(drawn(pipe)).all() and not torch.allclose(pipe.scheduler.timesteps, visited, atol=1.0)


@pytest.mark.parametrize("sampler", ["ddim", "unipc:order=3"])
def test_text_to_video_zero_runs(sampler: str) -> None:
    """It restarts in the middle, with more frames, at times that it has left already."""
    name = "diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero"
    kind: Any = pytest.importorskip(name).TextToVideoZeroPipeline
    parts = {key: value for key, value in tiny.sd_pipeline().components.items() if key != "image_encoder"}
    pipe = tiny.quiet(kind(**parts, requires_safety_checker=False))
    pipe.scheduler = as_scheduler(sampler, like=pipe)
    options = {"video_length": 2, "num_inference_steps": 10, "t0": 4, "t1": 6, "height": 16, "width": 16}
    result = pipe("a cat", generator=torch.Generator().manual_seed(0), output_type="latent", **options).images
    assert result.shape == (2, 4, 8, 8) and torch.isfinite(torch.as_tensor(result)).all()


def test_latent_consistency_pipelines_run() -> None:
    """They decode `denoised`: after the last evaluation the result, also of a multistep sampler."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    pipe = tiny.sd_pipeline(
        "LatentConsistencyModelPipeline",
        unet=tiny.unet2d_condition(time_cond_proj_dim=8),
        scheduler=LCMScheduler.from_config(tiny.SD_TABLE),
    )
    assert isinstance(pipe, LatentConsistencyModelPipeline)
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "height": 16, "width": 16}
    for sampler in ("consistency", "unipc"):
        pipe.scheduler = as_scheduler(sampler, like=pipe)
        result = pipe(
            "a cat", generator=torch.Generator().manual_seed(0), original_inference_steps=50, **options
        ).images
        assert torch.isfinite(result).all() and pipe.scheduler.timesteps[0] == 999.0
    assert hasten.as_scheduler("ddim", like=pipe).config.original_inference_steps == 50
