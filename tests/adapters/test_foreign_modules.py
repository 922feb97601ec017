"""Pipelines whose modules are offloaded, compiled, or quantised by another library: the same result, or one clear line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hasten
from hasten.adapters.diffusers import accelerate_pipeline
from hasten.adapters.diffusers.network import compiled_parts
from hasten.errors import BadInput
from hasten.nets.prequantized import plain_tensors, quantized_by
from hasten.storage.lora_files import LoRAFile, write_lora
from hasten.storage.provenance import model_hash
from hasten.workflows.distill import distill_model
from hasten.workflows.train_pipeline import check_base_pipeline

from ..pretend import Pretended, put, taken
from .test_accelerated_network import CACHE, relative_error, sample_latents, sd, start

STEPS = 9
CALL: dict[str, Any] = {"num_inference_steps": STEPS}


def factors(net: nn.Module) -> dict[str, Any]:
    from .test_lora import factors_for

    return factors_for(net)


# ---- quantised layers of other libraries ----


class Packed(nn.Linear):
    """A linear layer with its weights in 8 bits and a scale a row, as such a library has."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.bias = layer.bias
        self.scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        packed = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = self.parameter(packed)

    @staticmethod
    def parameter(packed: Tensor) -> nn.Parameter:
        return nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Linear4bit(Packed):
    __module__ = "bitsandbytes.nn.modules"


class GGUFParameter(nn.Parameter):
    __module__ = "diffusers.quantizers.gguf.utils"


class GGUFLinear(Packed):
    __module__ = "diffusers.quantizers.gguf.utils"

    @staticmethod
    def parameter(packed: Tensor) -> nn.Parameter:
        return GGUFParameter(packed, requires_grad=False)


class QuantizedTensor(Tensor):
    """Weights that say they are float32, as torchao's: few operations are defined."""

    __module__ = "torchao.dtypes.affine_quantized_tensor"
    packed: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, packed: Tensor, scale: Tensor) -> QuantizedTensor:
        made = torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.packed, made.scale = packed, scale
        return made

    def __tensor_flatten__(self) -> Any:
        return ["packed", "scale"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            weight = args[1].packed * args[1].scale
            return F.linear(args[0], weight, *args[2:])
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in (torch.ops.aten.detach, torch.ops.aten.alias):
            return cls(args[0].packed, args[0].scale)
        if func._overloadpacket is torch.ops.aten._to_copy and not (kwargs or {}).get("dtype"):
            return cls(args[0].packed.clone(), args[0].scale.clone())
        raise NotImplementedError(f"{func} of torchao's tensors")


def torchao_layer(layer: nn.Linear) -> nn.Linear:
    packed = Packed(layer)
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    made.bias, made.weight = layer.bias, nn.Parameter(QuantizedTensor(packed.weight, packed.scale), requires_grad=False)
    return made


KINDS: dict[str, Any] = {"bitsandbytes": Linear4bit, "GGUF": GGUFLinear, "torchao": torchao_layer}


def quantised(kind: str) -> Any:
    """A pipeline whose attention has such layers."""
    pipe = sd()
    for module in list(pipe.unet.modules()):
        for name in ("to_q", "to_k", "to_v"):
            if isinstance(layer := getattr(module, name, None), nn.Linear):
                setattr(module, name, KINDS[kind](layer))
    return pipe


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_pipelines_are_sampled_and_cached(kind: str) -> None:
    pipe = quantised(kind)
    assert quantized_by(pipe.unet) == kind and quantized_by(sd().unet) is None
    expected = sample_latents(pipe, **CALL)
    assert 0 < relative_error(expected, sample_latents(sd(), **CALL)) < 0.3
    fast = accelerate_pipeline(pipe, "deep_cache:every=1", steps=STEPS)
    assert torch.equal(sample_latents(fast, **CALL), expected)
    assert sample_latents(accelerate_pipeline(pipe, CACHE, steps=STEPS), **CALL).isfinite().all()
    model = hasten.load(pipe)
    x, text = start(), torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = model.denoiser.raw(x, 0.5, text=text)
        time = model.denoiser.time_input(torch.tensor([0.5], dtype=torch.float64)).float()
        torch.testing.assert_close(raw, pipe.unet(x, time, text).sample)
    other = quantised(kind)
    assert model_hash(model) == model_hash(hasten.load(other))
    layer = next(module for module in other.unet.modules() if getattr(module, "to_q", None) is not None).to_q
    next(plain_tensors(layer.weight)).mul_(-1)
    assert model_hash(model) != model_hash(hasten.load(other))
    if kind == "bitsandbytes":
        with pytest.raises(BadInput, match="bitsandbytes quantised stays on cpu"):
            model.to("meta")


@pytest.mark.parametrize("kind", KINDS)
def test_what_needs_the_original_weights_is_refused(kind: str, tmp_path: Path) -> None:
    pipe = quantised(kind)
    model = hasten.load(pipe)
    file = write_lora(LoRAFile({"unet": factors(sd().unet)}), tmp_path / "a.safetensors", "diffusers")
    refused: dict[str, Any] = {
        "quantize": lambda: accelerate_pipeline(pipe, "quantize", steps=STEPS),
        "torchao": lambda: accelerate_pipeline(pipe, "torchao", steps=STEPS),
        "load_lora_weights": lambda: model.with_lora(file),
        "cannot be trained": lambda: distill_model(model, tmp_path / "s", "progressive", ["a cat"], steps=1),
        "be trained": lambda: check_base_pipeline(model),
    }
    for words, act in refused.items():
        with pytest.raises(BadInput, match=words) as error:
            act()
        assert "quantised" in str(error.value) and "\n" not in str(error.value)
        if "be trained" != words:
            assert kind in str(error.value)


# ---- modules that torch compiles ----


def compile_network(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def compile_in_place(pipe: Any) -> None:
    pipe.unet.compile(backend="eager")


def compile_blocks(pipe: Any) -> None:
    for block in pipe.unet.down_blocks:
        block.compile(backend="eager")


@pytest.mark.parametrize("compiled", [compile_network, compile_in_place, compile_blocks])
def test_copies_of_compiled_networks_run_their_own_weights(compiled: Any, tmp_path: Path) -> None:
    pipe, plain = sd(), sd()
    file = write_lora(LoRAFile({"unet": factors(plain.unet)}), tmp_path / "a.safetensors", "diffusers")
    compiled(pipe)
    with pytest.warns(UserWarning, match="compiled by torch.compile.*runs uncompiled"):
        model = hasten.load(pipe)
    how: dict[str, Any] = {"steps": 2, "guidance_scale": 3.0}
    assert torch.equal(model.sample(1, "a cat", **how), hasten.load(plain).sample(1, "a cat", **how))
    changed = model.with_lora(file).sample(1, "a cat", **how)  # the compiled code has the weights of the original
    assert torch.equal(changed, hasten.load(plain).with_lora(file).sample(1, "a cat", **how))
    with pytest.warns(UserWarning, match="compiled by torch.compile"):
        fast = accelerate_pipeline(pipe, CACHE, steps=STEPS)
    expected = sample_latents(accelerate_pipeline(plain, CACHE, steps=STEPS), **CALL)
    assert torch.equal(sample_latents(fast, **CALL), expected)
    assert compiled_parts(pipe.unet) and not compiled_parts(fast.unet), "the original stays compiled"


# ---- offloading ----


def on_gpu_when_called() -> Any:
    """A pipeline with prompt embeddings in place of a text encoder, offloaded to a pretended GPU."""
    pipe = sd(text_encoder=None, tokenizer=None)
    pipe.enable_model_cpu_offload(device="cuda")
    return pipe


def embedded(device: str) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(5)
    text, none = (torch.randn(1, 5, 16, generator=draw).to(device) for _ in range(2))
    inputs = {"prompt": None, "prompt_embeds": text, "negative_prompt_embeds": none, "latents": start().to(device)}
    return {**CALL, **inputs}


def test_networks_that_move_to_the_gpu_when_they_run() -> None:
    pytest.importorskip("accelerate")
    plain = sd(text_encoder=None, tokenizer=None)
    expected = sample_latents(accelerate_pipeline(plain, CACHE, steps=STEPS), **embedded("cpu"))
    planned = copy.copy(plain)
    planned.scheduler = hasten.as_scheduler("unipc", like=plain)
    unipc = sample_latents(planned, **embedded("cpu"))
    with Pretended() as device:
        pipe = on_gpu_when_called()
        fast = accelerate_pipeline(pipe, CACHE, steps=STEPS)
        made = sample_latents(fast, **embedded("cuda"))
        assert device.count("upload", "") > 0, "nothing moved"
        with pytest.raises(BadInput, match=r"enable_model_cpu_offload.*hasten.load\(pipe, device='cuda"):
            hasten.load(pipe)
        pipe.scheduler = hasten.as_scheduler("unipc", like=pipe)
        made_unipc = sample_latents(pipe, **embedded("cuda"))
    torch.testing.assert_close(taken(made), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(taken(made_unipc), unipc, atol=1e-4, rtol=1e-4)


def test_sequential_offloading_takes_a_scheduler_and_is_refused_elsewhere() -> None:
    pytest.importorskip("accelerate")
    pipe = sd(text_encoder=None, tokenizer=None)
    pipe.enable_sequential_cpu_offload(device="cpu")  # accelerate itself cannot run this on a CPU
    scheduler = hasten.as_scheduler("unipc", like=pipe)
    scheduler.set_timesteps(STEPS)
    assert len(scheduler.timesteps) == STEPS
    for act in (lambda: hasten.load(pipe), lambda: accelerate_pipeline(pipe, CACHE, steps=STEPS)):
        with pytest.raises(BadInput, match="sequential CPU offload") as error:
            act()
        assert "\n" not in str(error.value)


def test_a_model_on_a_device_leaves_an_offloaded_pipeline_in_use() -> None:
    pytest.importorskip("accelerate")
    pipe = sd()
    pipe.enable_model_cpu_offload(device="cpu")
    expected = sample_latents(sd(), **CALL)
    how: dict[str, Any] = {"steps": 2, "guidance_scale": 3.0}
    model = hasten.load(pipe, device="cpu")
    assert torch.equal(model.sample(1, "a cat", **how), hasten.load(sd()).sample(1, "a cat", **how))
    assert torch.equal(sample_latents(pipe, **CALL), expected)


# ---- number formats ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pipelines(dtype: torch.dtype, tmp_path: Path) -> None:
    pipe = sd().to(dtype)
    how: dict[str, Any] = {"steps": 2, "guidance_scale": 3.0}
    exact = hasten.load(sd()).sample(1, "a cat", **how)
    model = hasten.load(pipe)
    assert relative_error(model.sample(1, "a cat", **how), exact) < 0.1
    file = write_lora(LoRAFile({"unet": factors(sd().unet)}), tmp_path / "a.safetensors", "diffusers")
    merged = model.with_lora(file)
    assert {p.dtype for p in merged.denoiser.parameters()} == {dtype}
    assert (
        relative_error(merged.sample(1, "a cat", **how), hasten.load(sd()).with_lora(file).sample(1, "a cat", **how))
        < 0.1
    )
    with Pretended() as device:
        net = put(copy.deepcopy(model.denoiser))
        x, text = start().to("cuda"), torch.randn(1, 5, 16).to("cuda")
        net(x, 0.5, text=text)
        device.clear()
        assert net(x, 0.5, text=text).dtype == torch.float32 and not device.events, device.lines()
