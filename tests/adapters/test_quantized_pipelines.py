"""Quantised pipelines: calibrated by a call of their own or by prompts, saved, and opened again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.adapters.diffusers.network import uncompiled
from hasten.cli import main
from hasten.errors import BadInput
from hasten.nets.quantized import layers

from . import tiny
from .test_accelerated_network import relative_error

STEPS = 9
SPEC = "quantize:groups=2,steps=2,ranges=minmax"
CALL: dict[str, Any] = {
    "prompt": "a cat",
    "num_inference_steps": STEPS,
    "guidance_scale": 3.0,
    "output_type": "latent",
}
IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SIZE = {"height": 16, "width": 16}


def adapted() -> Any:
    """A pipeline with an IP-Adapter, whose image embeddings are given."""
    pipe = tiny.sd_pipeline()
    width = pipe.unet.config.cross_attention_dim
    weights = {"image_proj": {"proj.weight": torch.randn(4 * width, 8), "proj.bias": torch.zeros(4 * width)}}
    weights["image_proj"] |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    weights["ip_adapter"] = {}
    key = 1
    for name in pipe.unet.attn_processors:
        if not name.endswith("attn1.processor"):
            size = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for which in ("to_k_ip", "to_v_ip"):
                weights["ip_adapter"][f"{key}.{which}.weight"] = torch.randn(size, width) * 0.3
            key += 2
    pipe.unet._load_ip_adapter_weights([weights])
    return pipe


PIPELINES: dict[str, Any] = {
    "img2img": (lambda: tiny.sd_pipeline("StableDiffusionImg2ImgPipeline"), {"image": IMAGE, "strength": 1.0}),
    "inpaint": (
        lambda: tiny.sd_pipeline("StableDiffusionInpaintPipeline", unet=tiny.unet2d_condition(in_channels=9)),
        {"image": IMAGE, "mask_image": torch.ones(1, 1, 16, 16), **SIZE},
    ),
    "controlnet": (
        lambda: tiny.sd_pipeline("StableDiffusionControlNetPipeline", controlnet=tiny.controlnet()),
        {"image": IMAGE, **SIZE},
    ),
    "ip_adapter": (adapted, {"ip_adapter_image_embeds": [torch.ones(2, 1, 8)], **SIZE}),
}


def drawn(pipe: Any, **more: Any) -> Tensor:
    return torch.as_tensor(pipe(**CALL, **more, generator=torch.Generator().manual_seed(3)).images)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_calibrated_by_its_own_call_and_reopened(name: str, tmp_path: Path) -> None:
    make, more = PIPELINES[name]
    pipe = make()
    fast = hasten.accelerate(pipe, SPEC, steps=STEPS, calls=lambda pipe: drawn(pipe, **more))
    plain, ours = drawn(pipe, **more), drawn(fast, **more)
    assert 1e-5 < relative_error(ours, plain) < 0.2
    if name == "ip_adapter":
        with pytest.raises(BadInput, match="an IP-Adapter cannot be saved with it"):
            fast.save_pretrained(tmp_path / "q")
        assert not list(tmp_path.iterdir())
        return
    with pytest.warns(UserWarning, match="saved for hasten.open_quantized"):
        fast.save_pretrained(tmp_path / "q")
    again = hasten.open_quantized(tmp_path / "q")
    assert type(again) is type(pipe) and torch.equal(drawn(again, **more), ours)
    size = (tmp_path / "q" / "weights.safetensors").stat().st_size
    assert size < 0.75 * sum(4 * p.numel() for p in pipe.unet.parameters())
    if name == "controlnet":  # under a further accelerator, which is that of the quantised network
        cached = hasten.open_quantized(tmp_path / "q", "deep_cache:every=1,branch=0", steps=STEPS)
        assert relative_error(drawn(cached, **more), ours) < 1e-3
        with pytest.raises(BadInput, match="open it with hasten.open_quantized"):
            hasten.load(tmp_path / "q")
        with pytest.raises(BadInput, match="save the quantised pipeline in a new folder"):
            fast.save_pretrained(tmp_path / "q")
        file = tmp_path / "q" / "pipeline" / "model_index.json"
        file.rename(tmp_path / "gone")
        with pytest.raises(BadInput, match="model_index.json is missing"):
            hasten.open_quantized(tmp_path / "q")


def test_a_prompt_pipeline_is_quantised_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "pipe", tmp_path / "q"
    tiny.sd_pipeline().save_pretrained(folder)
    command = ["quantize", str(folder), "--out", str(out), "--images", "2", "--steps", "4", "--time-groups", "2"]
    assert main(command) == 1
    assert "takes prompts: give --prompt TEXT" in capsys.readouterr().err and not out.exists()
    (tmp_path / "prompts.txt").write_text("a cat\nthe dog\n")
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--json"]
    assert main(command) == 0
    assert 0 < json.loads(capsys.readouterr().out)["error"] < 0.1
    model, plain = hasten.load(out), hasten.load(folder)
    assert next(layers(model.denoiser.net), None) is not None and model.card["quantized"]["command"]
    options: dict[str, Any] = {"steps": 4, "guidance_scale": 3.0}
    ours, theirs = (one.sample(2, ["a cat", "the dog"], **options) for one in (model, plain))
    assert ours.shape == (2, 3, 16, 16) and 1e-5 < relative_error(ours, theirs) < 0.2
    assert not torch.equal(model.sample(1, "a cat", **options), model.sample(1, "the dog", **options))
    assert main(["sample", str(out), "--prompt", "a cat", "--steps", "2", "--out", str(tmp_path / "x.png")]) == 0
    capsys.readouterr()
    assert main([*command, "--prompt", "a cat"]) == 1  # both
    assert "give --prompt or --prompts, not both" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("a cat\n")
    assert main(command) == 1
    assert "is a run with prompts" in capsys.readouterr().err
    pipe: Any = hasten.open_quantized(out)  # the same integers, in diffusers' own loop
    latents = drawn(pipe, **SIZE)
    assert 1e-5 < relative_error(latents, drawn(plain.pipeline, **SIZE)) < 0.2
    assert next(layers(uncompiled(pipe.unet)), None) is not None
