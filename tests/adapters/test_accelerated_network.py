"""An accelerated network behaves as the network: changes, wrappers and requests work as before."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.accelerators.compile import Compile
from hasten.adapters.diffusers import accelerate_pipeline
from hasten.errors import BadInput

from . import tiny

STEPS = 10
CACHE, QUANTIZE = "deep_cache:every=2", "quantize:images=2,steps=4,ranges=minmax"
CALL: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent", "prompt": "a cat"}


def start(n: int = 1) -> Tensor:
    return hasten.Noise(range(7, 7 + n), (4, 8, 8)).initial()


def sample_latents(pipe: Any, **more: Any) -> Tensor:
    return torch.as_tensor(pipe(**{**CALL, "latents": start(), **more}).images)


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def sd(**more: Any) -> Any:
    table = tiny.scheduler(timestep_spacing="trailing", set_alpha_to_one=True, steps_offset=0)
    return tiny.sd_pipeline(**{"scheduler": table, **more})


class LowRank(nn.Module):
    """A LoRA around a linear layer, as peft's: it looks at the weight of the layer inside, which it may swallow."""

    def __init__(self, base_layer: Any, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, base_layer.out_features, bias=False)
        self.lora_A.weight.data = torch.randn(4, base_layer.in_features, generator=draw) * 0.3
        self.lora_B.weight.data = torch.randn(base_layer.out_features, 4, generator=draw) * 0.3

    def forward(self, x: Tensor) -> Tensor:
        inside = x.to(self.base_layer.weight.dtype)
        return self.base_layer(x) + self.lora_B(self.lora_A(inside)).to(x.dtype)

    def fuse(self) -> None:
        self.base_layer.weight.data += self.lora_B.weight @ self.lora_A.weight


def adapted(net: nn.Module) -> list[LowRank]:
    """Put a LoRA around the attention's linear layers, in place."""
    lora_layers = []
    for module in list(net.modules()):
        for name in ("to_q", "to_k", "to_v"):
            if isinstance(layer := getattr(module, name, None), nn.Linear):
                lora_layers.append(LowRank(layer, len(lora_layers)))
                setattr(module, name, lora_layers[-1])
    return lora_layers


def bare_of(net: nn.Module) -> None:
    """Take the LoRAs away again."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LowRank):
                setattr(module, name, child.base_layer)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """No warning of hasten goes unseen."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(left out|not applied),")
        warnings.filterwarnings("error", message="the forward of this")
        yield


def test_unknown_networks_are_refused_in_a_line() -> None:
    class UNetOfVideo(nn.Module):
        pass

    pipe = copy.copy(sd())
    vars(pipe)["unet"] = UNetOfVideo()
    for accelerator in ("compile:backend=eager", CACHE, QUANTIZE, []):
        with pytest.raises(BadInput, match="UNetOfVideo"):
            accelerate_pipeline(pipe, accelerator)
    with pytest.raises(BadInput, match="UNetOfVideo"):
        hasten.load(pipe)


def test_a_compiled_network_is_unwrapped() -> None:
    pipe = sd()
    plain = sample_latents(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.warns(UserWarning, match="compiled by torch.compile"):
        fast = accelerate_pipeline(pipe, "deep_cache:every=1", steps=STEPS)
    assert torch.equal(sample_latents(fast), plain)
    assert hasten.load(pipe).denoiser.net.net is not pipe.unet


@pytest.mark.parametrize("accelerator", [CACHE, QUANTIZE, "compile:backend=eager", "patch_parallel"])
def test_the_network_stays_of_its_class(accelerator: str) -> None:
    pipe = sd()
    net: Any = accelerate_pipeline(pipe, accelerator, steps=STEPS).unet
    assert isinstance(net, type(pipe.unet)) and type(net).__name__ == type(pipe.unet).__name__
    assert net.state_dict().keys() == pipe.unet.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), pipe.unet.state_dict().values()))
    net.load_state_dict(pipe.unet.state_dict())
    assert net.config == pipe.unet.config and net.dtype == pipe.unet.dtype and net.attn_processors.keys()
    net.mark = 3
    assert net.mark == 3 and not hasattr(pipe.unet, "mark")


@pytest.mark.parametrize("accelerator", [CACHE, QUANTIZE])
def test_the_original_pipeline_is_unchanged(accelerator: str) -> None:
    pipe = sd()
    pipe.unet.train().to(memory_format=torch.channels_last)
    pipe.unet.conv_in.weight.requires_grad_(True)
    before = {name: (p, p.data_ptr(), p.stride(), p.requires_grad, p.dtype) for name, p in pipe.unet.named_parameters()}
    plain = sample_latents(pipe)

    def same() -> None:
        now = {
            name: (p, p.data_ptr(), p.stride(), p.requires_grad, p.dtype) for name, p in pipe.unet.named_parameters()
        }
        assert all(now[name][0] is before[name][0] and now[name][1:] == before[name][1:] for name in before)
        assert all(module.training for module in pipe.unet.modules())

    hasten.load(pipe).sample(1, "a cat", steps=2)
    same()
    fast = accelerate_pipeline(pipe, accelerator, steps=STEPS)
    sample_latents(fast)
    same()
    adapted(fast.unet)
    fast.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    fast.unet.register_forward_pre_hook(lambda net, args: None)
    fast.unet.to(torch.bfloat16)
    same()
    assert {p.dtype for p in fast.unet.parameters()} == {torch.bfloat16}
    assert torch.equal(sample_latents(pipe), plain)


@pytest.mark.parametrize("accelerator", [CACHE, QUANTIZE])
def test_a_lora_loaded_later_takes_effect(accelerator: str) -> None:
    pipe = sd()
    fast = accelerate_pipeline(pipe, accelerator, steps=STEPS)
    plain, before = sample_latents(pipe), sample_latents(fast)
    layers = adapted(fast.unet)
    after = sample_latents(fast)
    adapted(pipe.unet)
    theirs = sample_latents(pipe)
    assert relative_error(theirs, plain) > 0.1 and relative_error(after, before) > 0.1
    expected = sample_latents(accelerate_pipeline(pipe, accelerator, steps=STEPS)) if accelerator == CACHE else theirs
    assert relative_error(after, expected) < (1e-6 if accelerator == CACHE else 0.1)
    bare_of(fast.unet)
    assert torch.equal(sample_latents(fast), before)
    layers[0].fuse()  # the weights of the layer inside are other ones now
    if accelerator == CACHE:
        assert relative_error(sample_latents(fast), before) > 1e-3
    else:
        with pytest.raises(BadInput, match="were changed after quantize"):
            sample_latents(fast)


def test_a_lora_loaded_before_is_not_quantised() -> None:
    pipe = sd()
    plain = sample_latents(pipe)
    adapted(pipe.unet)
    theirs = sample_latents(pipe)
    fast = accelerate_pipeline(pipe, QUANTIZE, steps=STEPS)
    others = {type(layer).__name__ for layer in fast.unet.accelerated_forward.layers.replacements}
    assert others == {"QConv2d", "QLinear", "Conv2d"}
    assert not any(
        name.endswith(("lora_A", "lora_B"))
        for name, m in fast.unet.named_modules()
        if id(m) in fast.unet.accelerated_forward.layers.pairs
    )
    assert relative_error(theirs, plain) > 0.1 and 1e-4 < relative_error(sample_latents(fast), theirs) < 0.1


def test_quantised_layers_run_and_move_with_their_network() -> None:
    pipe = sd()
    fast = accelerate_pipeline(pipe, QUANTIZE, steps=STEPS)
    plain, ours = sample_latents(pipe), sample_latents(fast)
    assert 1e-4 < relative_error(ours, plain) < 0.1 and torch.equal(sample_latents(copy.deepcopy(fast)), ours)
    kinds = {type(module).__name__ for module in fast.unet.modules()}
    assert "QLinear" not in kinds  # outside of a call the network has its own layers
    fast.unet.to(torch.bfloat16)
    fast.text_encoder.to(torch.bfloat16)
    low = sample_latents(fast)
    assert 1e-4 < relative_error(low, ours) < 0.2


@pytest.mark.parametrize("accelerator", [CACHE, QUANTIZE, "encoder_propagation:keys=uniform,every=2"])
def test_freeu_and_processors_take_effect(accelerator: str) -> None:
    """FreeU enabled later gives the images of FreeU enabled before, and cached features are not scaled again."""
    pipe, levels = sd(), {"s1": 0.9, "s2": 0.2, "b1": 1.5, "b2": 1.6}
    fast = accelerate_pipeline(pipe, accelerator, steps=STEPS)
    before = sample_latents(fast)
    fast.enable_freeu(**levels)
    later = sample_latents(fast)
    assert relative_error(later, before) > 1e-2 and torch.equal(sample_latents(fast), later)
    pipe.enable_freeu(**levels)
    if accelerator != QUANTIZE:
        assert torch.equal(sample_latents(accelerate_pipeline(pipe, accelerator, steps=STEPS)), later)
        cached = fast.unet._run._cache[-1][1]
        tensors = [cached] if isinstance(cached, Tensor) else [cached[1]]
        assert all(t._version == 0 for t in tensors), "cached features were modified"
    else:
        assert relative_error(later, sample_latents(pipe)) < 0.2
    fast.disable_freeu()
    assert torch.equal(sample_latents(fast), before)
    fast.fuse_qkv_projections(vae=False)
    fast.unfuse_qkv_projections(vae=False)
    assert torch.equal(sample_latents(fast), before)


def test_compiled_parts_do_not_change_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph is run twice at first: with FreeU, which works in place, the first image was another one."""
    pipe = sd()
    monkeypatch.setattr(Compile, "_compiler", lambda self: lambda plain: plain)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    fast = accelerate_pipeline(pipe, "compile:backend=eager", steps=2)
    assert (
        relative_error(sample_latents(fast, num_inference_steps=2), sample_latents(pipe, num_inference_steps=2)) < 1e-5
    )


def test_compiled_networks_see_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compile, "_compiler", lambda self: lambda plain: plain)
    pipe = sd()
    fast = accelerate_pipeline(pipe, "compile:backend=eager", steps=2)
    sample_latents(fast, num_inference_steps=2)
    first = fast.unet.accelerated_forward.base
    sample_latents(fast, num_inference_steps=1)
    assert fast.unet.accelerated_forward.base is first
    for p in fast.unet.up_blocks.parameters():
        p.data *= 0.9
    fast.scheduler.set_timesteps(1)
    fast.unet(start(), fast.scheduler.timesteps[0], torch.zeros(1, 5, 16))
    assert fast.unet.accelerated_forward.base is not first  # weights may have been frozen into it


def ip_adapter(net: Any) -> dict[str, Any]:
    """The weights of a tiny IP-Adapter for the tiny U-Net."""
    draw = torch.Generator().manual_seed(5)
    layers: dict[str, Tensor] = {}
    for k, name in enumerate(name for name in net.attn_processors if "attn2" in name):
        hidden = 16 if "mid" not in name else 32
        for key in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * k + 1}.{key}.weight"] = torch.randn(hidden, 16, generator=draw) * 0.3
    image = {
        "proj.weight": torch.randn(4 * 16, 8, generator=draw),
        "proj.bias": torch.zeros(64),
        "norm.weight": torch.ones(16),
        "norm.bias": torch.zeros(16),
    }
    return {"image_proj": image, "ip_adapter": layers}


@pytest.mark.parametrize("accelerator", ["deep_cache:every=1", QUANTIZE])
def test_an_ip_adapter_before_and_after(accelerator: str) -> None:
    embeds = [torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(6))]
    pipe = sd()
    fast, plain = accelerate_pipeline(pipe, accelerator, steps=STEPS), sample_latents(pipe)
    weights = ip_adapter(pipe.unet)
    fast.unet._load_ip_adapter_weights([weights])
    later = sample_latents(fast, ip_adapter_image_embeds=embeds)
    assert torch.equal(sample_latents(pipe), plain)  # the original has none
    pipe.unet._load_ip_adapter_weights([weights])
    theirs = sample_latents(pipe, ip_adapter_image_embeds=embeds)
    assert relative_error(theirs, plain) > 1e-3
    fraction = 1e-6 if accelerator != QUANTIZE else 0.6
    assert relative_error(later, theirs) < fraction * relative_error(theirs, plain)
    for one in (fast, pipe):
        one.set_ip_adapter_scale(0.2)
    less = sample_latents(pipe, ip_adapter_image_embeds=embeds)
    assert relative_error(less, theirs) > 1e-3
    assert relative_error(sample_latents(fast, ip_adapter_image_embeds=embeds), less) < fraction * max(
        relative_error(less, theirs), relative_error(less, plain)
    )
    if accelerator != QUANTIZE:
        again = accelerate_pipeline(pipe, accelerator, steps=STEPS)
        assert torch.equal(sample_latents(again, ip_adapter_image_embeds=embeds), less)
