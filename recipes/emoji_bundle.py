"""Put the trained parts of `emoji` together: a `StableDiffusionPipeline` folder with hasten's model.json beside it.

    python -m recipes.emoji_bundle --runs runs/emoji --out hasten/zoo/emoji
    python -m recipes.emoji_bundle --runs runs/emoji --unet runs/emoji/mobile --out hasten/zoo/emoji_mobile --base emoji

With `--base` the autoencoder and the text encoder stay in the folder of that pipeline. `--runs` holds `vae/`, `text/`,
`cache.pt` and `unet/` (`recipes.emoji_autoencoder`, `emoji_text`, `emoji_unet`).
Weights are written in half precision.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import hasten
from hasten.adapters.diffusers.pipelines import load_pipeline
from hasten.nets.text_unet import TextUNet
from hasten.train.checkpoint import read_log
from recipes.emoji_unet import build, scheduler

LICENCE = (
    "Apache-2.0; trained on Noto Emoji (Google, Apache-2.0), Twemoji (Twitter and contributors, CC BY 4.0) and Fluent "
    "Emoji (Microsoft, MIT), with names of the Unicode CLDR"
)


def pipeline(runs: Path, unet: Path) -> Any:
    """The pipeline of the runs' averaged weights, in half precision."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    vae = AutoencoderKL.from_pretrained(runs / "vae" / "vae")
    scale = float(torch.load(runs / "cache.pt", weights_only=True, mmap=True)["scaling_factor"])
    vae.register_to_config(scaling_factor=round(scale, 6))
    saved = torch.load(unet / "checkpoint.pt", map_location="cpu", weights_only=True)
    net = build(saved["run"]["preset"])
    net.load_state_dict(saved["players"]["unet"]["ema"])
    if isinstance(net, TextUNet):
        net = hasten.MobileUNet2DConditionModel.from_text_unet(net, sample_size=16)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(runs / "text" / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(runs / "text" / "tokenizer"),
        unet=net.eval(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe.to(torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--unet", type=Path, help="folder of the U-Net's run. Default: unet in --runs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", help="a pipeline with the same autoencoder and text encoder, which stay there")
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    args = parser.parse_args()
    run = args.unet or args.runs / "unet"
    model = load_pipeline(pipeline(args.runs, run), name=args.out.name)
    model.steps, model.sampler, model.times = 50, "ddim", "trailing"
    model.guidance_scale = args.guidance_scale
    last = read_log(run / "log.jsonl")[-1]
    model.card |= {
        "summary": "emoji in four styles, 64x64 RGB, from text: a latent text-to-image pipeline of diffusers"
        + (", with the mobile U-Net" if type(model.pipeline.unet).__name__.startswith("Mobile") else ""),
        "judge": "emoji",
        "data": "12,410 captioned pictures: Noto Emoji, Twemoji, Fluent Emoji 3D and flat (recipes/emoji_data.py)",
        "recipe": "recipes/emoji_unet.py",
        "licence": LICENCE,
        "training": {"steps": last["step"], "batch_size": 64, "seconds": round(last["seconds"]), "optimiser": "muon"},
    }
    model.save(args.out, components_from=args.base)
    config = args.out / "text_encoder" / "config.json"  # where transformers reads the dtype to load the weights in
    if config.is_file():
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for file in args.out.glob("*/config.json"):  # the folders of the runs are of this machine
        content = json.loads(file.read_text())
        content.pop("_name_or_path", None)
        file.write_text(json.dumps(content, indent=2) + "\n")
    readme = args.out / "README.md"  # the folder can be loaded without a dtype
    text = readme.read_text().replace(", torch_dtype=torch.float16", "").replace("import torch\n", "")
    readme.write_text(
        text.replace("num_inference_steps=50)", f"num_inference_steps=50, guidance_scale={model.guidance_scale:g})")
    )
    print(sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file()) / 1e6, "MB")


if __name__ == "__main__":
    main()
