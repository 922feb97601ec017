"""DeepCache inside the first block of diffusers' U-Nets, against a reference of the paper; ControlNets at key steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.adapters.diffusers.wrap import split_network
from hasten.errors import BadInput
from hasten.performance.cost import macs

from . import tiny
from .test_accelerated_network import STEPS, relative_error, sample_latents, sd

EVERY = 3
IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CONTROL: dict[str, Any] = {"image": IMAGE, "height": 16, "width": 16}


def deeper(net: Any, branch: int) -> Iterator[nn.Module]:
    """The layers that the paper's cheap evaluations pass over, from its text: all below skip `branch`."""
    for level, block in enumerate(net.down_blocks):
        for k, resnet in enumerate(block.resnets):
            if level or k >= branch:
                yield resnet
                yield from list(getattr(block, "attentions", []))[k : k + 1]
        yield from block.downsamplers or []
    yield net.mid_block
    last = len(net.up_blocks) - 1
    for level, block in enumerate(net.up_blocks):
        for k, resnet in enumerate(block.resnets):
            if level < last or len(block.resnets) - 1 - k > branch:
                yield resnet
                yield from list(getattr(block, "attentions", []))[k : k + 1]
        yield from block.upsamplers or []


def reuse(module: nn.Module, is_key: Callable[[], bool]) -> None:
    """At other than key steps the module returns what it returned last."""
    forward, cached = module.forward, [None]

    def reusing(*args: Any, **kwargs: Any) -> Any:
        if is_key():
            cached[0] = forward(*args, **kwargs)
        return cached[0]

    module.forward = reusing


def reference(pipe: Any, branch: int, every: int = EVERY) -> Any:
    """A copy of the pipeline whose layers cache their own outputs, as the authors' code does."""
    pipe = copy.deepcopy(pipe)
    queries = [-1]
    pipe.unet.register_forward_hook(lambda *_: queries.__setitem__(0, queries[0] + 1))
    queries[0] = 0
    for module in list(deeper(pipe.unet, branch)):
        reuse(module, lambda: queries[0] % every == 0)
    if getattr(pipe, "controlnet", None) is not None:
        reuse(pipe.controlnet, lambda: queries[0] % every == 0)
    return pipe


def three_levels() -> nn.Module:
    return tiny.unet2d_condition(
        layers_per_block=2,
        block_out_channels=(16, 16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def runs_of(module: Any) -> list[int]:
    """One entry for each time that the module runs."""
    runs: list[int] = []
    module.register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_the_picture_is_that_of_the_paper(branch: int) -> None:
    pipe = sd(unet=three_levels())
    expected = sample_latents(reference(pipe, branch))
    fast = hasten.accelerate(pipe, f"deep_cache:every={EVERY},branch={branch}", steps=STEPS)
    assert relative_error(sample_latents(fast), expected) < 1e-5
    plain = sample_latents(pipe)
    assert relative_error(expected, plain) > 1e-3
    if branch == 2:
        fast = hasten.accelerate(pipe, f"deep_cache:every={EVERY}", steps=STEPS)
        assert relative_error(sample_latents(fast), expected) < 1e-5  # the default
        with pytest.raises(BadInput, match="branch must be 0 to 2, found 3"):
            hasten.accelerate(pipe, "deep_cache:branch=3", steps=STEPS)


@torch.no_grad()
def test_an_unconditional_network_and_the_cost_of_each_branch() -> None:
    pipe = tiny.ddpm_pipeline(timestep_spacing="trailing")

    def images(which: Any) -> Tensor:
        return torch.as_tensor(
            which(num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="np").images
        )

    fast = hasten.accelerate(pipe, f"deep_cache:every={EVERY},branch=0", steps=STEPS)
    assert torch.allclose(images(fast), images(reference(pipe, 0)), atol=1e-5)
    split: Any = split_network(three_levels())
    x, emb = torch.randn(1, 4, 8, 8), split.embed(torch.ones(1), text=torch.randn(1, 5, 16))
    whole, deep = macs(split.encode, x, emb) + macs(split.decode, *split.encode(x, emb), emb), []
    for branch in range(3):
        first = split.shallow_encode(x, emb, branch)
        deep.append(macs(split.deep, first, emb))
        cheap = macs(split.shallow_encode, x, emb, branch) + macs(
            split.shallow_decode, first, split.deep(first, emb), emb
        )
        assert cheap + deep[-1] == whole
    assert deep[0] > deep[1] > deep[2] > 0


def test_freeu_compiled_parts_and_offloading_by_block() -> None:
    """What is set on the blocks later takes effect on a part of their layers, too."""
    pipe = sd()
    fast = hasten.accelerate(pipe, ["compile:backend=eager", "deep_cache:every=1,branch=0"], steps=STEPS)
    assert torch.allclose(sample_latents(fast), sample_latents(pipe), atol=1e-5)
    every: Any = hasten.accelerate(pipe, "deep_cache:every=1,branch=0", steps=STEPS)
    before = sample_latents(every)
    for which in (pipe, every):
        which.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert torch.equal(sample_latents(every), sample_latents(pipe)) and not torch.equal(sample_latents(every), before)
    every.disable_freeu()
    pytest.importorskip("accelerate")
    cpu = torch.device("cpu")
    every.unet.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )
    hook = vars(every.unet.down_blocks[0])["_diffusers_hook"].hooks["group_offloading"]
    calls, pre_forward = [], hook.pre_forward
    hook.pre_forward = lambda *args, **kwargs: (calls.append(1), pre_forward(*args, **kwargs))[1]
    assert torch.equal(sample_latents(every), before) and len(calls) == STEPS
    every.unet.up_blocks[-1].forward = lambda *args, **kwargs: None
    with pytest.raises(BadInput, match="UpBlock2D, whose forward was replaced"):
        sample_latents(every)


@pytest.mark.parametrize("name", ["deep_cache:branch=0,", "encoder_propagation:keys=uniform,"])
def test_controlnets_run_at_key_steps(name: str) -> None:
    """The picture is that of the formula; the original pipeline's ControlNet runs as ever."""
    pipe = sd(kind="StableDiffusionControlNetPipeline", controlnet=tiny.controlnet())
    runs = runs_of(pipe.controlnet)
    keys = len(range(0, STEPS, EVERY))
    fast: Any = hasten.accelerate(pipe, f"{name}every={EVERY}", steps=STEPS)
    assert type(fast.controlnet).__name__ == "ControlNetModel" and isinstance(fast.controlnet, type(pipe.controlnet))
    ours = sample_latents(fast, **CONTROL)
    assert len(runs) == keys
    assert torch.equal(sample_latents(fast, **CONTROL), ours) and len(runs) == 2 * keys
    plain = sample_latents(pipe, **CONTROL)
    assert len(runs) == 2 * keys + STEPS and relative_error(ours, plain) > 1e-3
    if "deep_cache" in name:
        assert relative_error(ours, sample_latents(reference(pipe, 0), **CONTROL)) < 1e-5
        runs.clear()
        ended = sample_latents(fast, **CONTROL, control_guidance_end=0.5)  # the scale becomes 0 at evaluation 5
        assert len(runs) == keys + 1 and relative_error(ended, ours) > 1e-3
        runs.clear()
        again = copy.deepcopy(fast)
        assert torch.equal(sample_latents(again, **CONTROL), sample_latents(hasten_every(pipe), **CONTROL))


def hasten_every(pipe: Any) -> Any:
    """The accelerated pipeline with the ControlNet evaluated at every step."""
    fast = hasten.accelerate(pipe, f"deep_cache:branch=0,every={EVERY}", steps=STEPS)
    vars(fast)["controlnet"] = pipe.controlnet
    return fast
