"""Accelerated networks in pipelines: two evaluations per step, other schedulers, few steps, devices, half precision."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.adapters.diffusers import accelerate_pipeline, times_like
from hasten.adapters.diffusers.wrap import split_network
from hasten.errors import BadInput

from ..accelerators._ranks import together
from ..pretend import Pretended, put_pipeline, taken
from . import tiny
from .test_accelerated_network import CACHE, CALL, QUANTIZE, STEPS, relative_error, sample_latents, sd, start

SMALL = "quantize:images=1,steps=2,groups=2,ranges=minmax"
PROPAGATE = "encoder_propagation:keys=uniform,every=2"


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


# Reuse, against the formula of each method


def evaluations(name: str) -> tuple[Any, Any, dict[str, Any], Tensor]:
    """A pipeline, its network, the conditions by hasten's names, and noisy samples for every evaluation."""
    torch.manual_seed(11)
    if name == "sd":
        pipe: Any = sd()
        net, cond = pipe.unet, {"text": torch.randn(2, 5, 16)}
    elif name == "model":
        pipe = tiny.ddpm_pipeline(timestep_spacing="trailing")
        net, cond = pipe.unet, {}
    elif name == "dit":
        pipe = tiny.dit_pipeline()
        net, cond = pipe.transformer, {"label": torch.tensor([1, 1000])}
    else:
        pipe = tiny.sd3_pipeline()
        net, cond = pipe.transformer, {"text": torch.randn(2, 5, 32), "added_text_embeds": torch.randn(2, 32)}
    return pipe, net, cond, torch.randn(STEPS, 2, net.config.in_channels, 8, 8)


def answer(net: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    """The network called as its pipeline calls it."""
    names = {"text": "encoder_hidden_states", "label": "class_labels", "added_text_embeds": "pooled_projections"}
    return net(x, timestep=t.expand(len(x)), return_dict=False, **{names[key]: v for key, v in cond.items()})[0]


@pytest.mark.parametrize("name", ["sd", "model", "dit", "sd3"])
@pytest.mark.parametrize("accelerator", [CACHE, PROPAGATE])
@torch.no_grad()
def test_reuse_equals_the_formula(name: str, accelerator: str) -> None:
    """Between key steps: own x_t (DeepCache) or none (propagation), own time, the features of the last key step."""
    pipe, net, cond, xs = evaluations(name)
    split: Any = split_network(net, with_variance=True)
    if accelerator == CACHE and not hasattr(split, "deep"):
        with pytest.raises(BadInput, match="has no shallow part"):
            accelerate_pipeline(pipe, accelerator, steps=STEPS)
        return
    fast: Any = accelerate_pipeline(pipe, accelerator, steps=STEPS)
    own = getattr(fast, "unet", None) or fast.transformer
    fast.scheduler.set_timesteps(STEPS)
    blocks = len(split.blocks) if hasattr(split, "blocks") else 0
    first = round(blocks * 18 / 28)
    for k, t in enumerate(fast.scheduler.timesteps):
        x, time = xs[k], t.float().expand(2)
        output = answer(own, x, t, cond)
        if accelerator == CACHE:
            emb = split.embed(time, **cond)
            shallow = split.shallow_encode(x, emb)
            cached = split.deep(shallow, emb) if k % 2 == 0 else cached  # noqa: F821
            expected = split.shallow_decode(shallow, cached, emb)
        elif blocks:
            tokens, emb = split.embed(x, time, **cond)
            cached = split.run(0, first, tokens, emb) if k % 2 == 0 else cached
            expected = split.finish(split.run(first, blocks, cached, emb), emb)
        else:
            emb = split.embed(time, **cond)
            cached = split.encode(x, emb) if k % 2 == 0 else cached
            expected = split.decode(*cached, emb)
        assert torch.allclose(output, expected, atol=1e-5), (k, relative_error(output, expected))
        plain = answer(net, x, t, cond)
        assert (relative_error(output, plain) > 1e-3) == (k % 2 == 1), k


# Queries that are not one a step


def sag() -> Any:
    from diffusers import StableDiffusionSAGPipeline

    parts = {key: value for key, value in sd().components.items() if key != "image_encoder"}
    return tiny.quiet(StableDiffusionSAGPipeline(**parts, requires_safety_checker=False))


@pytest.mark.parametrize("accelerator", [CACHE, PROPAGATE])
def test_a_pipeline_with_two_evaluations_per_step_runs_without_reuse(accelerator: str) -> None:
    more: dict[str, Any] = {"sag_scale": 0.75, "height": 16, "width": 16}
    pipe = sag()
    theirs = sample_latents(pipe, **more)
    fast = accelerate_pipeline(pipe, accelerator, steps=STEPS)
    with pytest.warns(UserWarning, match="evaluated more than once per step") as seen:
        ours = sample_latents(fast, **more)
    assert torch.equal(ours, theirs) and len([w for w in seen if "not applied" in str(w.message)]) == 1


def test_components_in_another_pipeline_with_its_own_scheduler() -> None:
    from diffusers import StableDiffusionImg2ImgPipeline, UniPCMultistepScheduler

    pipe = sd()
    fast = accelerate_pipeline(pipe, CACHE, steps=STEPS)
    call = {**CALL, "image": torch.rand(1, 3, 16, 16, generator=generator()), "strength": 1.0}

    def other(parts: Any) -> Any:
        made = tiny.quiet(StableDiffusionImg2ImgPipeline(**parts.components, requires_safety_checker=False))
        made.scheduler = UniPCMultistepScheduler.from_config(made.scheduler.config)
        return made

    theirs = other(pipe)(**call, generator=generator()).images
    with pytest.warns(UserWarning, match="must be accelerated itself"):
        ours = other(fast)(**call, generator=generator()).images
    assert torch.equal(ours, theirs)
    assert relative_error(sample_latents(fast), sample_latents(pipe)) > 1e-4  # its own pipeline goes on accelerated


def test_few_evaluations_run_without_reuse() -> None:
    pipe = tiny.sd_pipeline("StableDiffusionImg2ImgPipeline")
    fast = accelerate_pipeline(pipe, CACHE, steps=20)
    call = {**CALL, "num_inference_steps": 20, "image": torch.rand(1, 3, 16, 16, generator=generator())}

    def images(which: Any, strength: float) -> Tensor:
        return which(**call, strength=strength, generator=generator()).images

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(left out|not applied)")
        assert relative_error(images(fast, 0.8), images(pipe, 0.8)) > 1e-4
    with pytest.warns(UserWarning, match="has 8 model evaluations"):
        assert torch.equal(images(fast, 0.4), images(pipe, 0.4))
    with pytest.raises(BadInput, match="9 model evaluations or more"):
        accelerate_pipeline(pipe, CACHE, steps=8)


# Hooks and patches


def test_hooks_on_the_network_run() -> None:
    pipe, seen = sd(), []
    pipe.unet.register_forward_pre_hook(lambda net, args: seen.append("before"))
    pipe.unet.register_forward_hook(lambda net, args, made: seen.append("after"))
    fast = accelerate_pipeline(pipe, CACHE, steps=STEPS)
    sample_latents(fast)
    assert seen == ["before", "after"] * STEPS
    with pytest.raises(BadInput, match="has forward hooks"):
        hasten.load(pipe)


def test_a_replaced_forward_is_run() -> None:
    pipe, calls = sd(), []
    plain, inner = sample_latents(pipe), pipe.unet.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    pipe.unet.forward = forward
    with pytest.warns(UserWarning, match="was replaced"):
        fast = accelerate_pipeline(pipe, CACHE, steps=STEPS)
    assert torch.equal(sample_latents(fast), plain) and len(calls) == STEPS
    for accelerator in (QUANTIZE, "compile:backend=eager"):
        with pytest.raises(BadInput, match="was replaced"):
            accelerate_pipeline(pipe, accelerator, steps=STEPS)
    with pytest.raises(BadInput, match="forward was replaced"):
        hasten.load(pipe)
    later = accelerate_pipeline(sd(), CACHE, steps=STEPS)
    expected, inner = sample_latents(later), later.unet.forward
    later.unet.forward = forward
    calls.clear()
    assert torch.equal(sample_latents(later), expected) and len(calls) == STEPS


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("late", [False, True])
def test_group_offload(kind: str, late: bool) -> None:
    pytest.importorskip("accelerate")
    pipe = sd()
    expected = sample_latents(accelerate_pipeline(pipe, CACHE, steps=STEPS))
    more: dict[str, Any] = {} if kind == "leaf_level" else {"num_blocks_per_group": 1}
    fast: Any = accelerate_pipeline(pipe, CACHE, steps=STEPS) if late else None
    (fast if late else pipe).unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=kind, **more
    )
    fast = fast or accelerate_pipeline(pipe, CACHE, steps=STEPS)
    assert torch.equal(sample_latents(fast), expected)
    if kind == "leaf_level" and not late:
        with pytest.raises(BadInput, match="whose forward has hooks"):
            accelerate_pipeline(pipe, QUANTIZE, steps=STEPS)


@pytest.mark.parametrize("late", [False, True])
def test_model_offload(late: bool) -> None:
    pytest.importorskip("accelerate")
    pipe = sd()
    expected = sample_latents(accelerate_pipeline(pipe, CACHE, steps=STEPS))
    fast: Any = accelerate_pipeline(pipe, CACHE, steps=STEPS) if late else None
    (fast if late else pipe).enable_model_cpu_offload(device="cpu")
    fast = fast or accelerate_pipeline(pipe, CACHE, steps=STEPS)
    assert torch.equal(sample_latents(fast), expected) and torch.equal(sample_latents(fast), expected)
    sample_latents(pipe)


# Number formats


@pytest.mark.parametrize("accelerator", ["deep_cache:every=1", CACHE, PROPAGATE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pipelines_in_half_precision(accelerator: str, dtype: torch.dtype) -> None:
    pipe = sd()
    exact = sample_latents(accelerate_pipeline(pipe, accelerator, steps=STEPS))
    pipe.unet.to(dtype)
    pipe.text_encoder.to(dtype)
    fast = accelerate_pipeline(pipe, accelerator, steps=STEPS)
    latents = start().to(dtype)
    ours = sample_latents(fast, latents=latents)
    assert ours.dtype == dtype and relative_error(ours, exact) < 0.2
    if accelerator == "deep_cache:every=1":
        assert torch.equal(ours, sample_latents(pipe, latents=latents))


def test_layerwise_casting() -> None:
    pipe = sd()
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    theirs = sample_latents(pipe)
    assert torch.equal(sample_latents(accelerate_pipeline(pipe, "deep_cache:every=1", steps=STEPS)), theirs)
    assert hasten.load(pipe).sample(1, "a cat", steps=2).isfinite().all()


# On a device


@pytest.mark.parametrize("name", ["sd", "sd3"])
@pytest.mark.parametrize(
    "accelerator",
    [CACHE + ",extrapolate=1", PROPAGATE + ",parallel=2", pytest.param(SMALL, marks=pytest.mark.slow)],
)
def test_an_accelerated_pipeline_waits_once_a_sampling(name: str, accelerator: str) -> None:
    if name == "sd3" and accelerator != PROPAGATE + ",parallel=2":
        pytest.skip("the U-Net is enough")
    make = sd if name == "sd" else tiny.sd3_pipeline
    call = {**CALL, "num_inference_steps": STEPS}
    if name == "sd":
        call["latents"] = start()
    else:
        call["generator"] = generator()
    expected = accelerate_pipeline(make(), accelerator, steps=STEPS)(**call).images
    with Pretended() as device:
        fast = accelerate_pipeline(put_pipeline(make()), accelerator, steps=STEPS)
        if name == "sd3":
            call["generator"] = generator()
        else:
            call["latents"] = start().to("cuda")
        device.clear()
        ours = taken(fast(**call).images)
        assert device.count("wait") <= (1 if accelerator != SMALL else 2), device.lines()
        assert device.count("upload") == device.count("widened") == device.count("float64") == 0, device.lines()
    assert relative_error(ours, expected) < (1e-4 if accelerator != SMALL else 0.05)


# Several processes


def chimera(rank: int, ranks: int) -> list[str]:
    """What each process says of a pipeline without a generator, and how far its images are off with one."""
    results = []
    for accelerator in ("patch_parallel", "cfg_parallel"):
        pipe = sd()
        fast = accelerate_pipeline(pipe, accelerator, steps=4)
        call = {**CALL, "num_inference_steps": 4}
        torch.manual_seed(rank)
        try:
            fast(**call, latents=None)
            results.append("no error")
        except BadInput as error:
            results.append(str(error))
        results.append(
            str(
                relative_error(fast(**call, generator=generator()).images, pipe(**call, generator=generator()).images)
                < 0.05
            )
        )
    return results


def controlled(rank: int, ranks: int) -> list[float]:
    """Relative errors of the latents of a ControlNet pipeline whose network is shared between processes."""
    errors = []
    for accelerator in ("patch_parallel:mode=sync", "cfg_parallel"):
        pipe = tiny.sd_pipeline("StableDiffusionControlNetPipeline", controlnet=tiny.controlnet())
        image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        call = {**CALL, "num_inference_steps": 4, "image": image, "height": 16, "width": 16, "latents": start()}
        fast = accelerate_pipeline(pipe, accelerator, steps=4)
        shared, plain = fast(**call).images, pipe(**call).images
        uncontrolled = pipe(**call, controlnet_conditioning_scale=0.0).images
        errors += [relative_error(shared, plain), relative_error(uncontrolled, plain)]
    return errors


def test_processes_share_the_residuals_of_a_controlnet(tmp_path: Path) -> None:
    for errors in together(controlled, 2, tmp_path):
        assert errors[0] < 1e-4 and errors[2] < 1e-4, errors
        assert errors[1] > 1e-2 and errors[3] > 1e-2, "the residuals do not matter here"


def test_processes_with_different_noise_are_refused(tmp_path: Path) -> None:
    for messages in together(chimera, 2, tmp_path):
        assert "patch_parallel: the processes began with different noise" in messages[0]
        assert "cfg_parallel: the processes began with different noise" in messages[2]
        assert messages[1] == messages[3] == "True"


def test_loading_draws_no_bars(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import diffusers

    sd().save_pretrained(tmp_path)
    capfd.readouterr()
    hasten.load(str(tmp_path))
    out = "".join(capfd.readouterr())
    assert "%|" not in out and "it/s" not in out
    assert diffusers.utils.logging.is_progress_bar_enabled()
    assert len(times_like(sd().scheduler, 3)) == 4
