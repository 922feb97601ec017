"""Bits a dimension: learned against fixed noise, likelihood against simple weighting, the bound against the ODE,
learned against fixed variances; equal network and training minutes.

    python -m benchmarks.likelihood --data FASHION --out runs/likelihood --minutes 6
    python -m benchmarks.likelihood --data FASHION --out runs/likelihood --models vdm,vp_simple --images 500
    python -m benchmarks.likelihood --data FASHION --out runs/likelihood256 --size 28 --levels 256 --minutes 50

The images are reduced to `--size` and `--levels`. Each model is trained for `--minutes` on the training images; then a
line is printed for each measure: bits/dim of the test images by the bound and by the probability-flow ODE with their
standard errors, bits/dim of ancestral sampling at 10, 50 and 1000 steps by variance, and the spread of the training
loss from batch to batch relative to its mean. An interrupted run resumes; lines that `results.jsonl` in the folder has
are not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import hasten
from hasten.files import read_json_lines
from hasten.train import open_data
from hasten.train.data import Batches, Data
from hasten.train_processes import TrainSettings
from hasten.workflows.train import TrainConfig, train_model

DATA = "/usr/share/datasets/fashion-mnist"  # of the Debian package dataset-fashion-mnist
BOTH = ("bound:samples=32", "ode")
ANCESTRAL = tuple(
    f"ancestral_bound:steps={steps},variance={variance},samples=32"
    for steps in (10, 50, 1000)
    for variance in ("small", "large", "learned")
)
# by model: the process, {K} the number of levels, and the measures
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "vp_simple": ("diffusion:schedule=vp,prediction=eps", BOTH),
    "vp_likelihood": ("diffusion:schedule=vp,prediction=eps,weight=likelihood", BOTH),
    "vp_likelihood_log_snr": ("diffusion:schedule=vp,prediction=eps,weight=likelihood,times=log_snr", BOTH),
    "sub_vp_simple": ("diffusion:schedule=sub_vp,prediction=eps", BOTH),
    "sub_vp_likelihood": ("diffusion:schedule=sub_vp,prediction=eps,weight=likelihood", BOTH),
    "sub_vp_likelihood_log_snr": ("diffusion:schedule=sub_vp,prediction=eps,weight=likelihood,times=log_snr", BOTH),
    "vdm_fixed": ("vdm:levels={K},ends=false,shape=false", BOTH),
    "vdm_ends": ("vdm:levels={K},shape=false", BOTH),
    "vdm": ("vdm:levels={K}", BOTH),
    "vdm_no_fourier": ("vdm:levels={K},fourier=false", BOTH),
    "improved_ddpm": ("improved_ddpm:levels={K}", ANCESTRAL),
    "improved_ddpm_vlb": ("improved_ddpm:levels={K},loss=vlb", ANCESTRAL),
}


def reduced(args: argparse.Namespace, split: str) -> Data:
    """The images of a split, of `--size` and `--levels`, stored as uint8."""
    data = open_data(args.data, split, size=args.size, channels=1)
    images = data.images(range(len(data))).double()
    k = (images / 255 * (args.levels - 1)).round()
    return Data.of((k * 255 / (args.levels - 1)).round().to(torch.uint8), source=f"{args.data} {split}")


def loss_spread(process: Any, model: Any, data: Data, args: argparse.Namespace) -> float | None:
    """The standard deviation of the training loss over batches, relative to its mean; of `diffusion` alone, whose
    saved network is the trained one."""
    if type(process).__name__ != "Diffusion":
        return None
    (module,) = process.modules(model.denoiser, data, TrainSettings())
    batches = Batches(data, args.batch_size)
    torch.manual_seed(0)
    with torch.no_grad():
        losses = torch.stack([module.loss(batches[k]) for k in range(48)])
    return float(losses.std() / losses.mean())


def main() -> None:
    """Train and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(DATA))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--images", type=int, default=360)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--levels", type=int, default=17)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--widths", type=lambda text: tuple(int(w) for w in text.split(",")), default=(32, 64))
    parser.add_argument("--patch", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train, test = reduced(args, "train"), reduced(args, "test")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.jsonl"
    for name in args.models.split(","):
        spec, measures = MODELS[name]
        spec = spec.replace("{K}", str(args.levels))
        config = TrainConfig(
            minutes=args.minutes, widths=args.widths, patch=args.patch, batch_size=args.batch_size, process=spec,
            seed=args.seed, precision="fp32",
        )  # fmt: skip
        model = train_model(train, args.out / name, config)
        done = {(row["model"], row["measure"]) for row in read_json_lines(path)} if path.is_file() else set()
        spread = loss_spread(hasten.pick("train_processes", spec), model, train, args)
        for measure in measures:
            if (name, measure) in done:
                continue
            began = time.perf_counter()
            result = hasten.evaluate_likelihood(
                model, test, method=measure, n=min(args.images, len(test)), levels=args.levels, batch_size=120
            )
            keys = ("bits_per_dim", "standard_error", "parts", "n", "nfe", "images_per_second", "protocol")
            row = {
                "model": name, "measure": measure, "process": spec, "minutes": args.minutes,
                "steps": model.card["last"].get("step"), "seed": args.seed, "loss_spread": spread,
                "gamma": model.card.get("gamma"), **{key: result[key] for key in keys},
                "seconds": time.perf_counter() - began,
            }  # fmt: skip
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            extra = f"  loss spread {spread:.3f}" if spread is not None else ""
            print(
                f"{name:26} {measure:52} {result['bits_per_dim']:8.4f} +- {result['standard_error']:.4f}  "
                f"{result['images_per_second']:6.3g} images/s  {row['steps']} training steps{extra}",
                flush=True,
            )


if __name__ == "__main__":
    main()
