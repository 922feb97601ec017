"""`apply`: a choice inside an untouched pipeline of diffusers, and what is saved with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import hasten
from hasten.choosing.candidates import plain_variant
from hasten.errors import BadInput
from hasten.plan.config import SamplingConfig
from hasten.workflows.choice import Choice, read_choice
from hasten.workflows.lora import extract_lora

from ..adapters import tiny
from ..factories import tiny_model

STEPS, SCALE = 3, 2.5


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.sd_pipeline()


def drawn(pipe: Any, **options: Any) -> torch.Tensor:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe("a cat", latents=noise, output_type="latent", **options).images


def best(folder: Path, text: str = "", **options: Any) -> Path:
    config = SamplingConfig(
        **{"sampler": "unipc", "times": "angle", "steps": STEPS, "guidance_scale": SCALE, **options}
    )
    lines = config.to_toml().splitlines()
    (folder / "best.toml").write_text("\n".join(["[sampling]", *lines, text]) + "\n")
    return folder / "best.toml"


def test_the_copy_samples_as_the_config_says_by_default(pipe: Any, tmp_path: Path) -> None:
    """Its images are those of the scheduler, steps and scale by hand; the original's stay what they were."""
    before = drawn(pipe, num_inference_steps=4)
    fast = hasten.apply(pipe, best(tmp_path))
    by_hand = tiny.sd_pipeline()
    by_hand.scheduler = hasten.as_scheduler("unipc", times="angle", like=by_hand)
    expected = drawn(by_hand, num_inference_steps=STEPS, guidance_scale=SCALE)
    torch.testing.assert_close(drawn(fast), expected)
    assert not torch.allclose(drawn(fast, guidance_scale=1.0), expected)
    assert drawn(fast, num_inference_steps=5).shape == expected.shape and len(fast.scheduler.timesteps) == 5
    torch.testing.assert_close(drawn(pipe, num_inference_steps=4), before)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler" and type(fast).__name__ == type(pipe).__name__
    assert isinstance(fast, type(pipe))


def test_it_equals_what_the_model_samples(pipe: Any, tmp_path: Path) -> None:
    """The network's answers are combined as in Model.sample: the same latents from the same noise."""
    path = best(tmp_path)
    latents = latents_of(hasten.load(pipe), SamplingConfig.load(path, "sampling"))
    torch.testing.assert_close(drawn(hasten.apply(pipe, path)), latents, rtol=1e-3, atol=1e-3)


def latents_of(model: Any, config: SamplingConfig | None = None) -> torch.Tensor:
    """What `Model.sample` decodes, of the noise of `drawn`."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    resolved = model.resolve(config or SamplingConfig(precision="fp32"))
    cond = model.conditions(1, "a cat")
    draws = hasten.Noise(range(1), (4, 8, 8), torch.float32, torch.device("cpu"))
    more = {"x": noise, "plan": resolved.plan, "cond": cond}
    return hasten.draw(resolved.denoiser, resolved.sampler, resolved.times, draws, **more).to(noise.dtype)


def test_saved_with_it(pipe: Any, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    fast = hasten.apply(pipe, best(tmp_path, steps=10, accelerators=["deep_cache:every=2"]))
    with pytest.warns(UserWarning, match="saved without deep_cache"):
        fast.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert type(again.scheduler).__name__ == "PlanScheduler"
    again = hasten.apply(tiny.quiet(again), tmp_path / "saved" / "sampling.toml")
    torch.testing.assert_close(drawn(again), drawn(fast))
    assert not torch.allclose(drawn(fast), drawn(hasten.apply(pipe, best(tmp_path, steps=10))))


@pytest.mark.slow
def test_the_lora_of_a_student(pipe: Any, tmp_path: Path) -> None:
    """Merged, with its steps and without guidance by default: the latents of the same LoRA in `Model.sample`; after
    saving and reopening too."""
    base = hasten.load(pipe)
    student = hasten.load(tiny.sd_pipeline())
    torch.manual_seed(0)
    with torch.no_grad():
        for p in student.denoiser.net.parameters():
            p += 0.02 * torch.randn(p.shape)
    card = {"distilled": {"teacher": base.name, "steps": 4, "guidance_scale": [3.0, 3.0], "figures": {}}}
    denoiser = student.denoiser.replace(guidance_range=(3.0, 3.0))
    named: Any = {"sampler": "ddim", "times": "trailing", "steps": 4, "guidance_scale": 3.0}
    extract_lora(base, replace(student, denoiser=denoiser, card=card, **named), 8, tmp_path / "student.safetensors")
    path = tmp_path / "best.toml"
    path.write_text(f'[sampling]\nprecision = "fp32"\n[model]\nlora = "{tmp_path / "student.safetensors"}"\n')
    fast = hasten.apply(pipe, path)
    own = drawn(fast)
    expected = latents_of(hasten.load(pipe).with_lora(tmp_path / "student.safetensors"))
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(own, drawn(fast, num_inference_steps=4, guidance_scale=1.0))
    assert not torch.allclose(own, drawn(pipe, num_inference_steps=4, guidance_scale=1.0), atol=1e-3)
    fast.save_pretrained(tmp_path / "saved")
    again = hasten.apply(
        tiny.quiet(type(pipe).from_pretrained(tmp_path / "saved")), tmp_path / "saved" / "sampling.toml"
    )
    torch.testing.assert_close(drawn(again), own)
    torch.testing.assert_close(drawn(again), expected, rtol=1e-3, atol=1e-3)


def test_quantised_pipelines_are_saved_in_integers(pipe: Any, tmp_path: Path) -> None:
    path = best(tmp_path, accelerators=["quantize:images=1,steps=2"])
    fast = hasten.apply(pipe, path, prompts=["a cat"])
    with pytest.warns(UserWarning, match="open_quantized"):
        fast.save_pretrained(tmp_path / "saved")
    again = hasten.apply(hasten.open_quantized(tmp_path / "saved"), tmp_path / "saved" / "sampling.toml")
    torch.testing.assert_close(drawn(tiny.quiet(again)), drawn(fast))


def test_another_decoder(pipe: Any, tmp_path: Path) -> None:
    pipe.vae.save_pretrained(tmp_path / "decoder")
    fast = hasten.apply(pipe, best(tmp_path, f'[model]\ndecoder = "{tmp_path / "decoder"}"'))
    assert fast.vae is not pipe.vae and fast.unet is pipe.unet
    weights = [dict(one.vae.named_parameters()) for one in (fast, pipe)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [("", {"guides": ["interval:high=2"]}, "has no guides .interval"), ("", {"start": "ccdf:time=0.5"}, "has no start"),
     ('[model]\nname = "fashion_student"', {}, "another model, fashion_student"),
     ("[model]\nweights = \"x\"", {}, "no file of a choice"),
     ("", {"sampler": None, "times": None, "plan": "fitted_plan-6"}, "not in the folder")],
)  # fmt: skip
def test_what_a_pipeline_cannot_hold_is_refused(
    pipe: Any, tmp_path: Path, text: str, options: Any, message: str
) -> None:
    if options.get("plan"):
        options = {**options, "steps": None}
    with pytest.raises(BadInput, match=message):
        hasten.apply(pipe, best(tmp_path, text, **options))


def test_a_sampling_alone_does_not_follow_a_choice_of_files(tmp_path: Path) -> None:
    path = best(tmp_path, '[model]\nlora = "x.safetensors"')
    with pytest.raises(BadInput, match="lora = 'x.safetensors'"):
        tiny_model().sample(1, config=path)
    plain = best(tmp_path, "[certificate]\nholds = true", guidance_scale=1.0)
    torch.testing.assert_close(
        tiny_model().sample(2, config=plain), tiny_model().sample(2, sampler="unipc", steps=STEPS)
    )


def test_a_foreign_pipeline_is_plain_as_its_call_samples(pipe: Any) -> None:
    """Not by the method that hasten would recommend; a model of hasten recommends its own."""
    plain = plain_variant(hasten.load(pipe), SamplingConfig())
    assert (plain.sampler, plain.times, plain.steps, plain.guidance_scale) == ("ddim", "trailing", 50, 7.5)
    assert plain_variant(tiny_model(steps=7), SamplingConfig()).steps == 7
    assert plain_variant(hasten.load(pipe), SamplingConfig("unipc", times="angle", steps=9)).steps == 9


def test_apply_takes_pipelines_only(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="apply takes a pipeline"):
        hasten.apply(object(), best(tmp_path))
    assert read_choice(SamplingConfig(steps=3)) == Choice(SamplingConfig(steps=3))
    assert read_choice("sampler=ddim; steps=4").sampling.steps == 4
