"""Networks split by their structure: from the features of the first blocks follows the network's own output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.adapters.diffusers.split_blocks import SplitBlocks
from hasten.adapters.diffusers.structure import read_structure
from hasten.adapters.diffusers.wrap import split_network
from hasten.errors import BadInput

from . import block_nets, tiny
from .block_nets import noise


def split_points(split: SplitBlocks) -> list[int | None]:
    return [None] if split.depth is None else list(range(1, split.depth))


def check(
    net: nn.Module, x: Tensor, time: Tensor, cond: dict[str, Any], dtype: torch.dtype = torch.float32
) -> SplitBlocks:
    """At every split point: the features determine the output, with the blocks before them never called."""
    theirs = net(x, timestep=time, **cond, return_dict=False)[0]
    split = SplitBlocks(net)
    assert torch.equal(split(x, time, **cond), theirs)
    for first in split_points(split):
        inputs = split.inputs(x, time, cond)
        split.evaluate_blocks(first, inputs)  # shows the network's structure
        features, raw = split.evaluate_blocks(first, inputs)
        assert torch.equal(raw, theirs)
        ran: list[str] = []
        before = next(s for key, s in split._splits.items() if key[0] == first)
        hooks = [net.get_submodule(n).register_forward_hook(lambda *_, n=n: ran.append(n)) for n in before.encoder]
        other = split.inputs(x if before.reads_x else torch.full_like(x, float("nan")), time, cond)
        assert torch.equal(split.decode_blocks(first, features, other), theirs), first
        assert not ran
        for hook in hooks:
            hook.remove()
    return split


@pytest.mark.parametrize("name", block_nets.CASES)
@torch.no_grad()
def test_every_family(name: str) -> None:
    net, x, cond = block_nets.CASES[name]()
    time = torch.full((len(x),), 0.7 if name in ("FLUX", "Qwen-Image") else 700.0)
    split = check(net, x, time, cond)
    assert (split.depth is None) == ("UNet" in type(net).__name__)
    assert [p.data_ptr() for p in split.parameters()] == [p.data_ptr() for p in net.parameters()]
    # features of one time, decoded at another, are not the output there: the first blocks do read the time
    at = None if split.depth is None else split.depth - 1
    features, _ = split.evaluate_blocks(at, split.inputs(x, time, cond))
    later = split.decode_blocks(at, features, split.inputs(x, time / 2, cond))
    truth = net(x, timestep=time / 2, **cond, return_dict=False)[0]
    assert torch.isfinite(later).all() and not torch.equal(later, truth)


@torch.no_grad()
def test_flux_with_controlnet_residuals_guidance_and_one_sample() -> None:
    net, x, cond = block_nets.flux(rows=1)
    time = torch.tensor([0.7])
    check(net, x, time, cond)
    residuals = {"controlnet_block_samples": [noise(1, 6, 16, seed=k) for k in range(2)]}
    residuals["controlnet_single_block_samples"] = [noise(1, 6, 16, seed=k) for k in (7, 8)]
    check(net, x, time, {**cond, **residuals})
    controlled, plain = net(x, timestep=time, **cond, **residuals).sample, net(x, timestep=time, **cond).sample
    assert not torch.allclose(controlled, plain)
    net, x, cond = block_nets.flux(guidance_embeds=False)
    check(net, x, torch.tensor([0.7, 0.7]), cond)


@torch.no_grad()
def test_attention_kwargs_reach_the_blocks() -> None:
    net, x, cond = block_nets.flux()
    seen: list[Any] = []

    class Processor(type(net.transformer_blocks[0].attn.processor)):  # type: ignore[misc]
        def __call__(self, *args: Any, strength: float = 1.0, **kwargs: Any) -> Any:
            seen.append(strength)
            image, text, *more = super().__call__(*args, **kwargs)
            return image * strength, text, *more

    net.transformer_blocks[1].attn.set_processor(Processor())
    check(net, x, torch.tensor([0.7, 0.7]), {**cond, "joint_attention_kwargs": {"strength": 0.5}})
    assert set(seen) == {0.5}


@torch.no_grad()
def test_several_evaluations_in_one_batch() -> None:
    """Features of one evaluation, decoded at three times at once: positions, masks and frames are repeated rightly."""
    for name in ("FLUX", "Lumina 2", "HunyuanDiT", "AnimateDiff", "Stable Video Diffusion"):
        net, x, cond = block_nets.CASES[name]()
        split = SplitBlocks(net)
        at = None if split.depth is None else 2
        features, _ = split.evaluate_blocks(at, split.inputs(x, torch.full((2,), 0.7), cond))
        times = (0.7, 0.4, 0.1)
        each = [split.decode_blocks(at, features, split.inputs(x, torch.full((2,), t), cond)) for t in times]
        stacked = torch.utils._pytree.tree_map(
            lambda leaf: torch.cat([leaf] * 3) if isinstance(leaf, Tensor) else leaf, features
        )
        inputs = split.repeated_inputs(x, torch.tensor(times).repeat_interleave(2), cond)
        together = split.decode_blocks(at, stacked, inputs)
        assert torch.allclose(together, torch.cat(each), atol=1e-5), name


def test_what_a_split_in_the_middle_of_two_streams_cannot_do() -> None:
    net, x, cond = block_nets.lumina2()
    split = SplitBlocks(net)
    with torch.no_grad():
        features, _ = split.evaluate_blocks(1, split.inputs(x, torch.full((2,), 0.7), cond))
        with pytest.raises(
            BadInput, match="read the noisy sample, so that it decodes one step at a time: use parallel=1"
        ):
            split.decode_blocks(1, features, split.repeated_inputs(x, torch.full((4,), 0.7), cond))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, tokens: Tensor, shift: Tensor) -> Tensor:
        return tokens + self.inner(tokens + shift[:, None])


class Flat(Block):
    def forward(self, tokens: Tensor, shift: Tensor) -> Tensor:
        return super().forward(tokens, shift).mean(1)


class Stranger(nn.Module):
    """A transformer that neither hasten nor diffusers knows, inside a wrapper, without a config."""

    def __init__(self, mode: str = "") -> None:
        super().__init__()
        self.mode = mode
        self.wrapped = nn.Module()
        kind = Flat if mode == "without" else Block
        self.wrapped.first_part = nn.ModuleList([kind(8) for _ in range(2)])
        self.wrapped.second_part = nn.ModuleList([kind(8) for _ in range(2)])
        self.out = nn.Linear(8, 4)

    def forward(self, latents: Tensor, t: Tensor) -> Tensor:
        tokens, shift = latents.repeat(1, 1, 2), t[:, None].float().sin().expand(-1, 8)
        start, k = tokens, 0
        for part in (self.wrapped.first_part, self.wrapped.second_part):
            for block in part:
                if self.mode == "without":
                    shift = block(tokens, shift)
                    continue
                tokens, k = block(tokens, shift), k + 1
                if self.mode == "in place" and k > 2:
                    tokens += 0.1
                if self.mode == "twice" and k == 2:
                    tokens = block(tokens, shift)
                if self.mode == "between" and k == 2:
                    shift = shift + tokens.mean((1, 2))[:, None]
        tokens = tokens + shift[:, None]
        return self.out(tokens + start if self.mode == "skips to the end" else tokens)


@pytest.mark.parametrize("mode", ["", "in place", "skips to the end", "between"])
@torch.no_grad()
def test_a_network_of_an_unknown_class(mode: str) -> None:
    torch.manual_seed(0)
    net, x, t = Stranger(mode), noise(2, 6, 4), torch.tensor([3.0, 3.0])
    split: Any = split_network(net)
    for first in (1, 2, 3):
        for _ in range(2):
            features, raw = split.evaluate_blocks(first, split.inputs(x, t, {}))
        assert torch.equal(raw, net(x, t))
        for _ in range(2):  # what is cached stays as it was
            assert torch.equal(split.decode_blocks(first, features, split.inputs(x, t, {})), net(x, t))


@torch.no_grad()
def test_structures_that_cannot_be_split_are_refused() -> None:
    x, t = noise(2, 6, 4), torch.tensor([3.0, 3.0])
    torch.manual_seed(0)
    for mode, first, message in [
        ("twice", 2, "it runs wrapped.first_part.1 more than once per evaluation"),
        ("without", 1, "0 of its 4 blocks ran and return what has the shape of an input"),
    ]:
        net: Any = Stranger(mode)
        split = SplitBlocks(net)
        with pytest.raises(BadInput, match=message):
            split.evaluate_blocks(first, split.inputs(x, t, {}))
        assert torch.equal(split(x, t), net(x, t))  # and the network is as it was
    with pytest.raises(
        BadInput, match=r"read from Conv2d: its forward takes \(input\), not a sample and then a timestep"
    ):
        read_structure(nn.Conv2d(1, 1, 1))
    net = Stranger()
    net.wrapped = nn.Linear(2, 2)
    with pytest.raises(BadInput, match="no split points can be read from Stranger: it has neither conv_in"):
        split_network(net)


@torch.no_grad()
def test_a_subclass_runs_its_own_forward() -> None:
    """hasten calls the parts of `UNet2DConditionModel`; of a subclass with another forward that would drop its changes."""
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel

    class Louder(UNet2DConditionModel):
        def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **more: Any) -> Any:
            return super().forward(2 * sample, timestep, encoder_hidden_states, **more)

    class Renamed(UNet2DConditionModel):
        pass

    class UNet2DModel(SD3Transformer2DModel):  # a name that hasten knows, of something else
        pass

    net = tiny.unet2d_condition()
    x, time, text = noise(2, 4, 8, 8), torch.tensor([5.0, 5.0]), noise(2, 5, 16)
    assert type(split_network(Renamed.from_config(net.config))).__name__ == "SplitShallowConditionalUNet"
    assert type(split_network(UNet2DModel.from_config(tiny.sd3_transformer().config))).__name__ == "SplitJointDiT"
    louder: Any = Louder.from_config(net.config).eval()
    louder.load_state_dict(net.state_dict())
    split: Any = split_network(louder)
    assert isinstance(split, SplitBlocks)
    cond = {"encoder_hidden_states": text}
    features, raw = split.evaluate_blocks(None, split.inputs(x, time, cond))
    theirs = louder(x, time, text).sample
    assert torch.equal(raw, theirs) and not torch.equal(theirs, net(x, time, text).sample)
    assert torch.equal(split.decode_blocks(None, features, split.inputs(0 * x, time, cond)), theirs)


@pytest.mark.parametrize("freeu", [False, True])
@torch.no_grad()
def test_free_u_changes_features_in_place(freeu: bool) -> None:
    net, x, cond = block_nets.motion_unet()
    if freeu:
        net.enable_freeu(0.9, 0.2, 1.2, 1.4)
    split, time = SplitBlocks(net), torch.full((2,), 7.0)
    theirs = net(x, time, **cond).sample
    features, _ = split.evaluate_blocks(None, split.inputs(x, time, cond))
    for _ in range(3):
        assert torch.equal(split.decode_blocks(None, features, split.inputs(x, time, cond)), theirs)
        features, raw = split.evaluate_blocks(None, split.inputs(x, time, cond))
        assert torch.equal(raw, theirs)


@torch.no_grad()
def test_unets_of_pixels() -> None:
    """DeepFloyd's, with its own blocks, a learned variance, and in its second stage the time of the first's noise."""
    from hasten.adapters.diffusers.unets import SplitConditionalUNet

    blocks = {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "encoder_hid_dim": 12,
        "encoder_hid_dim_type": "text_proj",
        "cross_attention_dim": 16,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
    }
    text, time = noise(2, 5, 12), torch.tensor([700.0, 700.0])
    for more, label in [({"in_channels": 3}, None), ({"in_channels": 6, "class_embed_type": "timestep"}, 250)]:
        net = tiny.unet2d_condition(**blocks, **more, out_channels=6)
        x, labels = noise(2, net.config.in_channels, 8, 8), None if label is None else torch.tensor([label, label])
        theirs = net(x, time, encoder_hidden_states=text, class_labels=labels).sample
        split: Any = split_network(net, with_variance=True)
        assert isinstance(split, SplitConditionalUNet) and theirs.shape[1] == 6
        emb = split.embed(time, text=text, **({} if labels is None else {"label": labels}))
        assert torch.equal(split.decode(*split.encode(x, emb), emb), theirs)
        by_blocks, cond = SplitBlocks(net), {"encoder_hidden_states": text}
        cond |= {} if labels is None else {"class_labels": labels}
        features, _ = by_blocks.evaluate_blocks(None, by_blocks.inputs(x, time, cond))
        assert torch.equal(by_blocks.decode_blocks(None, features, by_blocks.inputs(0 * x, time, cond)), theirs)
