"""Train the U-Net of the bundled pipeline `emoji` on latents and text embeddings that are computed once.

    python -m recipes.emoji_unet encode --data data/emoji --vae RUNS/vae/vae --text RUNS/text --out RUNS/cache.pt
    python -m recipes.emoji_unet train --cache RUNS/cache.pt --out RUNS/unet --minutes 92
    python -m recipes.emoji_unet train --cache RUNS/cache.pt --out RUNS/mobile --steps 7500 --preset mobile

`sd_like` is a plain `UNet2DConditionModel` of diffusers, `mobile` the preset of the same name (Zhao et al. 2023,
arXiv:2311.16567). v-prediction on diffusers' `squaredcos_cap_v2` table, 10 % of the captions replaced by the empty one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.train.data import open_data, to_float
from hasten.train.fit import Ema, Fit
from hasten.train.losses import stratified
from hasten.train.trained_module import TrainedModule
from recipes.emoji_text import encode as tokenize
from recipes.emoji_text import read_captions

SEED, BATCH, DROP, WIDTHS = 0, 64, 0.1, (48, 96, 128)


def sd_like() -> nn.Module:
    """The layout of Stable Diffusion's U-Net at small widths."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=(2, 4, 4),
        norm_num_groups=16,
    )


def build(preset: str) -> nn.Module:
    """The untrained network of a preset."""
    torch.manual_seed(SEED)
    if preset == "sd_like":
        return sd_like()
    from recipes.emoji_unet_mobile import emoji_mobile

    return emoji_mobile()


def evaluate(net: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """The raw output of either kind of network."""
    if type(net).__name__ == "UNet2DConditionModel":
        return net(x, t, encoder_hidden_states=text).sample
    return net(x, t, text=text)


def scheduler() -> Any:
    """The noise schedule of the pipeline."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # not used by this spacing, but pipelines warn about 0
        set_alpha_to_one=True,
    )


@torch.no_grad()
def encode(data: str, vae_folder: Path, text_folder: Path, out: Path) -> None:
    """Latents of unit variance and text embeddings of the three splits, and of the empty caption."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    text_model = CLIPTextModel.from_pretrained(text_folder / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(text_folder / "tokenizer")
    cache: dict[str, Tensor] = {}
    for split in ("train", "test", "val"):
        source = open_data(data, split=split, label="none", report=False)
        files = tuple(sorted(p.name for p in (Path(data) / split).glob("*.png")))
        tokens = tokenize(tokenizer, read_captions(data, split, files))
        rows = torch.arange(len(source)).split(128)
        latents = [vae.encode(to_float(source.images(part.tolist()))).latent_dist.mean for part in rows]
        cache[f"{split}_latents"] = torch.cat(latents)
        cache[f"{split}_text"] = torch.cat([text_model(tokens[part]).last_hidden_state for part in rows]).half()
    cache["null_text"] = text_model(tokenize(tokenizer, [""])).last_hidden_state.half()
    scale = 1 / cache["train_latents"].std()
    for split in ("train", "test", "val"):
        cache[f"{split}_latents"] = (cache[f"{split}_latents"] * scale).half()
    cache["scaling_factor"] = scale
    torch.save(cache, out)
    print("scaling factor", float(scale), "channel deviations", cache["train_latents"].float().std((0, 2, 3)).tolist())


class Cached:
    """Batches of latents and text embeddings; batch k is a function of (seed, k) only."""

    def __init__(self, latents: Tensor, text: Tensor, batch_size: int, seed: int) -> None:
        self.latents, self.text, self.batch_size, self.seed = latents, text, batch_size, seed

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """Batch `step`."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rows = torch.randint(len(self.latents), (self.batch_size,), generator=generator)
        return {"x": self.latents[rows].float(), "text": self.text[rows].float()}


class Loss:
    """The squared error of v at stratified times, with captions dropped.

    Args:
        net: the network.
        null_text: the embedding of the empty caption (1, L, D).
    """

    def __init__(self, net: nn.Module, null_text: Tensor) -> None:
        self.net, self.null_text = net, null_text.float()
        self.alphas = scheduler().alphas_cumprod.sqrt()
        self.sigmas = (1 - scheduler().alphas_cumprod).sqrt()

    def __call__(self, batch: dict[str, Tensor], drop: float = DROP) -> Tensor:
        x, text = batch["x"], batch["text"]
        t = (stratified(len(x)) * len(self.alphas)).long()
        if drop:
            text = torch.where((torch.rand(len(x)) < drop)[:, None, None], self.null_text, text)
        alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in (self.alphas, self.sigmas))
        eps = torch.randn_like(x)
        v = evaluate(self.net, alpha * x + sigma * eps, t, text)
        return (v - (alpha * eps - sigma * x)).square().mean()


@torch.no_grad()
def validation(net: nn.Module, cache: dict[str, Tensor], split: str = "test") -> float:
    """The loss on a held-out split, without dropped captions; the same times and noise for every network."""
    loss = Loss(net.eval(), cache["null_text"])
    latents, text = cache[f"{split}_latents"].float(), cache[f"{split}_text"].float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = [float(loss({"x": latents[:200], "text": text[:200]}, drop=0.0)) for _ in range(8)]
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    encoding = verbs.add_parser("encode")
    encoding.add_argument("--data", required=True)
    encoding.add_argument("--vae", type=Path, required=True)
    encoding.add_argument("--text", type=Path, required=True)
    encoding.add_argument("--out", type=Path, required=True)
    training = verbs.add_parser("train")
    training.add_argument("--cache", type=Path, required=True)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--minutes", type=float)
    training.add_argument("--steps", type=int)
    training.add_argument("--preset", choices=("sd_like", "mobile"), default="sd_like")
    args = parser.parse_args()
    if args.verb == "encode":
        encode(args.data, args.vae, args.text, args.out)
        return
    cache = torch.load(args.cache, weights_only=True)
    net = build(args.preset)
    print(sum(p.numel() for p in net.parameters()), "parameters", flush=True)
    loss = Loss(net, cache["null_text"])
    trained = TrainedModule("unet", net, loss, lr=1.5e-3, optimiser="muon", muon_lr=0.015)
    fit = Fit(args.steps, args.minutes, precision="fp32", ema=Ema("power", gamma=12.0), seed=SEED)
    batches = Cached(cache["train_latents"], cache["train_text"], BATCH, SEED)
    averaged: Any = fit([trained], batches, args.out, settings={"preset": args.preset})["unet"]
    report = {split: validation(averaged, cache, split) for split in ("train", "test", "val")}
    (args.out / "validation.json").write_text(json.dumps(report) + "\n")
    print(report)


if __name__ == "__main__":
    main()
