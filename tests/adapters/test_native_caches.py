"""diffusers' own caches as accelerators: the picture is that of `enable_cache`, and the original pipeline stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.accelerators import Conflict
from hasten.adapters.diffusers.native_caches import enabled_cache
from hasten.errors import BadInput
from hasten.pick import pick

from . import tiny
from .test_scheduler_arguments import flux

diffusers: Any = pytest.importorskip("diffusers")
STEPS = 8
SKIPS = "spatial_attention_block_skip_range=2,spatial_attention_timestep_skip_range=(0,990)"
RATIOS = (1.0, 0.99, 1.01, 1.0)
CACHES = {
    "first_block_cache:threshold=0.3": ("FirstBlockCacheConfig", {"threshold": 0.3}),
    "taylor_seer_cache:cache_interval=3,taylor_factors_dtype=float32": (
        "TaylorSeerCacheConfig",
        {"cache_interval": 3, "taylor_factors_dtype": torch.float32},
    ),
    f"mag_cache:mag_ratios={str(RATIOS).replace(' ', '')}": (
        "MagCacheConfig",
        {"mag_ratios": list(RATIOS), "num_inference_steps": STEPS},
    ),
    f"pyramid_attention_broadcast:{SKIPS}": (
        "PyramidAttentionBroadcastConfig",
        {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (0, 990)},
    ),
    "faster_cache:is_guidance_distilled=true,tensor_format=BCHW,spatial_attention_timestep_skip_range=(-1,990)": (
        "FasterCacheConfig",
        {
            "is_guidance_distilled": True,
            "tensor_format": "BCHW",
            "spatial_attention_timestep_skip_range": (-1, 990),
        },
    ),
}


def drawn(pipe: Any, steps: int = STEPS) -> Tensor:
    draws = [torch.Generator().manual_seed(k) for k in range(3)]
    return pipe(
        prompt_embeds=torch.randn(1, 5, 32, generator=draws[0]),
        pooled_prompt_embeds=torch.randn(1, 16, generator=draws[1]),
        num_inference_steps=steps,
        height=16,
        width=16,
        generator=draws[2],
        output_type="latent",
    ).images


@pytest.mark.parametrize("spec", CACHES)
def test_a_cache_is_that_of_diffusers(spec: str) -> None:
    pipe, (name, options) = flux(), CACHES[spec]
    if not hasattr(diffusers, name):
        pytest.skip(f"this version of diffusers has no {name}")
    theirs, plain = copy.deepcopy(pipe), drawn(pipe)
    if "timestep_skip_range" in str(options):
        options = {**options, "current_timestep_callback": lambda: theirs.current_timestep}
    theirs.transformer.enable_cache(getattr(diffusers, name)(**options))
    expected = drawn(theirs)
    fast = hasten.accelerate(pipe, spec, steps=STEPS)
    assert torch.equal(drawn(fast), expected) and not torch.equal(expected, plain)
    assert torch.equal(drawn(fast), expected)  # nothing is left of the first image
    assert torch.equal(drawn(pipe), plain) and enabled_cache(pipe.transformer) is None
    assert enabled_cache(fast.transformer) == name.removesuffix("Config")
    assert fast.transformer.proj_out.weight.data_ptr() == pipe.transformer.proj_out.weight.data_ptr()
    with pytest.raises(BadInput, match=f"has a cache of diffusers already \\({name.removesuffix('Config')}"):
        hasten.accelerate(fast, "first_block_cache", steps=STEPS)


def test_a_threshold_of_nothing_is_the_pipeline() -> None:
    pipe = flux()
    assert torch.equal(drawn(hasten.accelerate(pipe, "first_block_cache:threshold=0", steps=STEPS)), drawn(pipe))


def test_mag_cache_measures_its_ratios_in_a_call() -> None:
    """Of the residual of all blocks: those that hooks on the first and the last block see."""
    pipe, ends = flux(), list[Any]()
    handles = [
        pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: ends.append(kwargs["hidden_states"]), with_kwargs=True
        ),
        pipe.transformer.single_transformer_blocks[-1].register_forward_hook(lambda *_: ends.append(_[2][1])),
    ]
    drawn(pipe)
    for handle in handles:
        handle.remove()
    sizes = [torch.linalg.vector_norm(out - into, dim=-1) for into, out in zip(ends[::2], ends[1::2])]
    ratios = (1.0, *(float((b / (a + 1e-8)).mean()) for a, b in zip(sizes, sizes[1:])))
    fast = hasten.accelerate(pipe, "mag_cache:threshold=0.5", steps=STEPS, calls=drawn)
    assert fast.transformer._cache_config.mag_ratios.tolist() == pytest.approx(ratios, rel=1e-4)
    assert torch.isfinite(drawn(fast)).all() and enabled_cache(pipe.transformer) is None
    with pytest.raises(BadInput, match="measures its ratios in a call"):
        hasten.accelerate(pipe, "mag_cache", steps=STEPS)


def test_what_does_not_fit_is_refused() -> None:
    pipe = flux()
    for specs, error, message in [
        (["first_block_cache", "taylor_seer_cache"], Conflict, "both claim 'features'"),
        (["first_block_cache", "compile"], BadInput, "combines with no other accelerator: compile"),
        (["sea_cache"], BadInput, "is for Cosmos3OmniTransformer and Wan.*, found FluxTransformer2DModel"),
    ]:
        with pytest.raises(error, match=message):
            hasten.accelerate(pipe, specs, steps=STEPS)
    with pytest.raises(BadInput, match="is for transformers, and StableDiffusionPipeline has none"):
        hasten.accelerate(tiny.sd_pipeline(), "first_block_cache")
    with pytest.raises(BadInput, match="DiTTransformer2DModel of diffusers .* has no enable_cache"):
        hasten.accelerate(tiny.dit_pipeline(), "first_block_cache")
    with pytest.raises(BadInput, match="runs in a pipeline's transformer: use hasten.accelerate"):
        hasten.load(tiny.dit_pipeline()).sample(1, steps=10, accelerators=["first_block_cache"])
    dit = tiny.dit_pipeline()
    diffusers.hooks.apply_taylorseer_cache(dit.transformer, diffusers.TaylorSeerCacheConfig())
    with pytest.raises(BadInput, match="has a cache of diffusers already .taylorseer_cache"):
        hasten.accelerate(dit, "encoder_propagation", steps=20)
    for spec in (
        "first_block_cache:threshold=-1",
        "mag_cache:retention_ratio=2",
        "pyramid_attention_broadcast:spatial_attention_block_skip_range=none",
        "faster_cache:spatial_attention_timestep_skip_range=(9,1)",
        "taylor_seer_cache:cache_interval=0",
        "sea_cache:residual_order=2",
    ):
        with pytest.raises(BadInput, match=spec.partition(":")[0]):
            pick("accelerators", spec)
