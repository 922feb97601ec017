"""Encoder propagation in text-to-video, personalised and reference-guided pipelines, against a reference by hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import hasten
from hasten.adapters.diffusers.time_scale import TimeScale, find_time_scale
from hasten.errors import BadInput

from . import block_nets, tiny
from .test_accelerated_network import ip_adapter, sample_latents, sd
from .test_split_blocks import Stranger

STEPS, EVERY = 9, 3
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


def images(pipe: Any, **more: Any) -> Tensor:
    return sample_latents(pipe, num_inference_steps=STEPS, **more)


def halves(net: Any) -> list[nn.Module]:
    return [net.conv_in, *net.down_blocks, net.mid_block]


def check(pipe: Any, call: Call, slot: str = "unet", encoder: Any = halves, branches: int = 1) -> tuple[Any, Tensor]:
    """The samples are those of the reference, and the encoder ran as often as promised."""
    net = getattr(pipe, slot)
    theirs = reference(net, encoder(net), lambda: call(pipe), branches)
    fast = hasten.accelerate(pipe, PROPAGATE, steps=STEPS)
    runs: list[nn.Module] = []
    for module in encoder(getattr(fast, slot)):
        module.register_forward_hook(lambda module, *_: runs.append(module))
    ours = call(fast)
    assert torch.allclose(ours, theirs, atol=1e-5)
    if encoder is halves:  # the first evaluation also checks the split, without its encoder
        assert len(runs) == STEPS // EVERY * len(encoder(net)) * branches
    return fast, ours


def check_all(pipe: Any, call: Call, slot: str = "unet", encoder: Any = halves, branches: int = 1) -> None:
    """The same; key steps only are the pipeline itself, bit for bit; and a second image has no features of the first."""
    fast, ours = check(pipe, call, slot, encoder, branches)
    plain = call(pipe)
    assert torch.equal(call(fast), ours) and not torch.allclose(ours, plain, atol=1e-3)
    assert torch.equal(call(hasten.accelerate(pipe, "encoder_propagation:keys=uniform,every=1", steps=STEPS)), plain)


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
    check_all(wan(), wan_video, "transformer", lambda net: [net.blocks[1]], branches=2)


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
    _, ours = check(pipe, flux_image, "transformer", lambda net: [net.single_transformer_blocks[0]])
    batched = hasten.accelerate(pipe, f"{PROPAGATE},parallel=3", steps=STEPS)
    assert torch.allclose(flux_image(batched), ours, atol=1e-4)


def test_key_steps_are_searched_on_the_pipelines_own_call() -> None:
    """At the times that its network gets, those of its scheduler over 1000: every group of key steps costs as measured."""
    pipe = flux()
    spec = "encoder_propagation:keys=found,budget=3,samples=1"
    found = hasten.accelerate(pipe, spec, steps=STEPS, calls=flux_image)
    ours = flux_image(found)
    keys = found.transformer._run.keys
    explicit = f"encoder_propagation:keys=({','.join(map(str, keys))})"
    assert torch.equal(flux_image(hasten.accelerate(pipe, explicit, steps=STEPS)), ours)
    assert len(keys) == 3 and torch.isfinite(ours).all()


def test_a_lora(tmp_path: Path) -> None:
    """Loaded by the pipeline itself, through peft."""
    peft = pytest.importorskip("peft")
    pipe = sd()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path, peft.get_peft_model_state_dict(pipe.unet), safe_serialization=True)
    pipe = sd()
    pipe.load_lora_weights(str(tmp_path))
    _, ours = check(pipe, images)
    assert not torch.allclose(check(sd(), images)[1], ours, atol=1e-3)


def test_fine_tuned_weights(tmp_path: Path) -> None:
    """DreamBooth: all weights changed, saved and loaded."""
    pipe = sd()
    with torch.no_grad():
        for p in pipe.unet.parameters():
            p.add_(0.1 * p.std(correction=0) * torch.randn(p.shape, generator=generator()))
    pipe.unet.save_pretrained(tmp_path)
    check(sd(unet=type(pipe.unet).from_pretrained(tmp_path).eval()), images)


def test_a_textual_inversion() -> None:
    pipe = sd(tokenizer=copy.deepcopy(tiny.tokenizer()))
    pipe.load_textual_inversion({"<thing>": noise(2, 16)})
    _, ours = check(pipe, lambda p: images(p, prompt="a <thing>"))
    assert not torch.allclose(images(pipe, prompt="a cat"), ours, atol=1e-3)


def test_a_controlnet() -> None:
    parts = {**sd().components, "controlnet": tiny.controlnet(), "requires_safety_checker": False}
    pipe = tiny.sd_pipeline("StableDiffusionControlNetPipeline", **parts)
    image = noise(1, 3, 16, 16).sigmoid()
    check(pipe, lambda p: images(p, image=image))


def test_an_ip_adapter() -> None:
    pipe = sd()
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    embeds = [noise(2, 1, 8)]
    check(pipe, lambda p: images(p, ip_adapter_image_embeds=embeds))


class Pipeline(DiffusionPipeline):
    """A stranger's pipeline, of a network that neither hasten nor diffusers knows."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        x = noise(2, 6, 4)
        self.scheduler.set_timesteps(STEPS)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.transformer(x, t.expand(2)), t, x).prev_sample
        return x


def test_a_pipeline_and_network_of_unknown_classes() -> None:
    torch.manual_seed(0)
    pipe = Pipeline(Stranger(), tiny.scheduler())
    check_all(pipe, lambda p: p(), "transformer", lambda net: [net.wrapped.second_part[0]])


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
