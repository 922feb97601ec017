"""A pipeline as a model of hasten: at the times of the pipeline's own scheduler, the images of the pipeline."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.adapters.diffusers import times_like
from hasten.errors import BadInput, Notice
from hasten.images import read_png_text
from hasten.pick import format_spec
from hasten.schedules import Discrete, Flow
from hasten.times import Explicit

from . import tiny

STEPS = 5
TRAILING = {"timestep_spacing": "trailing"}


def start(shape: tuple[int, ...], n: int = 2, seed: int = 7) -> Tensor:
    """The noise that hasten starts from."""
    return hasten.Noise(range(seed, seed + n), shape).initial()


def ours(pipe: Any, sampler: str, steps: int = STEPS, **call: Any) -> Tensor:
    model = hasten.load(pipe)
    times = times_like(pipe.scheduler, steps)
    times_spec = format_spec(Explicit(tuple(times.tolist())))
    return model.sample(2, seed=7, sampler=sampler, times=times_spec, steps=len(times) - 1, **call)


def pixels(images: Tensor) -> Tensor:
    """Images in [0, 1] of a pipeline in [-1, 1]."""
    return images * 2 - 1


def close(one: Tensor, two: Tensor, within: float = 1e-5) -> None:
    assert one.shape == two.shape
    assert one.std() > 0.05
    assert (one - two).abs().max() < within


@pytest.mark.parametrize(
    ("scheduler", "sampler"),
    [
        (("DDIMScheduler", {}), "ddim"),
        (("DDIMScheduler", {**TRAILING, "set_alpha_to_one": True, "steps_offset": 0}), "ddim"),
        (("DDIMScheduler", {**TRAILING, "prediction_type": "v_prediction"}), "ddim"),
        (("DDIMScheduler", {**TRAILING, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}), "ddim"),
        (("DDIMScheduler", {"prediction_type": "sample"}), "ddim"),
        (("DPMSolverMultistepScheduler", TRAILING), "dpm:order=2"),
        (("UniPCMultistepScheduler", TRAILING), "unipc:order=2"),
        # spaced otherwise, these begin with noise of sigma in place of sqrt(sigma^2 + alpha^2)
        (("EulerDiscreteScheduler", {"timestep_spacing": "leading"}), "ddim"),
        (("HeunDiscreteScheduler", {"timestep_spacing": "leading"}), "heun"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]}{value[1]}",
)
def test_stable_diffusion_is_the_pipeline(scheduler: Any, sampler: str) -> None:
    """Prompts, guidance, latents and decoder; every scheduler against hasten's sampler of the same method."""
    name, changes = scheduler
    pipe = tiny.sd_pipeline(scheduler=tiny.scheduler(name, **changes))
    prompts, latents = ["a photo of the cat", "a big red dog"], start((4, 8, 8))
    theirs = pipe(
        prompts, latents=latents, num_inference_steps=STEPS, guidance_scale=3.0, output_type="pt", generator=None
    ).images
    mine = ours(pipe, sampler, label=prompts, guidance_scale=3.0)
    # from x0, their noise is a difference of nearly equal float32 numbers at the last steps
    close(mine, pixels(theirs), 3e-5 if changes.get("prediction_type") == "sample" else 1e-5)
    other = ours(pipe, sampler, label="a blue cat", guidance_scale=3.0)
    assert (other - mine).abs().max() > 1e-3  # the prompt matters


def test_spec_of_the_scheduler() -> None:
    model = hasten.load(tiny.sd_pipeline(scheduler=tiny.scheduler("PNDMScheduler", prediction_type="v_prediction")))
    schedule = model.denoiser.schedule
    assert isinstance(schedule, Discrete) and len(schedule.alphas_cumprod) == 1000
    assert schedule.alphas_cumprod[0] == pytest.approx(1 - 0.00085) and model.denoiser.prediction.name == "v"
    assert model.denoiser.clock == "index" and model.shape == (4, 8, 8) and model.guidance_scale == 7.5
    flow = hasten.load(tiny.sd3_pipeline())
    assert flow.denoiser.schedule == Flow(3.0) and flow.denoiser.prediction.name == "flow"
    t = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    assert torch.allclose(flow.denoiser.time_input(t), torch.tensor([500.0, 750.0, 1000.0], dtype=torch.float64))
    again = flow.denoiser.replace(prediction="x0")
    assert torch.allclose(again.time_input(t), flow.denoiser.time_input(t))


def test_prompts_do_not_depend_on_the_batch() -> None:
    model = hasten.load(tiny.sd_pipeline())
    call: dict[str, Any] = {"sampler": "unipc", "steps": 3, "seed": 3}
    all_of_them = model.sample(3, ["a cat", "the dog", "a cat"], **call)
    assert torch.allclose(model.sample(3, ["a cat", "the dog"], batch_size=1, **call), all_of_them, atol=1e-5)
    one = model.sample(1, "the dog", sampler="unipc", steps=3, seed=4)
    assert torch.allclose(one, all_of_them[1:2], atol=1e-5)
    with pytest.raises(BadInput, match="takes prompts"):
        model.sample(1, 3, steps=2)


def test_negative_prompts_reach_the_unconditional_branch() -> None:
    pipe = tiny.sd_pipeline(scheduler=tiny.scheduler(**TRAILING))
    theirs = pipe(
        "a cat",
        negative_prompt="a big dog",
        latents=start((4, 8, 8), 1),
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        output_type="pt",
    ).images
    model = hasten.load(pipe)
    model.conditioning.negative = "a big dog"
    times = times_like(pipe.scheduler, STEPS)
    times_spec = format_spec(Explicit(tuple(times.tolist())))
    mine = model.sample(1, "a cat", 7, sampler="ddim", times=times_spec, steps=STEPS, guidance_scale=4.0)
    close(mine, pixels(theirs))
    model.conditioning.negative = None
    assert (
        model.sample(1, "a cat", 7, sampler="ddim", times=times_spec, steps=STEPS, guidance_scale=4.0) - mine
    ).abs().max() > 1e-3


def test_a_prompt_longer_than_the_encoder_reads_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    pipe = tiny.sd_pipeline()
    model = hasten.load(pipe)
    length = pipe.tokenizer.model_max_length
    with pytest.warns(Notice, match=rf"of 20,000 characters is longer than the {length} tokens .* is not used"):
        long = model.conditioning.cond(1, "a " * 10_000)
    assert capfd.readouterr().err == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.conditioning.cond(1, "a " * (length - 2))["text"], long["text"])


def test_sdxl() -> None:
    """Added time ids, pooled text of the second encoder, and its own rule for the empty negative prompt."""
    pipe = tiny.sdxl_pipeline()
    theirs = pipe(
        ["a cat", "the dog"], latents=start((4, 8, 8)), num_inference_steps=STEPS, guidance_scale=3.0, output_type="pt"
    ).images
    close(ours(pipe, "ddim", label=["a cat", "the dog"], guidance_scale=3.0), pixels(theirs))


def test_sd3_flow_matching() -> None:
    pipe = tiny.sd3_pipeline()
    theirs = pipe(
        ["a cat", "the dog"], latents=start((4, 8, 8)), num_inference_steps=STEPS, guidance_scale=3.0, output_type="pt"
    ).images
    close(ours(pipe, "ddim", label=["a cat", "the dog"], guidance_scale=3.0), pixels(theirs))


@pytest.mark.parametrize("kind", ["DDPMPipeline", "DDIMPipeline"])
def test_unconditional_pixels(kind: str) -> None:
    """The starting noise of a pipeline with a generator is that of hasten with its seed."""
    pipe = tiny.ddpm_pipeline(kind, prediction_type="v_prediction", **TRAILING)
    theirs = pipe(generator=torch.Generator().manual_seed(7), num_inference_steps=STEPS, output_type="np").images
    theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2)
    mine = ours(pipe, "ddim")[:1]
    close(mine, pixels(theirs))
    model = hasten.load(pipe)
    assert model.classes is None and model.guidance_scale == 1.0 and model.codec == "image"
    with pytest.raises(BadInput, match="no classes"):
        model.sample(1, guidance_scale=2.0)


def test_ancestral_sampling_has_the_moments_of_the_pipeline() -> None:
    """DDPM draws noise in another order than hasten, so its images differ; the distribution is the same."""
    from diffusers import DDPMPipeline, DDPMScheduler

    pipe = tiny.quiet(DDPMPipeline(tiny.unet2d(), DDPMScheduler(clip_sample=False, timestep_spacing="trailing")))
    theirs = pipe(64, generator=torch.Generator().manual_seed(0), num_inference_steps=8, output_type="np").images
    model = hasten.load(pipe)
    times_spec = format_spec(Explicit(tuple(times_like(pipe.scheduler, 8).tolist())))
    mine = model.sample(64, seed=100, sampler="ddpm", times=times_spec, steps=8).numpy() / 2 + 0.5
    assert abs(mine.mean() - theirs.mean()) < 0.02 and abs(mine.std() - theirs.std()) < 0.02


def test_dit_has_classes_by_name() -> None:
    pipe = tiny.dit_pipeline(scheduler=tiny.scheduler(beta_schedule="linear", **TRAILING))
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    call: dict[str, Any] = {"guidance_scale": 2.0, "num_inference_steps": STEPS, "output_type": "np"}
    theirs = torch.from_numpy(pipe([1, 0], generator=generators, **call).images).permute(0, 3, 1, 2)
    model = hasten.load(pipe)
    assert model.classes is not None and len(model.classes) == 1000 and model.classes[:3] == ("fish", "cat", "2")
    assert model.denoiser.null_label == 1000 and model.guidance_scale == 4.0
    close(ours(pipe, "ddim", label=["cat", "fish"], guidance_scale=2.0), pixels(theirs))


def test_a_latent_consistency_network_has_its_scale_as_input() -> None:
    """One evaluation a step: no second branch, the scale goes into the network."""
    unet = tiny.unet2d_condition(time_cond_proj_dim=16)
    pipe = tiny.sd_pipeline(unet=unet, scheduler=tiny.scheduler(**TRAILING))
    theirs = pipe(
        ["a cat", "the dog"], latents=start((4, 8, 8)), num_inference_steps=STEPS, guidance_scale=3.0, output_type="pt"
    ).images
    close(ours(pipe, "ddim", label=["a cat", "the dog"], guidance_scale=3.0), pixels(theirs))


def test_guides_and_cost() -> None:
    """Guides see prompts as they see labels."""
    model = hasten.load(tiny.sd_pipeline())
    plain = model.sample(1, "a cat", steps=4, guidance_scale=1.0)
    nowhere = model.sample(1, "a cat", steps=4, guidance_scale=5.0, guides=["interval:low=1000,high=2000"])
    assert torch.allclose(nowhere, plain, atol=1e-6)
    assert (model.sample(1, "a cat", steps=4, guidance_scale=5.0) - plain).abs().max() > 1e-3
    assert (model.sample(1, "a cat", steps=4, guidance_scale=5.0, guides=["rescale"]) - plain).abs().max() > 1e-3
    assert set(model.cond(2)) >= {"text", "null_text"}


def test_vae_shift_and_channel_scales() -> None:
    from hasten.adapters.diffusers.conditions import Latents

    for changes in (
        {"shift_factor": 0.3},
        {"latents_mean": (0.1, 0.2, 0.3, 0.4), "latents_std": (1.0, 2.0, 3.0, 4.0), "scaling_factor": 2.0},
    ):
        codec = Latents(tiny.vae(**changes), rows=2)
        z = start((4, 8, 8), 5)
        inner = codec.encode(codec.decode(z))  # not the identity: but it must scale as decode does
        images = codec.decode(z)
        mode = codec.vae.encode(images).latent_dist.mode()
        scale, shift = codec._scales(z)
        assert torch.allclose(inner, (mode - shift) * scale, atol=1e-5)
        assert torch.allclose(images, codec.vae.decode(z / scale + shift).sample, atol=1e-5)


def test_folder_and_command_line(tmp_path: Path) -> None:
    from hasten.cli import main

    pipe = tiny.sd_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    model = hasten.load(tmp_path / "pipe")
    assert model.name == "pipe" and model.device.type == "cpu"
    call: dict[str, Any] = {"steps": 3, "seed": 1, "guidance_scale": 2.0}
    assert torch.allclose(model.sample(1, "a cat", **call), hasten.load(pipe).sample(1, "a cat", **call), atol=1e-6)
    png = tmp_path / "cat.png"
    command = ["sample", str(tmp_path / "pipe"), "--label", "a photo of the cat, red", "--out", str(png), "--n", "2"]
    assert main([*command, "--steps", "2", "--precision", "fp32"]) == 0
    assert "a photo of the cat, red" in read_png_text(png)["command"]


def test_refusals(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, EDMEulerScheduler

    with pytest.raises(BadInput, match="neither alphas_cumprod nor a flow"):
        hasten.load(DDPMPipeline(tiny.unet2d(), EDMEulerScheduler()))
    with pytest.raises(BadInput, match="needs an image beside the noisy one"):
        hasten.load(tiny.sd_pipeline(unet=tiny.unet2d_condition(in_channels=9)))
    with pytest.raises(BadInput, match="found Linear"):
        hasten.load(torch.nn.Linear(1, 1))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{}")
    with pytest.raises(BadInput, match="diffusers cannot load"):
        hasten.load(tmp_path / "broken")


def test_hub_ids_go_to_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    def absent(name: str) -> Any:
        raise OSError(f"We couldn't connect to the hub to load {name}.\nCheck your internet connection.")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", absent)
    with pytest.raises(BadInput, match="cannot load someone/model: We couldn't connect .* offline") as caught:
        hasten.load("someone/model")
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="no folder tests/nothing"):
        hasten.load("tests/nothing")  # the folder tests is there: a mistyped path, not a hub id
    pipe = tiny.ddpm_pipeline()
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda name: pipe)
    assert hasten.load("someone/model").shape == (3, 8, 8)
