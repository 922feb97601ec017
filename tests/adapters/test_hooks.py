"""Hooks of diffusers inside a network: used beside accelerators, or refused in a line; never stacked in silence."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import hasten
from hasten.errors import BadInput

from .test_accelerated_network import sample_latents, sd
from .test_propagation_pipelines import PROPAGATE, STEPS, flux, flux_image

QUANTIZE = "quantize:images=1,steps=2,groups=1,ranges=minmax"


def first_block_cache() -> Any:
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=0.1)


def test_a_cache_of_diffusers_and_one_of_hasten() -> None:
    pipe = flux()
    pipe.transformer.enable_cache(first_block_cache())
    with pytest.raises(
        BadInput, match=r"has the FirstBlockCache of diffusers, and encoder_propagation.*disable_cache\(\)"
    ):
        hasten.accelerate(pipe, PROPAGATE, steps=STEPS)
    with pytest.warns(UserWarning, match="FirstBlockCache of diffusers, which stays in use beside compile"):
        fast = hasten.accelerate(pipe, "compile:backend=eager", steps=STEPS)
    assert torch.equal(flux_image(hasten.accelerate(pipe, [], steps=STEPS)), flux_image(pipe)) and fast is not pipe
    pipe.transformer.disable_cache()
    fast = hasten.accelerate(pipe, PROPAGATE, steps=STEPS)
    ours = flux_image(fast)
    fast.transformer.enable_cache(first_block_cache())  # afterwards, too
    with pytest.raises(BadInput, match="has the FirstBlockCache of diffusers"):
        flux_image(fast)
    fast.transformer.disable_cache()
    assert torch.equal(flux_image(fast), ours)


def test_caches_that_were_applied_without_the_mixin() -> None:
    from diffusers import TaylorSeerCacheConfig
    from diffusers.hooks import apply_taylorseer_cache

    pipe = flux()
    apply_taylorseer_cache(pipe.transformer, TaylorSeerCacheConfig())
    with pytest.raises(BadInput, match="has the TaylorSeerCache of diffusers"):
        hasten.accelerate(pipe, PROPAGATE, steps=STEPS)


def test_layerwise_casting() -> None:
    """Weights that are stored in half precision: reuse runs the same hooks; integers cannot be made of them."""
    for pipe, slot, call in ((sd(), "unet", sample_latents), (flux(), "transformer", flux_image)):
        getattr(pipe, slot).enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
        with pytest.raises(BadInput, match="stores its weights in another format .* leave enable_layerwise_casting"):
            hasten.accelerate(pipe, QUANTIZE, steps=STEPS, calls=call)
        fast = hasten.accelerate(pipe, "encoder_propagation:keys=uniform,every=1", steps=STEPS)
        assert torch.equal(call(fast), call(pipe))


def test_group_offloading() -> None:
    from diffusers.hooks import apply_group_offloading

    def offloaded(**options: Any) -> Any:
        pipe, cpu = flux(), torch.device("cpu")
        apply_group_offloading(pipe.transformer, onload_device=cpu, offload_device=cpu, **options)
        return pipe

    with pytest.raises(BadInput, match="moves several blocks together or in advance.*num_blocks_per_group=1"):
        hasten.accelerate(offloaded(offload_type="block_level", num_blocks_per_group=2), PROPAGATE, steps=STEPS)
    plain = flux_image(hasten.accelerate(flux(), PROPAGATE, steps=STEPS))
    for options in ({"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(flux_image(hasten.accelerate(offloaded(**options), PROPAGATE, steps=STEPS)), plain)
