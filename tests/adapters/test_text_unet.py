"""`MobileUNet2DConditionModel`: a `TextUNet` in a pipeline of diffusers, saved, loaded, accelerated, distilled."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.accelerators._patches.attention import TextVersion
from hasten.accelerators._patches.exchange import Exchange
from hasten.accelerators._patches.swap import Patched
from hasten.adapters.diffusers.wrap import split_network
from hasten.distributed.groups import ProcessGroup
from hasten.errors import BadInput
from hasten.nets.lora import target_layers
from hasten.nets.text_unet import TextUNet, mobile
from hasten.train.data import Data

from . import tiny

STEPS = 12


def network(**changes: Any) -> Any:
    """A tiny one for the pipelines of `tiny`."""
    make = lambda: mobile((16, 32), 4, cross_attention_dim=16, norm_num_groups=8, **changes)  # noqa: E731
    return hasten.MobileUNet2DConditionModel.from_text_unet(tiny.seeded(make), 8)


def pipeline(**more: Any) -> Any:
    return tiny.sd_pipeline(unet=network(), **more)


def images(pipe: Any, steps: int = 3, **more: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=steps, generator=generator, output_type="pt", **more).images


def test_it_has_the_weights_and_the_output_of_the_network() -> None:
    unet = network()
    net = unet.text_unet()
    assert type(net) is TextUNet and net.conv_in.weight is unet.conv_in.weight
    assert list(net.state_dict()) == list(unet.state_dict())
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    expected = net(x, torch.full((2,), 7.0), text)
    for time in (7, 7.0, torch.tensor(7), torch.tensor([7, 7])):
        assert torch.equal(unet(x, time, text).sample, expected)
    assert torch.equal(unet(x, 7, encoder_hidden_states=text, return_dict=False)[0], expected)
    assert unet.config.sample_size == 8 and unet.config.out_channels == 4


def test_its_default_is_the_network_of_stable_diffusion_1() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        ours, theirs = hasten.MobileUNet2DConditionModel(64), UNet2DConditionModel(64, cross_attention_dim=768)
    shapes = [{key: value.shape for key, value in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1] and sum(p.numel() for p in ours.parameters()) == 859_520_964


def test_a_pipeline_with_it_is_saved_and_loads_in_diffusers_and_in_hasten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "p")
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    assert index["unet"] == ["hasten", "MobileUNet2DConditionModel"]
    again = tiny.quiet(StableDiffusionPipeline.from_pretrained(tmp_path / "p"))
    assert torch.equal(images(again), images(pipe))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "diffusers.pipelines.pipeline_utils"):
        model = hasten.load(tmp_path / "p")
    assert "Expected types" not in caplog.text
    x = model.sample(2, "a cat", steps=2)
    assert model.card["network"] == "MobileUNet2DConditionModel"
    model.save(tmp_path / "again")
    assert torch.equal(hasten.load(tmp_path / "again").sample(2, "a cat", steps=2), x)


def test_the_split_network_is_the_network() -> None:
    unet = network()
    net: Any = split_network(unet)
    x, time, text = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0]), torch.randn(2, 5, 16)
    expected, emb = unet(x, time, text).sample, net.embed(time, text=text)
    assert torch.equal(net(x, time, text=text), expected)
    first = net.shallow_encode(x, emb)
    assert torch.equal(net.shallow_decode(first, net.deep(first, emb), emb), expected)
    assert net.null_conditions and net.channels == 4
    with pytest.raises(BadInput, match="takes no condition 'label'"):
        net.embed(time, text=text, label=time.long())
    with pytest.raises(BadInput, match="needs text="):
        net.embed(time)
    scaled: Any = net.with_guidance()
    condition = {"text": text, "guidance": torch.tensor([2.0, 3.0])}
    assert torch.equal(scaled(x, time, **condition), expected)
    torch.nn.init.normal_(scaled.net.time_embedding.cond_proj.weight, std=0.1)
    two = scaled(x, time, **{**condition, "guidance": torch.full((2,), 2.0)})
    assert not torch.allclose(scaled(x, time, **condition)[1], two[1], atol=1e-4)
    assert torch.allclose(scaled.fixed(2.0)(x, time, text=text), two, atol=1e-5)


@pytest.mark.parametrize("spec", ["encoder_propagation:keys=uniform,every=3", "deep_cache:every=3"])
def test_accelerators_skip_its_middle(spec: str) -> None:
    pipe = pipeline()
    fast = hasten.accelerate(pipe, [spec], steps=STEPS, prompts=["a cat"])
    count = [0]
    fast.unet.mid_block.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    out = images(fast, STEPS)
    assert type(fast.unet).__name__ == "MobileUNet2DConditionModel" and 0 < count[0] < STEPS
    assert 1e-4 < float((out - images(pipe, STEPS)).abs().max()) < 0.5
    plain = hasten.accelerate(pipe, [], steps=STEPS)
    assert torch.equal(images(plain), images(pipe))


def test_it_is_quantized() -> None:
    model = hasten.load(pipeline())
    quantize = "quantize:images=1,steps=2,groups=1,ranges=minmax"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "StableDiffusionPipeline is calibrated with the empty prompt")
        out = model.sample(2, "a cat", steps=2, accelerators=[quantize])
    plain = model.sample(2, "a cat", steps=2)
    assert 0 < float((out - plain).norm() / plain.norm()) < 0.2


@pytest.mark.parametrize("method", ["diffusion_gan:steps=1", "guided:steps=(1,),guidance=(1,4)"])
def test_it_is_distilled_into_a_pipeline_of_diffusers(tmp_path: Path, method: str, monkeypatch: Any) -> None:
    """A guidance scale becomes its input as that of a `UNet2DConditionModel` does."""
    from diffusers import DiffusionPipeline

    from hasten.workflows import students

    monkeypatch.setattr(students, "PREVIEW_PROMPTS", 1)
    pixels = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = Data.of(pixels, captions=("a cat", "a dog", "the red cat", "blue dog"))
    options: Any = {"steps": 4, "batch_size": 2, "precision": "fp32", "show": False, "guidance_scale": 3.0}
    teacher = hasten.load(pipeline(scheduler=tiny.scheduler(prediction_type="v_prediction")))
    hasten.distill_model(teacher, tmp_path, method, data, **options)
    student = hasten.load(tmp_path)
    assert student.denoiser.net_takes_guidance == method.startswith("guided")
    scale = 2.5 if method.startswith("guided") else 3.0
    pipe = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(pipe.unet) is hasten.MobileUNet2DConditionModel
    latents = hasten.Noise(range(1), student.shape).initial()
    theirs = pipe(
        "a cat",
        latents=latents,
        num_inference_steps=1,
        guidance_scale=scale if method.startswith("guided") else 1.0,
        output_type="pt",
    ).images
    ours = student.sample(1, "a cat", guidance_scale=scale)
    torch.testing.assert_close(2 * theirs - 1, ours, rtol=0, atol=2e-3)


def test_lora_layers_load_into_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from diffusers.utils import convert_state_dict_to_diffusers

    pipe, other = pipeline(), pipeline()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_kv"], init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(tmp_path, unet_lora_layers=convert_state_dict_to_diffusers(layers))
    before = images(other)
    other.load_lora_weights(tmp_path)
    assert not torch.allclose(images(other), before, atol=1e-4)
    assert torch.allclose(images(other), images(pipe), atol=1e-5)


def test_a_lora_of_hasten_adapts_its_attention_but_no_depthwise_convolution() -> None:
    unet = network()
    names = target_layers(unet)
    assert any(name.endswith("attn1.to_kv") for name in names) and any(name.endswith("attn2.to_v") for name in names)
    every = target_layers(unet, "all")
    grouped = {name for name, layer in unet.named_modules() if getattr(layer, "groups", 1) > 1}
    assert grouped and not grouped & set(every)


def test_gradient_checkpointing_is_switched_as_in_diffusers() -> None:
    unet = network().train().requires_grad_(True)
    unet.enable_gradient_checkpointing()
    assert unet.is_gradient_checkpointing and unet.mid_block.gradient_checkpointing
    unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 16)).sample.mean().backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0
    unet.disable_gradient_checkpointing()
    assert not unet.is_gradient_checkpointing


def test_other_conditions_and_tables_are_refused_in_one_line() -> None:
    unet = network()
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    for bad in (
        {"class_labels": torch.zeros(1)},
        {"added_cond_kwargs": {"text_embeds": text}},
        {"mid_block_additional_residual": x},
        {"cross_attention_kwargs": {"scale": 0.5}},
        {"cross_attention_kwargs": {"gligen": 1}},
    ):
        with pytest.raises(BadInput, match=r"takes no|cross_attention_kwargs") as error:
            unet(x, 3, text, **bad)
        assert "\n" not in str(error.value)
    assert torch.equal(unet(x, 3, text, cross_attention_kwargs={"scale": 1.0}).sample, unet(x, 3, text).sample)
    with pytest.raises(BadInput, match="levels= and middle="):
        hasten.MobileUNet2DConditionModel(8, levels=[{"width": 32, "heads": 4}])
    with pytest.raises(BadInput, match="patch_parallel does not know MobileUNet2DConditionModel"):
        Patched(split_network(unet), Exchange(ProcessGroup(), "sync", "full", 1, "same", 60, 0), TextVersion())
