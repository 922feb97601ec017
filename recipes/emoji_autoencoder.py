"""Train the autoencoder of the bundled pipeline `emoji`: 64x64 RGB to 16x16 with 8 channels.

python -m recipes.emoji_autoencoder --data data/emoji --out runs/emoji/vae --minutes 25
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from hasten.train.autoencoder import AutoencoderLoss
from hasten.train.data import Batches, open_data
from hasten.train.fit import Ema, Fit
from hasten.train.trained_module import TrainedModule

SEED, BATCH = 0, 16
WIDTHS = (16, 32, 64)


def build() -> Any:
    """The untrained autoencoder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(SEED)
    levels = len(WIDTHS)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=16,
        sample_size=64,
        mid_block_add_attention=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--precision", default="fp32+channels_last")
    args = parser.parse_args()
    autoencoder = build()
    print(sum(p.numel() for p in autoencoder.parameters()), "parameters", flush=True)
    loss = AutoencoderLoss(kl=1e-3, l1=0.1)
    trained = TrainedModule("vae", autoencoder, lambda batch: loss(autoencoder, batch["x"]), lr=1e-3, optimiser="muon")
    fit = Fit(minutes=args.minutes, precision=args.precision, ema=Ema("power", gamma=12.0), seed=SEED, log_steps=25)
    averaged: Any = fit([trained], Batches(open_data(args.data, label="none"), BATCH, seed=SEED), args.out)["vae"]
    averaged.save_pretrained(args.out / "vae")


if __name__ == "__main__":
    main()
