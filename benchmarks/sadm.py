"""The structure term in fine-tuning and distillation, against the same without it: equal steps, and equal time.

    python -m benchmarks.sadm --data FASHION_FOLDER --out runs/sadm --steps 1500 --seeds 0,1,2
    python -m benchmarks.sadm --cifar PACKS --out runs/sadm-cifar --teacher-minutes 120 --steps 1500 --seeds 0,1,2
    python -m benchmarks.sadm --data FASHION_FOLDER --out runs/sadm --task distill --steps 1500 --seeds 0,1,2

Task `train` goes on training the bundled `fashion` (or on CIFAR-10 at 32x32 a small teacher, which is trained first)
with the same data and seeds; task `distill` makes a 4-step student by progressive distillation. Arms:

    origin      the model as it was (task train)
    plain       --steps steps without the term
    shared      --steps steps with it, samples of a batch at one noise level (task distill: at their own)
    own         --steps steps with it, at the noise levels of the loss (task train)
    plain@ARM   without it, for as many steps as take the time of ARM: the cost of a step of both is timed in turns

One row of rows.jsonl for an arm, a seed and a number of network evaluations: the Frechet distance in features that the
encoder never saw (the bundled classifier; EfficientNet-Lite0 for CIFAR-10), recall in these, and the structure distance
in frozen random features with that between real images (`floor`). Images are drawn with their class, without guidance,
by UniPC (students by DDIM). A run that was stopped resumes; rows that are there are not computed again.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hasten
from hasten.files import append_json_line, read_json_lines
from hasten.metrics import evaluate_images, feature_net
from hasten.metrics.evaluate import reference_from_images
from hasten.metrics.structure_distance import structure_distance_of
from hasten.model import Model
from hasten.train import DenoisingLoss, TrainedModule
from hasten.train.data import Data, open_data, to_float
from hasten.train.sadm import structure_options, with_structure
from hasten.workflows.distill import distill_model

EVALUATIONS = (4, 8, 16)
FIRST_SEED = 2_000_000
STUDENT = "progressive:steps=(4,),start=16"


def cifar(paths: list[Path]) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 32, 32) and labels of packs of 320x320 sheets, a hundred images each, with labels.csv."""
    images, labels = [], []
    from PIL import Image

    for path in paths:
        with zipfile.ZipFile(path) as pack:
            labels += [int(row["label"]) for row in csv.DictReader(io.StringIO(pack.read("labels.csv").decode()))]
            for name in sorted(n for n in pack.namelist() if n.endswith(".webp")):
                sheet = np.asarray(Image.open(io.BytesIO(pack.read(name))).convert("RGB"))
                images.append(sheet.reshape(10, 32, 10, 32, 3).transpose(0, 2, 4, 1, 3).reshape(100, 3, 32, 32))
    return torch.from_numpy(np.concatenate(images)), torch.tensor(labels)


@functools.cache
def data_of(args: Any) -> tuple[Data, Tensor]:
    """The training data, and the images of the test split in [-1, 1]."""
    if args.cifar is None:
        test = open_data(args.data, split="test", report=False)
        return open_data(args.data, report=False), to_float(test.images(list(range(len(test)))))
    images, labels = cifar([args.cifar / f"cifar10-train-{part}.zip" for part in "ab"])
    return Data.of(images, labels, source="CIFAR-10"), to_float(cifar([args.cifar / "cifar10-test.zip"])[0])


def origin_of(args: Any) -> Path | str:
    """What is trained further: the bundled model, or a teacher of CIFAR-10, trained here."""
    if args.cifar is None:
        return "fashion"
    folder: Path = args.out / "teacher"
    hasten.train_model(
        data_of(args)[0], folder, minutes=args.teacher_minutes, widths=(64, 128, 192), optimizer="muon", flip=True,
        batch_size=128, device=args.device,
    )  # fmt: skip
    return folder


@functools.cache
def reference_of(args: Any) -> tuple[Any, Any]:
    """The feature network and the statistics of the test split in it."""
    if args.cifar is None:
        return "fashion", "fashion"
    net = feature_net("efficientnet_lite0")
    return net, reference_from_images(data_of(args)[1], "CIFAR-10", "test", net)


def step_seconds(args: Any, origin: Path | str, arm: str, repeats: int = 5) -> tuple[float, float]:
    """Seconds of a step without the term and with it, timed in turns: the least of each."""
    if args.task == "distill":
        times = {arm: [], "plain": []}
        for _ in range(3):
            for name, found in times.items():
                stages = distil(args, origin, name, 100, 0, args.out / "trial", dry_run=True)["stages"]
                found.append(stages[0]["seconds"])
        return min(times["plain"]), min(times[arm])
    model = hasten.load(origin).to(args.device or "cpu")
    data, _ = data_of(args)
    rows = list(range(args.batch_size))
    batch = {"x": to_float(data.images(rows)), "label": data.labels[rows]}
    batch = {key: value.to(model.device) for key, value in batch.items()}
    runs = []
    for options in (None, structure_options(spec_of(args, arm), trained=True)):
        denoiser = hasten.load(origin).to(args.device or "cpu").denoiser.requires_grad_(True)
        loss = DenoisingLoss()
        modules = [TrainedModule("model", denoiser, lambda b, d=denoiser, f=loss: f(d, b))]
        if options is not None:
            modules = with_structure(modules[0], loss, denoiser, model.shape, options)
        runs.append([(m, m.optimizer()) for m in modules])
        for m in modules:
            m.module.to(model.device).train()
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats):
        for run, found in zip(runs, seconds, strict=True):
            begin, shared = time.perf_counter(), dict(batch)
            for module, optimiser in run:
                module.loss(shared).backward()
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - begin)
    return min(seconds[0]), min(seconds[1])


def spec_of(args: Any, arm: str) -> str | None:
    """The structure term of an arm; None for none."""
    if arm.partition("@")[0] in ("plain", "origin"):
        return None
    extra = f",{args.options}" if args.options else ""
    return f"weight={args.weight}{extra}" + (",times=own" if arm == "own" else "")


def distil(args: Any, origin: Path | str, arm: str, steps: int, seed: int, out: Path, dry_run: bool = False) -> Any:
    """The 4-step student of an arm."""
    return distill_model(
        hasten.load(origin).to(args.device or "cpu"), out, STUDENT, data=data_of(args)[0], steps=steps, seed=seed,
        batch_size=args.batch_size, structure=spec_of(args, arm), guidance_scale=1.0, show=False, dry_run=dry_run,
    )  # fmt: skip


def model_of(args: Any, origin: Path | str, arm: str, steps: int, seed: int) -> Model:
    """The model of an arm, trained or loaded."""
    if arm == "origin":
        return hasten.load(origin)
    out = args.out / f"{args.task}-{arm}-{steps}-{seed}"
    if args.task == "distill":
        distil(args, origin, arm, steps, seed, out)
        return hasten.load(out)
    return hasten.train_model(
        data_of(args)[0], out, init_from=str(origin), steps=steps, seed=seed, batch_size=args.batch_size, lr=args.lr,
        structure=spec_of(args, arm), show=False, device=args.device,
    )  # fmt: skip


def measured(args: Any, model: Model, evaluations: int, seed: int) -> dict[str, Any]:
    """The figures of a model at a number of evaluations."""
    how: dict[str, Any] = {} if args.task == "distill" else {"sampler": "unipc", "times": "angle"}
    images = model.to(args.device or "cpu").sample(
        args.images, seed=FIRST_SEED + 100_000 * seed, steps=evaluations, guidance_scale=1.0, batch_size=250, **how
    )
    images = images.float().cpu()
    net, reference = reference_of(args)
    found = evaluate_images(images, reference=reference, features=net, bootstrap=0)
    structure = structure_distance_of(images, data_of(args)[1])
    return {
        "frechet": found["frechet"].value, "recall": getattr(found.get("recall"), "value", None),
        "precision": getattr(found.get("precision"), "value", None), "images": args.images,
        "structure": structure.value, "structure_floor": structure.floor,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist", help="folder of IDX files")
    parser.add_argument("--cifar", type=Path, help="folder of the packs of CIFAR-10, in place of Fashion-MNIST")
    parser.add_argument("--teacher-minutes", type=float, default=60.0, help="of training, for the teacher of CIFAR-10")
    parser.add_argument("--task", choices=("train", "distill"), default="train")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", help="comma-separated. Default: all of the task")
    parser.add_argument("--weight", type=float, default=0.1)
    parser.add_argument("--options", default="", help="further ones of the term, such as gate=alpha,adversarial=false")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--evaluations", default=",".join(map(str, EVALUATIONS)))
    parser.add_argument("--device")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    counts = (4,) if args.task == "distill" else tuple(int(n) for n in args.evaluations.split(","))
    every = "plain,shared,plain@shared" if args.task == "distill" else "origin,plain,own,shared,plain@own,plain@shared"
    args = argparse.Namespace(**vars(args))
    hashed = type("Arguments", (), {**vars(args), "__hash__": lambda self: 0})()  # for functools.cache
    run(hashed, (args.arms or every).split(","), counts)


def run(args: Any, arms: list[str], counts: tuple[int, ...]) -> None:
    """All arms and seeds, and the table of what rows.jsonl holds of them."""
    file = args.out / "rows.jsonl"
    origin = origin_of(args)
    ratios: dict[str, float] = {}
    common = {"task": args.task, "weight": args.weight, "options": args.options, "images": args.images}
    for seed in (int(s) for s in args.seeds.split(",")):
        for arm in arms:
            rows = list(read_json_lines(file)) if file.is_file() else []
            key = {**common, "arm": arm, "seed": seed, "steps": args.steps}
            missing = [n for n in counts if not any(is_row(row, {**key, "evaluations": n}) for row in rows)]
            if not missing:
                continue
            steps, like = args.steps, arm.partition("@")[2]
            if like:
                if like not in ratios:
                    known = [row["ratio"] for row in rows if row.get("arm") == arm and row.get("task") == args.task]
                    plain, term = (1.0, known[0]) if known else step_seconds(args, origin, like)
                    ratios[like] = term / plain
                steps = round(args.steps * ratios[like])
            begin = time.monotonic()
            model = model_of(args, origin, arm, steps, seed)
            seconds = round(time.monotonic() - begin, 1)
            for n in missing:
                extra = {"trained": steps, "seconds": seconds, "ratio": ratios.get(like)}
                row = {**key, "evaluations": n, **extra, **measured(args, model, n, seed)}
                append_json_line(file, row)
                print(json.dumps(row), flush=True)
    print(table([row for row in read_json_lines(file) if is_row(row, common)], counts))


def is_row(row: dict[str, Any], key: dict[str, Any]) -> bool:
    """Whether a row is the one of a key."""
    return all(row.get(name) == value for name, value in key.items())


def table(rows: list[dict[str, Any]], counts: tuple[int, ...]) -> str:
    """Means over the seeds, with the standard deviation of the distance."""
    lines = ["| arm | seeds | steps | evaluations | Frechet | structure distance | recall |", "| --- " * 7 + "|"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for n in counts:
            found = [row for row in rows if (row["arm"], row["evaluations"]) == (arm, n)]
            if not found:
                continue
            frechet = torch.tensor([row["frechet"] for row in found])
            spread = f" ± {float(frechet.std()):.3f}" if len(found) > 1 else ""
            structure = sum(row["structure"] for row in found) / len(found)
            recall = sum(row["recall"] or 0 for row in found) / len(found)
            lines.append(
                f"| {arm} | {len(found)} | {found[0]['trained']} | {n} | {float(frechet.mean()):.3f}{spread} | "
                f"{structure:.4f} | {recall:.3f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
