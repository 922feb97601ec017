"""Accelerated networks put back into pipelines."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.accelerators import EXCHANGE, WRAP, Conflict, SamplingContext
from hasten.adapters.diffusers import accelerate, accelerate_pipeline, as_scheduler, times_like
from hasten.denoiser import Denoiser, Wrapper
from hasten.errors import BadInput

from . import tiny

STEPS = 10
CALL: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
TRAILING = {"timestep_spacing": "trailing", "set_alpha_to_one": True}


class Watched(Wrapper):
    """The denoiser itself, which counts evaluations and checks their times against those of the context."""

    def __init__(self, denoiser: Denoiser, times: tuple[float, ...]) -> None:
        super().__init__(denoiser)
        self.times, self.resets, self.seen = times, 0, []

    def reset(self) -> None:
        self.resets += 1
        self.at = 0

    def forward(self, x_t: Tensor, t: Any, **cond: Any) -> Tensor:
        self._check(t)
        return self.denoiser(x_t, t, **cond)

    def raw(self, x_t: Tensor, t: Any, **cond: Any) -> Tensor:
        self._check(t)
        return self.denoiser.raw(x_t, t, **cond)

    def _check(self, t: Any) -> None:
        assert abs(float(t) - self.times[self.at]) < 1e-9
        self.at += 1
        self.seen.append(float(t))


@dataclass(frozen=True)
class Watch:
    stage: ClassVar[int] = WRAP
    claims: ClassVar[frozenset[str]] = frozenset({"features"})

    def apply(self, denoiser: Any, context: SamplingContext) -> nn.Module:
        return Watched(denoiser, context.required("watch"))


@dataclass(frozen=True)
class Twin:
    """The same weights in another network."""

    scale: float = 1.0
    stage: ClassVar[int] = EXCHANGE
    claims: ClassVar[frozenset[str]] = frozenset({"arithmetic"})
    applied: ClassVar[list[int]] = []

    def apply(self, denoiser: Any, context: SamplingContext) -> nn.Module:
        self.applied.append(1)
        net = copy.deepcopy(denoiser.net)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(self.scale)
        return denoiser.replace(net=net)


@dataclass(frozen=True)
class OnlyX0:
    """An accelerator of x0, without its own `raw`."""

    stage: ClassVar[int] = WRAP
    claims: ClassVar[frozenset[str]] = frozenset()

    def apply(self, denoiser: Any, context: SamplingContext) -> nn.Module:
        class Through(Wrapper):
            def forward(self, x_t: Tensor, t: Any, **cond: Any) -> Tensor:
                return self.denoiser(x_t, t, **cond)

        return Through(denoiser)


def start(n: int = 1) -> Tensor:
    return hasten.Noise(range(7, 7 + n), (4, 8, 8)).initial()


def image(size: int = 16) -> Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def cases() -> dict[str, Any]:
    """Name: (pipeline, keyword arguments of its call)."""
    text = {**CALL, "prompt": ["a cat", "the dog"], "latents": start(2)}
    masked = torch.zeros(1, 1, 16, 16)
    masked[..., :8] = 1
    return {
        "ddpm": lambda: (tiny.ddpm_pipeline(), {"num_inference_steps": STEPS, "generator": generator(), "output_type": "np"}),
        "sd": lambda: (tiny.sd_pipeline(), text),
        "pndm": lambda: (tiny.sd_pipeline(scheduler=tiny.scheduler("PNDMScheduler", skip_prk_steps=True)), text),
        "heun": lambda: (tiny.sd_pipeline(scheduler=tiny.scheduler("HeunDiscreteScheduler")), text),
        "karras": lambda: (tiny.sd_pipeline(scheduler=tiny.scheduler("EulerDiscreteScheduler", use_karras_sigmas=True)), text),
        "lcm": lambda: (tiny.sd_pipeline(unet=tiny.unet2d_condition(time_cond_proj_dim=16)), text),
        "sdxl": lambda: (tiny.sdxl_pipeline(), text),
        "sd3": lambda: (tiny.sd3_pipeline(), text),
        "dit": lambda: (tiny.dit_pipeline(), {"class_labels": [1, 2], "num_inference_steps": STEPS, "generator": generator(), "output_type": "np"}),
        "img2img": lambda: (tiny.sd_pipeline("StableDiffusionImg2ImgPipeline"), {**CALL, "prompt": "a cat", "image": image(), "strength": 0.6, "generator": generator()}),
        "inpaint": lambda: (tiny.sd_pipeline("StableDiffusionInpaintPipeline", unet=tiny.unet2d_condition(in_channels=9)), {**CALL, "prompt": "a cat", "image": image() * 2 - 1, "mask_image": masked, "height": 16, "width": 16, "generator": generator()}),
        "controlnet": lambda: (tiny.sd_pipeline("StableDiffusionControlNetPipeline", controlnet=tiny.controlnet()), {**CALL, "prompt": "a cat", "image": image(), "latents": start(), "height": 16, "width": 16}),
    }  # fmt: skip


def result(pipe: Any, call: dict[str, Any]) -> Tensor:
    call = {**call, **({"generator": generator()} if "generator" in call else {})}
    return torch.as_tensor(pipe(**call).images)


@pytest.mark.parametrize("name", cases())
def test_identity_is_the_pipeline_to_the_bit(name: str) -> None:
    pipe, call = cases()[name]()
    slot = "unet" if hasattr(pipe, "unet") else "transformer"
    original = getattr(pipe, slot)
    theirs = result(pipe, call)
    fast = accelerate_pipeline(pipe, [Watch(), Twin()], steps=STEPS)
    assert torch.equal(result(fast, call), theirs)
    assert torch.equal(result(fast, call), theirs)  # again, without an explicit reset
    net = getattr(fast, slot)
    assert net._run.resets == 2 + 1 * (net._run.resets == 3)  # once when set up, then once per sampling
    assert len(net._run.seen) % 2 == 0 and len(net._run.seen) >= 2 * 6
    assert getattr(pipe, slot) is original and torch.equal(result(pipe, call), theirs)


def test_the_accelerated_network_behaves_as_the_original(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline

    pipe = tiny.sd_pipeline()
    fast = accelerate_pipeline(pipe, Watch(), steps=STEPS)
    net, original = fast.unet, pipe.unet
    assert net.config == original.config and net.dtype == original.dtype and net.device == original.device
    assert isinstance(net, type(original)) and isinstance(net, nn.Module)
    assert inspect.signature(net.forward) == inspect.signature(original.forward)
    assert {p.data_ptr() for p in net.parameters()} == {p.data_ptr() for p in original.parameters()}
    fast.scheduler.set_timesteps(STEPS)
    x, t, text = start(), fast.scheduler.timesteps[0], torch.randn(1, 5, 16)
    output = original(x, t, text)
    assert type(net(x, t, text)) is type(output) and torch.equal(net(x, t, text).sample, output.sample)
    assert torch.equal(net(x, timestep=t, encoder_hidden_states=text, return_dict=False)[0], output.sample)
    with pytest.raises(TypeError, match="nonsense"):
        net(x, t, text, nonsense=1)
    fast.save_pretrained(tmp_path)  # as the original pipeline
    again = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(again.unet) is type(original)
    assert torch.equal(again.unet(x, t, text).sample, output.sample)
    twin = copy.deepcopy(fast)
    assert torch.equal(
        result(twin, {**CALL, "prompt": "a cat", "latents": start()}),
        result(pipe, {**CALL, "prompt": "a cat", "latents": start()}),
    )
    other = tiny.quiet(StableDiffusionImg2ImgPipeline(**fast.components, requires_safety_checker=False))
    image_call = {**CALL, "prompt": "a cat", "image": image(), "strength": 0.5, "generator": generator()}
    plain = tiny.quiet(StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False))
    assert torch.equal(result(other, image_call), result(plain, image_call))


def test_other_steps_and_schedulers_are_followed() -> None:
    """Layers are replaced once; accelerators that depend on the times are set up per list of times."""
    pipe = tiny.sd_pipeline()
    Twin.applied.clear()
    fast = accelerate_pipeline(pipe, [Watch(), Twin()], steps=STEPS)
    call = {**CALL, "prompt": "a cat", "latents": start()}
    for steps in (STEPS, 4, STEPS, 7):
        now = {**call, "num_inference_steps": steps}
        assert torch.equal(result(fast, now), result(pipe, now))
    assert len(Twin.applied) == 1
    fast.scheduler = as_scheduler("unipc", like=pipe)
    ours = result(fast, call)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    pipe.scheduler = as_scheduler("unipc", like=pipe)
    assert torch.equal(ours, result(pipe, call))
    interrupted = {**call, "callback_on_step_end": lambda p, i, t, k: setattr(p, "_interrupt", i == 2) or k}
    fast(**interrupted)  # a sampling that ends early
    assert torch.equal(result(fast, call), ours)
    flow = as_scheduler("ddim", like=tiny.sd3_pipeline())
    fast.scheduler = flow
    with pytest.raises(BadInput, match="of another kind"):
        result(fast, call)


def test_replaced_weights_are_used() -> None:
    pipe = tiny.sd_pipeline()
    call = {**CALL, "prompt": "a cat", "latents": start()}
    theirs = result(pipe, call)
    assert (result(accelerate_pipeline(pipe, Twin(0.9), STEPS), call) - theirs).abs().max() > 1e-3
    close = result(accelerate_pipeline(pipe, OnlyX0(), STEPS), call)
    assert 0 < (close - theirs).abs().max() < 1e-4
    assert torch.equal(result(pipe, call), theirs)


def test_calibration_sees_the_pipeline() -> None:
    """`SamplingContext.calls` of a pipeline: guidance's two branches, prompts and times of its own scheduler."""
    seen_contexts: list[Any] = []

    @dataclass(frozen=True)
    class Look:
        stage: ClassVar[int] = WRAP
        claims: ClassVar[frozenset[str]] = frozenset()

        def apply(self, denoiser: Any, context: SamplingContext) -> nn.Module:
            seen_contexts.append((context.required("look"), context.calibration("look", 3, 0), context.claimed))
            return denoiser

    pipe = tiny.sd_pipeline(scheduler=tiny.scheduler(**TRAILING))
    accelerate_pipeline(pipe, [Look(), Twin()], steps=4, prompts=["a cat", "the dog"])
    times, calls, claimed = seen_contexts[0]
    assert claimed == {"arithmetic"}
    assert times == tuple(times_like(pipe.scheduler, 4)[:-1].tolist())
    assert [t for _, t, _ in calls] == list(times)
    x, _, cond = calls[0]
    assert x.shape == (6, 4, 8, 8) and cond["text"].shape[0] == 6 and torch.equal(x[:3], x[3:])
    assert not torch.equal(cond["text"][0], cond["text"][1]) and torch.equal(cond["text"][3], cond["text"][4])


def test_one_name_for_denoisers_and_pipelines() -> None:
    pipe = tiny.sd_pipeline()
    assert type(accelerate(pipe, Watch(), steps=STEPS)) is type(pipe)
    denoiser = hasten.load(pipe).denoiser
    assert isinstance(accelerate(denoiser, [Watch()], SamplingContext((1.0, 0.5))), Watched)
    with pytest.raises(BadInput, match="found Denoiser with steps="):
        accelerate(denoiser, Watch(), steps=3)
    with pytest.raises(BadInput, match="found dict"):
        accelerate({}, Watch())


def test_refusals() -> None:
    pipe = tiny.sd_pipeline()
    fast = accelerate_pipeline(pipe, Watch(), STEPS)
    with pytest.raises(Conflict, match="both claim 'features'"):
        accelerate_pipeline(pipe, [Watch(), Twin(), Watch()])
    with pytest.raises(BadInput, match="accelerated already"):
        accelerate_pipeline(fast, Twin())
    with pytest.raises(BadInput, match="neither a unet nor a transformer"):
        accelerate_pipeline(copy.copy(pipe).vae, Watch())
    x, text = start(2), torch.randn(2, 5, 16)
    with pytest.raises(BadInput, match="at one time"):
        fast.unet(x, torch.tensor([1, 2]), text)
    with pytest.raises(BadInput, match="LoRA scale"):
        fast.unet(x, 1, text, cross_attention_kwargs={"scale": 0.5})
    pipe.scheduler.set_timesteps(STEPS)
    with pytest.raises(BadInput, match="must know the times"):
        fast.unet(x, 1000 - 0.5, text)  # a time that is not the scheduler's


def test_encoder_propagation_in_pipelines() -> None:
    propagation = pytest.importorskip("hasten.accelerators.encoder_propagation").EncoderPropagation
    for name in ("sd", "ddpm", "sdxl", "controlnet", "dit", "sd3", "heun"):
        pipe, call = cases()[name]()
        theirs = result(pipe, call)
        slot = "unet" if hasattr(pipe, "unet") else "transformer"
        queries = {"heun": 2 * STEPS - 1}.get(name, STEPS)
        every = accelerate_pipeline(pipe, propagation(keys=tuple(range(queries))), STEPS)
        assert torch.allclose(result(every, call), theirs, atol=1e-6), name
        keys = tuple(range(0, queries, 2))
        some = accelerate_pipeline(pipe, propagation(keys=keys), STEPS)
        ours = result(some, call)
        assert getattr(some, slot)._run.encoder_calls == len(keys), name  # a ControlNet's residuals make no keys
        change = float((ours - theirs).norm() / theirs.norm())
        assert 1e-6 < change < 0.9, (name, change)
        together = accelerate_pipeline(pipe, propagation(keys=keys, parallel=4), STEPS)
        assert torch.allclose(result(together, call), ours, atol=1e-4), name


def test_deep_cache_and_searched_key_steps_in_pipelines() -> None:
    cache = pytest.importorskip("hasten.accelerators.deep_cache").DeepCache
    propagation = pytest.importorskip("hasten.accelerators.encoder_propagation").EncoderPropagation
    for name in ("sd", "controlnet"):
        pipe, call = cases()[name]()
        theirs = result(pipe, call)
        every = accelerate_pipeline(pipe, cache(keys=tuple(range(STEPS))), STEPS)
        assert torch.allclose(result(every, call), theirs, atol=1e-6)
        some = accelerate_pipeline(pipe, cache(every=2), STEPS)
        assert 1e-6 < float((result(some, call) - theirs).norm() / theirs.norm()) < 0.9
        assert some.unet._run.encoder_calls == STEPS // 2
    pipe, call = cases()["sd"]()
    searched = accelerate_pipeline(pipe, propagation(keys="found", budget=0.5, samples=2), STEPS, prompts="a cat")
    result(searched, call)
    assert len(searched.unet._run.keys) == 5 and searched.unet._run.keys[0] == 0
