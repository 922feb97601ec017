"""LoRA files of diffusers, peft and kohya: read, written, merged, and loaded by stock pipelines."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.errors import BadInput, Notice
from hasten.model.lora import lora_file, resolve_layers
from hasten.nets.lora import LowRank, target_layers
from hasten.storage.lora_files import LoRAFile, base_hash, read_lora, write_lora
from hasten.storage.lora_names import OUTSIDE, dotted, from_original, kohya_key

from .tiny import sd_pipeline, sdxl_pipeline

pytest.importorskip("peft")

SCALE = 0.2


def factors_for(net: Any, targets: str = "attention", rank: int = 3, alpha: float = 2.0) -> dict[str, LowRank]:
    """Random factors for layers of a network."""
    draw = torch.Generator().manual_seed(0)
    result = {}
    for name, layer in target_layers(net, targets).items():
        shape = layer.get_parameter("weight").shape
        down = SCALE * torch.randn(rank, *shape[1:], generator=draw)
        up = SCALE * torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=draw)
        result[name] = LowRank(down, up, alpha)
    return result


def evaluate(unet: Any, xl: bool = False) -> Tensor:
    """An output of a U-Net of diffusers."""
    draw = torch.Generator().manual_seed(3)
    x, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 32 if xl else 16, generator=draw)
    added = {"text_embeds": torch.randn(2, 16, generator=draw), "time_ids": torch.ones(2, 6)} if xl else None
    with torch.no_grad():
        return unet(x, torch.tensor([300, 20]), text, added_cond_kwargs=added).sample


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_stock_pipelines_load_ours(tmp_path: Path, layout: str, targets: str, xl: bool) -> None:
    pipe = sdxl_pipeline() if xl else sd_pipeline()
    model = hasten.load(pipe)
    lora = LoRAFile({"unet": factors_for(pipe.unet, targets)})
    file = write_lora(lora, tmp_path / "lora.safetensors", layout)
    merged = model.with_lora(file)
    ours, plain = evaluate(merged.denoiser.net.net, xl), evaluate(pipe.unet, xl)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    theirs = evaluate(pipe.unet, xl)
    assert (ours - plain).abs().max() > 1e-2
    assert (ours - theirs).abs().max() < 1e-5
    assert (evaluate(model.denoiser.net.net, xl) - plain).abs().max() == 0  # the model itself stays


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_ours_load_those_of_peft(tmp_path: Path, xl: bool) -> None:
    """A LoRA trained with peft and saved as diffusers' scripts do, with alpha in the metadata, text encoder included."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = sdxl_pipeline() if xl else sd_pipeline()
    model = hasten.load(copy.deepcopy(pipe))
    unet = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv1"], rank_pattern={"conv1": 2})
    text = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], use_rslora=True)
    torch.manual_seed(0)
    saved: dict[str, Any] = {}
    for part, config, name in ((pipe.unet, unet, "unet"), (pipe.text_encoder, text, "text_encoder")):
        part.add_adapter(config)
        for key, p in part.named_parameters():
            p.data += 0.1 * torch.randn(p.shape) if "lora_" in key else 0
        state = get_peft_model_state_dict(part)
        saved[f"{name}_lora_layers"] = state if name == "unet" else convert_state_dict_to_diffusers(state)
        saved[f"{name}_lora_adapter_metadata"] = config.to_dict()
    type(pipe).save_lora_weights(str(tmp_path), **saved)
    merged = model.with_lora(tmp_path)
    assert (evaluate(merged.denoiser.net.net, xl) - evaluate(pipe.unet, xl)).abs().max() < 1e-5
    ours, theirs = (
        merged.conditions(1, "a cat"),
        hasten.adapters.diffusers.conditions.Prompts(pipe, (8, 8)).cond(1, "a cat"),
    )
    assert (ours["text"] - theirs["text"]).abs().max() < 1e-5
    assert (ours["text"] - model.conditions(1, "a cat")["text"]).abs().max() > 1e-3


def test_both_formats_hold_the_same(tmp_path: Path) -> None:
    pipe = sd_pipeline()
    text = {name: one for name, one in factors_for(pipe.text_encoder, "all").items() if "self_attn" in name}
    lora = LoRAFile({"unet": factors_for(pipe.unet, "all"), "text_encoder": text})
    for layout in ("diffusers", "kohya"):
        again = read_lora(write_lora(lora, tmp_path / f"{layout}.safetensors", layout))
        assert again.names == layout and again.ranks == [3]
        for component, layers in lora.components.items():
            assert again.components[component].keys() == layers.keys()
            for name, one in layers.items():
                assert torch.allclose(again.components[component][name].delta(), one.delta(), atol=1e-6)


def test_layers_of_different_ranks(tmp_path: Path) -> None:
    pipe = sd_pipeline()
    model, factors = hasten.load(pipe), factors_for(pipe.unet, "attention")
    factors |= factors_for(pipe.unet, "conv", rank=2, alpha=5.0)
    file = write_lora(LoRAFile({"unet": factors}), tmp_path / "x.safetensors")
    ours = evaluate(model.with_lora(file).denoiser.net.net)
    pipe.load_lora_weights(str(file))
    assert (ours - evaluate(pipe.unet)).abs().max() < 1e-5


def test_the_scale(tmp_path: Path) -> None:
    pipe = sd_pipeline()
    model = hasten.load(pipe)
    file = write_lora(LoRAFile({"unet": factors_for(pipe.unet)}), tmp_path / "x.safetensors")
    ours = evaluate(model.with_lora(f"{file}:0.4").denoiser.net.net)
    twice = evaluate(model.with_lora([f"{file}:0.1", f"{file}:0.3"]).denoiser.net.net)
    pipe.load_lora_weights(str(file))
    pipe.set_adapters(pipe.get_active_adapters(), [0.4])
    assert (ours - evaluate(pipe.unet)).abs().max() < 1e-5
    assert (ours - twice).abs().max() < 1e-5


def test_a_half_precision_pipeline_and_a_saved_merge(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = sd_pipeline()
    pipe.unet.half()
    model = hasten.load(pipe)
    file = write_lora(LoRAFile({"unet": factors_for(pipe.unet)}), tmp_path / "x.safetensors", half=True)
    merged = model.with_lora(file)
    merged.save(tmp_path / "merged")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "merged", torch_dtype=torch.float16)
    again = hasten.load(tmp_path / "merged")
    pipe.unet.float()
    pipe.load_lora_weights(str(file))
    expected = evaluate(pipe.unet)
    for net in (stock.unet, again.denoiser.net.net):
        assert (evaluate(net.float()) - expected).abs().max() < 5e-3
    assert again.card["lora"][0]["file"] == "x.safetensors"


def test_names() -> None:
    """Of every layer of a U-Net, and of the original code's blocks in SDXL."""
    unet = sdxl_pipeline().unet
    for name in target_layers(unet, "all"):
        key = kohya_key("unet", name).removeprefix("lora_unet_")
        assert dotted(OUTSIDE.get(key, key)) == name
    for original, ours in {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "input_blocks_8_1_proj_in": "down_blocks_2_attentions_1_proj_in",
        "input_blocks_3_0_op": "down_blocks_0_downsamplers_0_conv",
        "input_blocks_1_0_in_layers_2": "down_blocks_0_resnets_0_conv1",
        "middle_block_1_proj_out": "mid_block_attentions_0_proj_out",
        "middle_block_2_emb_layers_1": "mid_block_resnets_1_time_emb_proj",
        "output_blocks_0_1_proj_in": "up_blocks_0_attentions_0_proj_in",
        "output_blocks_2_2_conv": "up_blocks_0_upsamplers_0_conv",
        "output_blocks_5_0_skip_connection": "up_blocks_1_resnets_2_conv_shortcut",
        "input_blocks_0_0": "conv_in",
    }.items():
        assert from_original(original, 2) == ours
    factors = {"input_blocks.1.1.proj_in": LowRank(torch.ones(1, 16), torch.ones(16, 1), 1.0)}
    assert list(resolve_layers(unet, factors)) == ["down_blocks.0.attentions.0.proj_in"]  # one layer a block here


def test_another_base_is_told_and_another_model_refused(tmp_path: Path) -> None:
    pipe = sd_pipeline()
    model = hasten.load(pipe)
    lora = lora_file(model, factors_for(pipe.unet))
    file = write_lora(lora, tmp_path / "x.safetensors")
    tuned = hasten.load(copy.deepcopy(pipe))
    tuned.denoiser.net.net.mid_block.attentions[0].proj_in.weight.data += 0.1
    with pytest.warns(Notice, match=r"x.safetensors was made for StableDiffusionPipeline, whose weights are others"):
        assert tuned.with_lora(file).card["lora"][0]["transfer"]
    with pytest.raises(BadInput, match=r"is a LoRA for another model: it changes weights \(.*those of this UNet2D"):
        hasten.load(sdxl_pipeline()).with_lora(file)
    half = copy.deepcopy(pipe.unet).half()
    assert base_hash(half, lora.components["unet"]) == lora.info["base_sha256"]


@pytest.mark.filterwarnings("error")
def test_no_word_for_its_own_base(tmp_path: Path) -> None:
    pipe = sd_pipeline()
    model = hasten.load(pipe)
    file = write_lora(lora_file(model, factors_for(pipe.unet)), tmp_path / "x.safetensors")
    assert not model.with_lora(file).card["lora"][0]["transfer"]


def broken(tensors: dict[str, Tensor], path: Path, **metadata: str) -> Path:
    from safetensors.torch import save_file

    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path, metadata)
    return path


A, B = torch.ones(2, 16), torch.ones(16, 2)
LAYER = "down_blocks.0.attentions.0.proj_in"
NAME = f"unet.{LAYER}"
KOHYA = "lora_unet_down_blocks_0_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no tensors|no safetensors file"),
        ({f"{NAME}.lora_A.weight": A}, f"lacks the factor B .up. of {NAME}"),
        ({f"{NAME}.lora_A.weight": A, f"{NAME}.lora_B.weight": torch.ones(16, 3)}, "no matrix product"),
        ({f"{NAME}.lora_A.weight": A[:0], f"{NAME}.lora_B.weight": B[:, :0]}, "have rank 0"),
        ({f"{NAME}.lora_A.weight": A * float("nan"), f"{NAME}.lora_B.weight": B}, "hold NaN"),
        ({f"{NAME}.lora_A.weight": A, f"{NAME}.lora_B.weight": B, "unet.x.weight": A}, "has the key unet.x.weight"),
        ({f"{NAME}.lora_A.weight": A, f"{NAME}.lora_B.weight": B, f"{NAME}.dora_scale": A}, "holds DoRA"),
        ({f"{KOHYA}.hada_w1_a": A}, "holds LoHa"),
        (
            {f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B, f"{NAME}.lora_A.weight": A},
            "mixes two formats",
        ),
        ({f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B, f"{KOHYA}.alpha": A}, "must be one number"),
        ({"unet.no.lora_A.weight": A, "unet.no.lora_B.weight": B}, "for another model: 1 of its 1 layers are not"),
        ({f"{NAME}.lora_A.weight": A[:, :8], f"{NAME}.lora_B.weight": B}, r"changes weights \(16, 8\)"),
        ({"text_encoder_2.x.lora_A.weight": A, "text_encoder_2.x.lora_B.weight": B}, "changes the text_encoder_2 too"),
        ({"lora_te_x.lora_down.weight": A, "lora_te_x.lora_up.weight": B}, "not in this CLIPTextModel"),
        ({"base_model.model.x.lora_A.weight": A, "base_model.model.x.lora_B.weight": B}, "of no LoRA format"),
    ],
)
def test_bad_files(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    path = broken(tensors, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match=message) as error:
        hasten.load(sd_pipeline()).with_lora(path)
    assert "\n" not in str(error.value)


def test_files_that_are_no_safetensors(tmp_path: Path) -> None:
    model = hasten.load(sd_pipeline())
    (tmp_path / "x.safetensors").write_bytes(b"not this")
    good = {f"{NAME}.lora_A.weight": A, f"{NAME}.lora_B.weight": B}
    with pytest.raises(BadInput, match="is no safetensors file"):
        model.with_lora(tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match="no LoRA file"):
        model.with_lora(tmp_path / "y.safetensors")
    with pytest.raises(BadInput, match="metadata of .* are no JSON"):
        model.with_lora(broken(good, tmp_path / "z.safetensors", hasten="{"))
    with pytest.raises(BadInput, match="do not describe a student|another noise schedule"):
        model.with_lora(broken(good, tmp_path / "z.safetensors", hasten=json.dumps({"distilled": 3})))
    for scale in ("x", "nan"):
        with pytest.raises(BadInput, match="scale"):
            model.with_lora(f"{tmp_path / 'z.safetensors'}:{scale}")
    with pytest.raises(BadInput, match=r"a LoRA is a .safetensors file"):
        write_lora(LoRAFile({}), tmp_path / "x.bin")
    with pytest.raises(BadInput, match="unknown LoRA format 'a1111'"):
        write_lora(LoRAFile({}), tmp_path / "x.safetensors", "a1111")
