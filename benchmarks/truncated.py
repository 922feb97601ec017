"""Truncated diffusion, early stop, DiffuseVAE and plain diffusion on Fashion-MNIST after equal training minutes.

    python -m benchmarks.truncated --out runs/truncated --minutes 60 [--models plain,tdpm] [--images 5000]

Every model has the U-Net of the bundled `fashion` (2.8 M weights; DiffuseVAE reads one channel more), the optimiser of
its recipe and the same training minutes on the same machine, one process each, in which those with a generator, critic
or autoencoder train these too. Images are drawn with their class and without guidance, by UniPC, for an equal number of
network evaluations: the generator of a truncated model that is the network itself costs one of them. Of three time
grids the best is taken for each model and number. The distance is the Frechet distance to the test split in the bundled
features; one row a model is printed. A run that was stopped resumes: what was trained and measured is kept in --out.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import hasten
from hasten.errors import HastenError
from hasten.files import write_file
from hasten.metrics import evaluate_images, feature_net
from hasten.metrics.evaluate import reference_from_images
from hasten.model import Model
from hasten.train.data import open_data, to_float

DATA = "/usr/share/datasets/fashion-mnist"  # of the Debian package dataset-fashion-mnist
MODELS = {
    "plain": None,
    "tdpm": "tdpm:time=0.5",
    "tdpm_ct": "tdpm:time=0.5,distance=ct",
    "tdpm_own": "tdpm:time=0.5,prior=own,prior_widths=(32,64),generator_lr=0.0005,critic_lr=0.001,r1=0.05",
    "es_ddpm": "es_ddpm:time=0.6",
    "es_ddpm_direct": "es_ddpm:time=0.6,direct=true",
    "diffuse_vae": "diffuse_vae",
    "diffuse_vae_shifted": "diffuse_vae:form=shifted",
}
EVALUATIONS = (1, 4, 5, 10, 25, 50, 100)
GRIDS = ("angle", "trailing", "lambda:low=0.03")
FIRST_SEED = 1_000_000


def train(name: str, process: str | None, out: Path, args: argparse.Namespace) -> Model:
    """The model of this name, trained for the minutes or loaded; `seed` and data are the same for all."""
    data = open_data(args.data, split="train", size=args.size)
    return hasten.train_model(
        data,
        out / name,
        process=process,
        minutes=args.minutes,
        widths=tuple(args.widths),
        patch=args.patch,
        batch_size=args.batch_size,
        lr=2e-3,
        optimizer="muon",
        precision=args.precision,
        seed=args.seed,
        device=args.device,
    ).to(args.device or "cpu")


def steps_for(model: Model, evaluations: int) -> int:
    """Sampler steps for a number of network evaluations, less that of a generator that is the network itself."""
    shared = type(model.parts.get("prior")).__name__ == "SharedPrior"
    return evaluations - int(shared)


def measure(model: Model, evaluations: int, grid: str, args: argparse.Namespace) -> dict[str, Any]:
    """The Frechet distance with its interval, and the seconds that the images took."""
    steps = steps_for(model, evaluations)
    if steps < 1:
        return {"frechet": None, "why": "the generator is the one evaluation"}
    begin = time.monotonic()
    try:
        images = model.sample(
            args.images, seed=FIRST_SEED, sampler="unipc", times=grid, steps=steps, guidance_scale=1.0, batch_size=250
        )
    except HastenError as e:
        return {"frechet": None, "why": str(e)}
    seconds = time.monotonic() - begin
    found = evaluate_images(images, reference=reference(args), bootstrap=20)["frechet"]
    return {"frechet": found.value, "interval": found.interval, "floor": found.floor, "seconds": round(seconds, 2)}


@functools.cache
def reference_at(data: str, size: int) -> Any:
    """The statistics of the test split at another size, in the bundled features."""
    test = open_data(data, split="test", size=size)
    images = to_float(test.images(list(range(len(test)))))
    return reference_from_images(images, f"fashion {size}x{size}", "test", feature_net("fashion"))


def reference(args: argparse.Namespace) -> Any:
    """The statistics to compare with."""
    return "fashion" if args.size is None else reference_at(str(args.data), args.size)


def row(name: str, results: dict[str, Any], steps: Any, counts: tuple[int, ...]) -> str:
    """One row of the table: the best distance of the grids at each number of evaluations."""
    cells = []
    for k in counts:
        values = [v["frechet"] for key, v in results.items() if key.startswith(f"{name}/{k}/") and v["frechet"]]
        cells.append(f"{min(values):.3f}" if values else "-")
    return f"| {name} | {steps} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default=DATA, help="folder with the IDX files")
    parser.add_argument("--minutes", type=float, default=60.0, help="of training, for each model")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--evaluations", default=",".join(map(str, EVALUATIONS)))
    parser.add_argument("--grids", default=";".join(GRIDS), help="separated by ;")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--size", type=int, help="a smaller side of the images, for a quick look")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    args = parser.parse_args()
    counts = tuple(int(k) for k in args.evaluations.split(","))
    results: dict[str, Any] = {}
    file = args.out / "truncated.json"
    if file.is_file():
        results = json.loads(file.read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [f"| model | training steps | {' | '.join(map(str, counts))} |", "| --- " * (len(counts) + 2) + "|"]
    for name in args.models.split(","):
        model = train(name, MODELS[name], args.out, args)
        for k in counts:
            for grid in args.grids.split(";"):
                key = f"{name}/{k}/{grid}/{args.images}"
                if key not in results:
                    results[key] = measure(model, k, grid, args)
                    write_file(file, json.dumps(results, indent=1).encode())
                    print(key, results[key], flush=True)
        lines.append(row(name, results, model.card["last"].get("step"), counts))
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
