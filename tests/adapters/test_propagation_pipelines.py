"""Encoder propagation in text-to-video, personalised and reference-guided pipelines, against a reference by hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.adapters.diffusers.time_scale import TimeScale, find_time_scale
from hasten.errors import BadInput

from . import block_nets, tiny
from .test_accelerated_network import ip_adapter, sample_latents, sd

STEPS, EVERY = 10, 3
PROPAGATE = f"encoder_propagation:keys=uniform,every={EVERY}"
Call = Callable[[Any], Tensor]
noise = block_nets.noise


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def reference(net: nn.Module, encoder: list[nn.Module], call: Callable[[], Tensor], branches: int = 1) -> Tensor:
    """Faster Diffusion as its paper has it (Li et al. 2023): at steps that are no key steps the encoder's outputs, and a
    ControlNet's residuals, are those of the key step before."""
    count, cache = -1, dict[Any, Any]()

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        nonlocal count
        count += 1
        for name in [name for name in kwargs if "additional_residual" in name]:
            cache.setdefault(name, kwargs[name])
            if count // branches % EVERY == 0:
                cache[name] = kwargs[name]
            kwargs[name] = cache[name]
        return args, kwargs

    def remember(module: nn.Module, args: Any, output: Any) -> Any:
        key = module, count % branches
        if count // branches % EVERY == 0:
            cache[key] = output
        return cache[key]

    hooks = [net.register_forward_pre_hook(begin, with_kwargs=True)]
    hooks += [module.register_forward_hook(remember) for module in encoder]
    try:
        output = call()
    finally:
        for hook in hooks:
            hook.remove()
    assert count + 1 == STEPS * branches
    return output


def halves(net: Any) -> list[nn.Module]:
    return [net.conv_in, *net.down_blocks, net.mid_block]


def check(pipe: Any, call: Call, slot: str = "unet", encoder: Any = halves, branches: int = 1) -> None:
    """Key steps only: the pipeline; some key steps: the reference; and it runs the encoder as often as promised."""
    net, plain = getattr(pipe, slot), call(pipe)
    theirs = reference(net, encoder(net), lambda: call(pipe), branches)
    assert not torch.allclose(theirs, plain, atol=1e-3)
    full = hasten.accelerate(pipe, "encoder_propagation:keys=uniform,every=1", steps=STEPS)
    assert torch.equal(call(full), plain)
    fast = hasten.accelerate(pipe, PROPAGATE, steps=STEPS)
    runs: list[nn.Module] = []
    for module in encoder(getattr(fast, slot)):
        module.register_forward_hook(lambda module, *_: runs.append(module))
    ours = call(fast)
    assert torch.allclose(ours, theirs, atol=1e-5)
    if encoder is halves:  # the first evaluation of all checks the split, without its encoder
        assert len(runs) == 4 * len(encoder(net)) * branches
    assert torch.equal(call(fast), ours)  # a second image is not of the first one's features


def animate_diff() -> Any:
    from diffusers import AnimateDiffPipeline, MotionAdapter

    motion = tiny.seeded(
        lambda: MotionAdapter(
            block_out_channels=(16, 32),
            motion_layers_per_block=1,
            motion_norm_num_groups=8,
            motion_num_attention_heads=2,
        )
    )
    parts = sd().components
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "feature_extractor", "image_encoder")
    pipe = AnimateDiffPipeline(**{name: parts[name] for name in names}, motion_adapter=motion)
    pipe.unet.requires_grad_(False)
    return tiny.quiet(pipe)


def video(pipe: Any, **more: Any) -> Tensor:
    call = {"num_frames": 3, "height": 16, "width": 16, "num_inference_steps": STEPS, "guidance_scale": 3.0, **more}
    return torch.as_tensor(pipe("a cat", **call, output_type="latent", generator=generator()).frames)


def test_text_to_video() -> None:
    """AnimateDiff, which evaluates the frames of both branches in one batch."""
    check(animate_diff(), video)


def test_text_to_video_of_modelscope() -> None:
    import diffusers

    if not hasattr(diffusers, "TextToVideoSDPipeline"):
        pytest.skip("no longer in diffusers")
    parts, net = sd().components, block_nets.unet3d()[0]
    names = ("vae", "text_encoder", "tokenizer", "scheduler")
    pipe = tiny.quiet(diffusers.TextToVideoSDPipeline(**{name: parts[name] for name in names}, unet=net))
    check(pipe, video, encoder=lambda net: [net.conv_in, net.transformer_in, *net.down_blocks, net.mid_block])


def wan() -> Any:
    import diffusers

    vae = tiny.seeded(
        lambda: diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])
    )  # fmt: skip
    table = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    return tiny.quiet(
        diffusers.WanPipeline(
            tokenizer=None, text_encoder=None, vae=vae, scheduler=table, transformer=block_nets.wan()[0]
        )
    )


def wan_video(pipe: Any) -> Tensor:
    texts = {"prompt_embeds": noise(1, 5, 16), "negative_prompt_embeds": noise(1, 5, 16, seed=8)}
    size = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": STEPS, "guidance_scale": 3.0}
    return pipe(**texts, **size, output_type="latent", generator=generator()).frames


def test_branches_of_guidance_that_are_evaluated_one_after_the_other() -> None:
    """Wan's pipeline: each branch reuses its own features."""
    check(wan(), wan_video, "transformer", lambda net: [net.blocks[1]], branches=2)


def flux(**more: Any) -> Any:
    import diffusers

    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    table = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    net = block_nets.flux()[0]
    return tiny.quiet(diffusers.FluxPipeline(scheduler=table, vae=tiny.vae(), transformer=net, **nothing))


def flux_image(pipe: Any, **more: Any) -> Tensor:
    texts = {"prompt_embeds": noise(1, 5, 32), "pooled_prompt_embeds": noise(1, 16)}
    size = {"height": 16, "width": 16, "num_inference_steps": STEPS, "guidance_scale": 3.0}
    return pipe(**texts, **size, output_type="latent", generator=generator(), **more).images


def test_flux() -> None:
    """Its times are those of its scheduler over 1000; 3 of 5 blocks are the encoder, two of them of two streams."""
    pipe = flux()
    check(pipe, flux_image, "transformer", lambda net: [net.single_transformer_blocks[0]])
    batched = hasten.accelerate(pipe, f"{PROPAGATE},parallel=3", steps=STEPS)
    one_by_one = hasten.accelerate(pipe, PROPAGATE, steps=STEPS)
    assert torch.allclose(flux_image(batched), flux_image(one_by_one), atol=1e-4)
    found = hasten.accelerate(
        pipe, "encoder_propagation:keys=found,budget=4,samples=1", steps=STEPS, calls=lambda p: flux_image(p)
    )
    assert torch.isfinite(flux_image(found)).all()


def test_a_lora(tmp_path: Path) -> None:
    """Loaded by the pipeline itself, through peft, with a scale in a call."""
    peft = pytest.importorskip("peft")
    pipe = sd()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path, peft.get_peft_model_state_dict(pipe.unet), safe_serialization=True)
    pipe = sd()
    plain = sample_latents(pipe)
    pipe.load_lora_weights(str(tmp_path))
    assert not torch.allclose(sample_latents(pipe), plain, atol=1e-3)
    check(pipe, sample_latents)


def test_fine_tuned_weights(tmp_path: Path) -> None:
    """DreamBooth: all weights changed, saved and loaded."""
    pipe = sd()
    with torch.no_grad():
        for p in pipe.unet.parameters():
            p.add_(0.1 * p.std(correction=0) * torch.randn(p.shape, generator=generator()))
    pipe.unet.save_pretrained(tmp_path)
    check(sd(unet=type(pipe.unet).from_pretrained(tmp_path).eval()), sample_latents)


def test_a_textual_inversion() -> None:
    pipe = sd()
    plain = sample_latents(pipe, prompt="a <thing>")
    pipe.load_textual_inversion({"<thing>": noise(2, 16)})
    assert not torch.allclose(sample_latents(pipe, prompt="a <thing>"), plain, atol=1e-3)
    check(pipe, lambda p: sample_latents(p, prompt="a <thing>"))


def test_a_controlnet() -> None:
    parts = {**sd().components, "controlnet": tiny.controlnet(), "requires_safety_checker": False}
    pipe = tiny.sd_pipeline("StableDiffusionControlNetPipeline", **parts)
    image = noise(1, 3, 16, 16).sigmoid()
    check(pipe, lambda p: sample_latents(p, image=image))


def test_an_ip_adapter() -> None:
    pipe = sd()
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    embeds = [noise(2, 1, 8)]
    check(pipe, lambda p: sample_latents(p, ip_adapter_image_embeds=embeds))


def test_the_scale_of_a_networks_time() -> None:
    import diffusers

    table = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    table.set_timesteps(7)
    first = float(table.timesteps[0])
    for scale in (TimeScale(), TimeScale(0.001), TimeScale(-0.001, 1.0)):
        assert find_time_scale(scale.argument(first), table, None) == scale
        assert find_time_scale(scale.argument(float(table.timesteps[3])), table, None) == scale
    with pytest.raises(BadInput, match="called at time 3.3, and its scheduler has no such timestep"):
        find_time_scale(3.3, table, nn.Linear(1, 1))
