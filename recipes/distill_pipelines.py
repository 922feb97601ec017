"""All distillation methods on tiny random pipelines of diffusers: what trains, and what can load the students.

    python -m recipes.distill_pipelines                 a Markdown table; about 5 minutes on two cores
    python -m recipes.distill_pipelines --only progressive --only guided

Each cell runs `distill_model` for a few training steps in its own folder. The student is loaded with `hasten.load` and
sampled; pipeline folders are also loaded, in a fresh process, with `DiffusionPipeline.from_pretrained`, without hasten
and, if that fails, after `import hasten`. "refused" is only reported if nothing was trained before the error.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cyclopts
import numpy as np
import torch

import hasten
from hasten.errors import BadInput
from hasten.workflows.distill import distill_model

METHODS = (
    "progressive:steps=(4,2)", "guided:steps=(4,2),guidance=(1,3)", "tract:phases=(8,4,2)", "consistency",
    "consistency:mode=training", "guided:steps=(4,2),guidance=(1,3),shared=true",
    "denoising_student:pairs=8,pair_steps=2", "reflow:pairs=8,pair_steps=2", "dsno:pairs=8,pair_steps=4",
    "adversarial:steps=4", "diffusion_gan", "diffusion_gan:critic=heads", "dmd:steps=4", "rcfd:steps=(4,2)",
    "mmd:steps=4", "sft_pg:steps=4", "prodiff:steps=(4,2)", "encoder:steps=(4,2)",
)  # fmt: skip
OPENS = """
import json, sys, warnings
warnings.simplefilter("ignore")
if sys.argv[1] == "hasten":
    import hasten
from diffusers import DiffusionPipeline
for folder in sys.argv[2:]:
    try:
        print(json.dumps([folder, type(DiffusionPipeline.from_pretrained(folder).scheduler).__name__]))
    except ValueError as e:
        print(json.dumps([folder, None]))
"""


def unet(classes: int | None = None, prediction: str = "epsilon") -> Any:
    """A DDPM pipeline for 8 x 8 pixels."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        num_class_embeds=classes,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    return DDPMPipeline(net, DDPMScheduler(prediction_type=prediction))


def autoencoder() -> Any:
    """An autoencoder from 16 x 16 pixels to latents of 8 x 8."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
    )


def dit() -> Any:
    """A DiT pipeline with four classes."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=4,
    )
    return DiTPipeline(net, autoencoder(), DDIMScheduler(clip_sample=False))


def stable_diffusion() -> Any:
    """A Stable Diffusion pipeline without a tokenizer; it is refused before a prompt is used."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=50_000, **size))
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text,
        tokenizer=None,
        unet=net,
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def with_null_label() -> hasten.Model:
    """A model with four classes and a null label."""
    model = hasten.load(unet(5))
    return replace(model, denoiser=model.denoiser.replace(null_label=4), classes=("a", "b", "c", "d"))


MODELS: dict[str, tuple[Callable[[], hasten.Model], int]] = {  # and its image size
    "UNet2DModel, eps": (lambda: hasten.load(unet()), 8),
    "UNet2DModel, v": (lambda: hasten.load(unet(prediction="v_prediction")), 8),
    "4 classes": (lambda: hasten.load(unet(4)), 8),
    "4 classes and null": (with_null_label, 8),
    "DiT-like": (lambda: hasten.load(dit()), 16),
    "SD-like": (lambda: hasten.load(stable_diffusion()), 16),
}


def cell(model: hasten.Model, side: int, method: str, folder: Path) -> dict[str, Any]:
    """The outcome of one method on one model."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, side, side, 3), dtype=np.uint8)
    labels: dict[str, Any] = {} if model.classes is None else {"labels": np.arange(16) % len(model.classes)}
    folder.mkdir()
    np.savez(folder / "data.npz", images=pixels, **labels)
    out = folder / "out"
    try:
        distill_model(model, out, method, folder / "data.npz", steps=24, batch_size=4, precision="fp32", show=False)
    except BadInput as e:
        trained = any(out.rglob("*.safetensors"))
        return {"trains": "**after training**" if trained else "refused", "why": str(e)}
    except Exception as e:
        return {"trains": f"**{type(e).__name__}**", "why": str(e)}
    student = hasten.load(out)
    encodes = student.card["distilled"]["figures"].get("direction") == "encode"
    finite = encodes or bool(student.sample(2).isfinite().all())
    form = "pipeline" if (out / "model_index.json").is_file() else "hasten"
    return {"trains": "yes", "saved": form, "hasten": "yes" if finite else "**not finite**", "folder": str(out)}


def open_folders(folders: list[str], first: str) -> dict[str, str | None]:
    """The scheduler class of each folder, loaded in a fresh process with diffusers; None if that fails."""
    if not folders:
        return {}
    process = subprocess.run([sys.executable, "-c", OPENS, first, *folders], capture_output=True, text=True, check=True)
    return dict(json.loads(line) for line in process.stdout.splitlines() if line.startswith("["))


def format_cell(
    result: dict[str, Any], plain: dict[str, str | None], imported: dict[str, str | None], reasons: list[str]
) -> str:
    """A cell of the table."""
    if "folder" not in result:
        if result["why"] not in reasons:
            reasons.append(result["why"])
        return f"{result['trains']} [{reasons.index(result['why']) + 1}]"
    if result["saved"] == "hasten":
        return f"trains; hasten folder, opens: {result['hasten']}"
    if name := plain.get(result["folder"]):
        return f"trains; opens in hasten: {result['hasten']}, diffusers: {name}"
    name = imported.get(result["folder"])
    return f"trains; opens in hasten: {result['hasten']}, diffusers: {name} after `import hasten`"


def main(*, only: list[str] | None = None) -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    reasons: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        cells: dict[tuple[str, str], dict[str, Any]] = {}
        methods = [m for m in METHODS if only is None or m.partition(":")[0] in only]
        for k, method in enumerate(methods):
            for j, (name, (make, side)) in enumerate(MODELS.items()):
                cells[method, name] = cell(make(), side, method, Path(scratch) / f"{k}-{j}")
                print(method, name, cells[method, name], file=sys.stderr, flush=True)
        folders = [c["folder"] for c in cells.values() if c.get("saved") == "pipeline"]
        plain = open_folders(folders, "alone")
        imported = open_folders([f for f in folders if plain.get(f) is None], "hasten")
        print(f"| method | {' | '.join(MODELS)} |\n|{' --- |' * (len(MODELS) + 1)}")
        for method in methods:
            row = [format_cell(cells[method, name], plain, imported, reasons) for name in MODELS]
            print(f"| `{method}` | {' | '.join(row)} |")
    for number, reason in enumerate(reasons, 1):
        print(f"\n[{number}] {reason}")


if __name__ == "__main__":
    cyclopts.run(main)
