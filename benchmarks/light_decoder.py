"""A light decoder beside the full one: PSNR and SSIM on each split, multiply-accumulates, interleaved times, a picture.

python -m benchmarks.light_decoder --base runs/emoji/vae/vae --light runs/emoji/decoder --data data/emoji --out grid.png
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from hasten.adapters.diffusers.autoencoders import (
    check_encoder_norms,
    check_same_encoder,
    distilled_from,
    open_autoencoder,
    reduction_factor,
)
from hasten.files import write_file
from hasten.images import encode_png, make_image_grid
from hasten.performance.cost import interleave, macs, ratio
from hasten.train.data import open_data, to_float
from hasten.workflows.reconstruction import reconstruction_quality, spell_quality


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--light", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--splits", default="test,val")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    nets: dict[str, Any] = {"full": open_autoencoder(args.base), "light": open_autoencoder(args.light)}
    if (norms := distilled_from(args.light)) is None:
        check_same_encoder(nets["full"], nets["light"], args.light)
    else:
        check_encoder_norms(nets["full"], norms, args.light)
    for split in args.splits.split(","):
        data = open_data(args.data, split, label="none", report=False)
        for name, net in nets.items():
            quality = reconstruction_quality(net, data, encoder=nets["full"])
            print(f"{split} ({len(data)}) {name}: {spell_quality(quality)}", flush=True)
    x = to_float(data.images(range(0, len(data), max(len(data) // 32, 1)))[:32])
    with torch.no_grad():
        z = nets["full"].encode(x).latent_dist.mode()
        decoded = {name: net.decode(z).sample.clamp(-1, 1) for name, net in nets.items()}
        rows = [torch.stack([x[k], decoded["full"][k], decoded["light"][k]]) for k in range(len(x))]
        write_file(args.out, encode_png(make_image_grid(torch.cat(rows), columns=12)))
        factor = reduction_factor(nets["full"])
        latent = torch.randn(16, z.shape[1], *(side // factor for side in data.shape[1:]))
        counts = {name: macs(net.decode, latent[:1]) for name, net in nets.items()}
        print(f"multiply-accumulates: {counts}, {counts['full'] / counts['light']:.2f}x fewer")
        for batch in (1, 16):
            calls = {name: (lambda net=net, n=batch: net.decode(latent[:n])) for name, net in nets.items()}
            times = interleave(calls, args.rounds, 2)
            spent = ", ".join(f"{name} {1e3 * statistics.median(t):.1f} ms" for name, t in times.items())
            print(f"batch {batch}: {spent}, {ratio(times['full'], times['light'])}", flush=True)


if __name__ == "__main__":
    main()
