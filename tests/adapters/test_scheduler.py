"""hasten's samplers inside unmodified pipelines of `diffusers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.adapters.diffusers import as_scheduler, times_like
from hasten.errors import BadInput
from hasten.plan import Plan, plan
from hasten.samplers import DDIM, UniPC
from hasten.times import Karras

from . import tiny

STEPS = 5
TRAILING = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
CALL: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}


def start(n: int = 1, seed: int = 7) -> Tensor:
    return hasten.Noise(range(seed, seed + n), (4, 8, 8)).initial()


def close(one: Tensor, two: Tensor, within: float = 1e-5) -> None:
    assert one.shape == two.shape
    assert float((one - two).abs().max() / two.abs().max()) < within


def with_scheduler(pipe: Any, scheduler: Any) -> Any:
    """The same parts under another scheduler."""
    parts = {**pipe.components, "scheduler": scheduler}
    more = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    return tiny.quiet(type(pipe)(**parts, **more))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_equals_diffusers(prediction: str) -> None:
    pipe = tiny.sd_pipeline(scheduler=tiny.scheduler(**TRAILING, prediction_type=prediction))
    theirs = pipe("a cat", latents=start(), **CALL).images
    times = times_like(pipe.scheduler, STEPS)
    ours = as_scheduler(DDIM(), times, like=pipe)
    close(with_scheduler(pipe, ours)("a cat", latents=start(), **CALL).images, theirs)
    assert torch.equal(ours.timesteps, pipe.scheduler.timesteps.float()) and len(ours.timesteps) == STEPS
    compiled = plan(DDIM(), ours.hasten_schedule, times)
    close(with_scheduler(pipe, as_scheduler(compiled, like=pipe))("a cat", latents=start(), **CALL).images, theirs)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [("UniPCMultistepScheduler", "unipc"), ("DPMSolverMultistepScheduler", "dpm"), ("HeunDiscreteScheduler", "heun")],
)
def test_history_and_inner_evaluations(name: str, sampler: str) -> None:
    spacing = "leading" if name.startswith("Heun") else "trailing"
    pipe = tiny.sd_pipeline(scheduler=tiny.scheduler(name, timestep_spacing=spacing))
    theirs = pipe("a cat", latents=start(), **CALL).images
    ours = as_scheduler(sampler, times_like(pipe.scheduler, STEPS), like=pipe)
    close(with_scheduler(pipe, ours)("a cat", latents=start(), **CALL).images, theirs, 2e-5)
    assert ours.order == pipe.scheduler.order
    assert torch.allclose(ours.timesteps, pipe.scheduler.timesteps.float(), atol=1e-3)


def test_flow_matching() -> None:
    pipe = tiny.sd3_pipeline()
    theirs = pipe("a cat", latents=start(), **CALL).images
    ours = as_scheduler("ddim", times_like(pipe.scheduler, STEPS), like=pipe)
    close(with_scheduler(pipe, ours)("a cat", latents=start(), **CALL).images, theirs)
    assert ours.spec.prediction == "flow" and ours.init_noise_sigma == 1.0
    noise, x = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    at = torch.tensor([pipe.scheduler.timesteps[1]] * 2)
    close(ours.scale_noise(x, at, noise), pipe.scheduler.scale_noise(x, at, noise))


class Small:
    """In place of the image decoder: what is far from where `sample` clamps."""

    def decode(self, z: Tensor) -> Tensor:
        return z / 100


@pytest.mark.parametrize("sampler", ["ddim:eta=1", "dpm:sde=true", "unipc:order=3", "heun", "deis", "plms"])
def test_equals_hasten(sampler: str) -> None:
    """The pipeline under our scheduler and the loaded model: the same network, times and noise, by two routes."""
    pipe = tiny.sd_pipeline(scheduler=tiny.scheduler(prediction_type="v_prediction"))
    model = hasten.load(pipe)
    model.decoder = Small()
    pipe = with_scheduler(pipe, as_scheduler(sampler, like=model))
    prompts = ["a cat", "the dog"]
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]  # one for each sample, as hasten has it
    theirs = pipe(prompts, generator=generators, **CALL).images
    assert float(pipe.scheduler.timesteps[1]) % 1 > 0  # fractional network times
    ours = model.sample(2, prompts, 7, sampler=sampler, times="angle", steps=STEPS, guidance_scale=3.0)
    assert ours.abs().max() < 1
    close(theirs, ours * 100, 2e-5)
    again = [torch.Generator().manual_seed(8)]
    alone = pipe(prompts[1:], generator=again, **CALL).images  # sample 1 does not know of sample 0
    close(alone, theirs[1:], 1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("sampler", ["ddim", "unipc", "heun", "dpm:order=3,multistep=false"])
def test_exactly_the_requested_steps(sampler: str, steps: int) -> None:
    scheduler = as_scheduler(sampler, "trailing", like=tiny.scheduler())
    scheduler.set_timesteps(steps, device="cpu")
    assert len(scheduler.timesteps) == (2 * steps - 1 if sampler == "heun" else steps)
    assert scheduler.timesteps.dtype == torch.float32 and scheduler.num_inference_steps == steps
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, scheduler.scale_model_input(x, t)).prev_sample
    assert torch.isfinite(x).all()
    with pytest.raises(BadInput, match="all are done"):
        scheduler.step(x, 0, x)
    scheduler.set_timesteps(steps)
    assert scheduler.step_index is None


def image(size: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_image_to_image() -> None:
    pipe = tiny.sd_pipeline("StableDiffusionImg2ImgPipeline", scheduler=tiny.scheduler(**TRAILING))
    call: dict[str, Any] = {**CALL, "image": image(16), "strength": 0.6}
    theirs = pipe("a cat", generator=torch.Generator().manual_seed(1), **call).images
    times = times_like(pipe.scheduler, STEPS)
    ours = as_scheduler("ddim", times, like=pipe)
    mine = with_scheduler(pipe, ours)("a cat", generator=torch.Generator().manual_seed(1), **call).images
    close(mine, theirs)
    assert ours.begin_index == 2
    fixed = as_scheduler(plan(DDIM(), ours.hasten_schedule, times), like=pipe)
    close(with_scheduler(pipe, fixed)("a cat", generator=torch.Generator().manual_seed(1), **call).images, theirs)
    # a multistep sampler begins without a history: as on the times that are left
    multi = as_scheduler("unipc", times, like=pipe)
    mine = with_scheduler(pipe, multi)("a cat", generator=torch.Generator().manual_seed(1), **call).images
    later = as_scheduler("unipc", times[2:], like=pipe)
    later.set_timesteps(3)
    multi.set_timesteps(STEPS)
    multi.set_begin_index(2)
    x = y = start()
    for t, s in zip(multi.timesteps[2:], later.timesteps):
        x, y = (one.step(0.1 * z, at, z).prev_sample for one, z, at in ((multi, x, t), (later, y, s)))
    close(x, y, 1e-6)
    assert torch.isfinite(mine).all()
    bound = as_scheduler(plan(UniPC(), ours.hasten_schedule, times), like=pipe)
    with pytest.raises(BadInput, match="cannot begin at evaluation 2 of 5"):
        with_scheduler(pipe, bound)("a cat", generator=torch.Generator().manual_seed(1), **call)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(strength: float) -> None:
    pipe = tiny.sd_pipeline("StableDiffusionInpaintPipeline", scheduler=tiny.scheduler(**TRAILING))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    call: dict[str, Any] = {
        **CALL,
        "image": image(16) * 2 - 1,
        "mask_image": mask,
        "strength": strength,
        "height": 16,
        "width": 16,
    }
    theirs = pipe("a cat", generator=torch.Generator().manual_seed(1), **call).images
    ours = as_scheduler("ddim", times_like(pipe.scheduler, STEPS), like=pipe)
    close(with_scheduler(pipe, ours)("a cat", generator=torch.Generator().manual_seed(1), **call).images, theirs)


def test_controlnet_and_classes() -> None:
    pipe = tiny.sd_pipeline(
        "StableDiffusionControlNetPipeline", controlnet=tiny.controlnet(), scheduler=tiny.scheduler(**TRAILING)
    )
    call: dict[str, Any] = {**CALL, "image": image(16), "latents": start(), "height": 16, "width": 16}
    theirs = pipe("a cat", **call).images
    scheduler = as_scheduler("ddim", times_like(pipe.scheduler, STEPS), like=pipe)
    close(with_scheduler(pipe, scheduler)("a cat", **call).images, theirs)
    dit = tiny.dit_pipeline(scheduler=tiny.scheduler(**TRAILING))
    call = {"num_inference_steps": STEPS, "output_type": "np"}
    theirs = dit([1, 2], generator=torch.Generator().manual_seed(3), **call).images
    dit.scheduler = as_scheduler("ddim", times_like(dit.scheduler, STEPS), like=dit)
    ours = dit([1, 2], generator=torch.Generator().manual_seed(3), **call).images
    close(torch.from_numpy(ours), torch.from_numpy(theirs))


def test_saved_and_from_config(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, DiffusionPipeline

    from hasten.adapters.diffusers.scheduler_class import PlanScheduler

    pipe = tiny.sd_pipeline()
    ours = as_scheduler("unipc:order=3", Karras(rho=5.0), like=pipe)
    assert ours.config.sampler == "unipc:order=3" and ours.config.times == "karras:rho=5"
    ours.save_pretrained(tmp_path / "one")
    twin = PlanScheduler.from_pretrained(tmp_path / "one")
    same = PlanScheduler.from_config(pipe.scheduler.config, sampler="unipc:order=3", times="karras:rho=5")
    for other in (twin, same):
        other.set_timesteps(4)
        ours.set_timesteps(4)
        assert torch.equal(other.timesteps, ours.timesteps)
        assert other.hasten_schedule == ours.hasten_schedule and other.spec == ours.spec
    pipe = with_scheduler(pipe, ours)
    pipe.save_pretrained(tmp_path / "pipe")
    again = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path / "pipe"))
    assert type(again.scheduler) is PlanScheduler
    close(again("a cat", latents=start(), **CALL).images, pipe("a cat", latents=start(), **CALL).images, 1e-6)
    assert torch.allclose(DDIMScheduler.from_config(ours.config).alphas_cumprod, ours.alphas_cumprod)
    flow = as_scheduler("ddim", like=tiny.sd3_pipeline())
    flow.save_pretrained(tmp_path / "flow")
    assert PlanScheduler.from_pretrained(tmp_path / "flow").spec == flow.spec


def test_plans_without_like(tmp_path: Path) -> None:
    model = hasten.load(tiny.sd_pipeline())
    times = torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=torch.float64)
    compiled = plan(UniPC(), model.denoiser.schedule, times)
    (tmp_path / "plan.json").write_text(compiled.to_json())
    scheduler = as_scheduler(tmp_path / "plan.json", prediction="eps")
    scheduler.save_pretrained(tmp_path)
    again = type(scheduler).from_pretrained(tmp_path)
    again.set_timesteps(3)
    assert torch.allclose(again.timesteps.double(), times[:3] * 1000 - 1, atol=1e-4)
    assert Plan.from_json(again.config.plan).times.tolist() == times.tolist()
    with pytest.raises(BadInput, match="has 3 steps, requested 4 steps"):
        again.set_timesteps(4)
    with pytest.raises(BadInput, match="another schedule"):
        as_scheduler(compiled, like=tiny.scheduler(beta_end=0.05))
    with pytest.raises(BadInput, match="a plan has its own times"):
        as_scheduler(compiled, "angle", like=model)
    with pytest.raises(BadInput, match="needs like="):
        as_scheduler(compiled)


def test_tables_that_only_a_scheduler_has() -> None:
    """Trained betas, a rescaled table, and one from a model of hasten."""
    from diffusers import DDIMScheduler

    betas = torch.linspace(1e-3, 0.03, 50).tolist()
    for theirs in (
        DDIMScheduler(num_train_timesteps=50, trained_betas=betas, prediction_type="v_prediction"),
        tiny.scheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    ):
        ours = as_scheduler("ddim", like=theirs)
        assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
        assert len(ours) == len(theirs.alphas_cumprod)
        noise, x = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
        at = torch.tensor([0, 20, 49])
        close(ours.add_noise(x, noise, at), theirs.add_noise(x, noise, at))
    assert ours.hasten_schedule.zero_snr
    with pytest.raises(BadInput, match="at pure noise does not determine x0"):
        eps = as_scheduler("ddim", like=theirs, prediction="eps")
        eps.set_timesteps(2)
        eps.step(start(), eps.timesteps[0], start())


def test_clip_half_precision_and_custom_timesteps() -> None:
    scheduler = as_scheduler("ddim", like=tiny.scheduler(), clip=0.5)
    scheduler.set_timesteps(1)
    ours = scheduler.step(torch.zeros(1, 1, 2, 2), scheduler.timesteps[0], torch.full((1, 1, 2, 2), 9.0)).prev_sample
    assert torch.equal(ours, torch.full((1, 1, 2, 2), 0.5))
    half = as_scheduler("unipc", like=tiny.scheduler())
    half.set_timesteps(timesteps=[900.5, 600, 300])
    assert half.timesteps.tolist() == [900.5, 600.0, 300.0]
    x = start().half()
    for t in half.timesteps:
        x = half.step(0.1 * x, t, x).prev_sample
    assert x.dtype == torch.float16 and torch.isfinite(x).all()
    for wrong, messages in [("adaptive", "cannot run inside a pipeline"), ("nonsense", "unknown sampler")]:
        with pytest.raises(BadInput, match=messages):
            as_scheduler(wrong, like=tiny.scheduler())


def test_a_sampling_config_is_a_scheduler_too() -> None:
    pipe = tiny.ddpm_pipeline()
    config = hasten.SamplingConfig("unipc:order=3", "karras", 4, 1.0)
    with pytest.warns(UserWarning, match=r"pipe\(..., num_inference_steps=4, guidance_scale=1\)"):
        scheduler = as_scheduler(config, like=pipe)
    expected = as_scheduler("unipc:order=3", "karras", like=pipe)
    assert dict(scheduler.config) == dict(expected.config)
    for wrong, words in (
        (hasten.SamplingConfig("ddim", guides="rescale"), "has no guides"),
        (hasten.SamplingConfig(plan="few"), "give the plan 'few' itself"),
        (hasten.SamplingConfig(steps=None), "names no sampler"),
    ):
        with pytest.raises(BadInput, match=words):
            as_scheduler(wrong, like=pipe)
    with pytest.raises(BadInput, match="remove times="):
        as_scheduler(hasten.SamplingConfig("ddim"), "karras", like=pipe)
