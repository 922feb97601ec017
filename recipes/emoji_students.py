"""Few-step students of a text-to-image pipeline at one budget each: 8 steps (guided), and 1 step by several methods.

    python -m recipes.emoji_students emoji data/emoji --out runs/emoji/students --minutes 20
    python -m recipes.emoji_students FOLDER DATA --out OUT --only guided8,diffusion_gan --minutes 60

FOLDER is a pipeline of diffusers or a bundled model, DATA a folder of captioned images. Latents and text embeddings are
computed once, into OUT/encoded. The same command resumes where it was stopped. One-step methods begin as the guided
student of 8 steps, which has the guidance inside, so that its budget is not part of theirs.

MobileDiffusion's two samplers (Zhao et al. 2023, arXiv:2311.16567) are `guided8` and `diffusion_gan`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hasten
from hasten.train import open_data
from hasten.train.data import Data
from hasten.train.encoded import encode_captioned, image_size
from hasten.workflows.distill import distill_model
from hasten.workflows.lora import extract_lora

SEED, BATCH = 0, 32


@dataclass(frozen=True)
class Run:
    """One student.

    Args:
        method: as `hasten distill --method` takes it.
        init: the run whose student it begins as; None: the teacher.
        rank: of the LoRA that the student is reduced to, and that is trained further; None: all weights are trained.
    """

    method: str
    init: str | None = None
    rank: int | None = None


# `guided8_longer` trains the first stage of `guided8` further (with --optimizer muon), then the second one anew: in the
# first run nearly all of the loss was the first stage's. Rates of the regressions by a trial of 40 steps on the
# guidance stage (1e-4 too low, 3e-4 and 1e-3 alike). The other methods' students begin as good ones, and their
# gradients are noisy.
RUNS = {
    "guided8": Run("guided:steps=(8,),start=32,guidance=none,lr=0.0005"),
    "guided8_slower": Run("guided:steps=(8,),start=32,guidance=none,lr=0.00015,first=1.5"),
    "guided8_longer": Run("guided:steps=(8,),start=32,guidance=none,lr=0.0005,first=3", "guided8/guidance"),
    "guided8_range": Run("guided:steps=(8,),start=32,guidance=(1,8),lr=0.0005,first=1.5"),
    "guided8_halves": Run("guided:steps=(16,8),start=32,guidance=none,lr=0.0005"),
    "diffusion_gan": Run("diffusion_gan:steps=4,times=all,sampled=1,lr=0.0002,critic_lr=0.0002", "guided8"),
    "diffusion_gan_pure": Run("diffusion_gan:steps=1,strength=0.1,lr=0.0001,critic_lr=0.0002", "guided8"),
    "consistency": Run("consistency:nodes=16,grid=trailing,solver=euler,lr=0.0003,steps=1", "guided8"),
    "consistency_lora": Run("consistency:nodes=16,grid=trailing,solver=euler,lr=0.0005,steps=4", "consistency", 16),
    "lcm": Run("consistency:nodes=50,grid=trailing,solver=euler,momentum=0.95,guidance=(1,8),lr=0.0003,steps=4"),
    "adversarial": Run("adversarial:steps=1,augment=false,lr=0.00005,critic_lr=0.0002", "guided8"),
    "dmd": Run("dmd:steps=1,lr=0.00005,fake_lr=0.00005", "guided8"),
    "progressive": Run("progressive:steps=(2,1),start=8,lr=0.0005", "guided8"),
}


def train(name: str, teacher: hasten.Model, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """Distil one student, or load what is there; returns the run's result."""
    run = RUNS[name]
    init: hasten.Model | Path | None = None
    if run.init is not None:
        folder = args.out / run.init
        if not (folder / "model.json").is_file():
            train(run.init, teacher, data, args)
        init = hasten.load(folder)
        if run.rank is not None:
            file = args.out / f"{run.init}_rank{run.rank}.safetensors"
            if not file.is_file():
                extract_lora(teacher, init, run.rank, file)
            init = file
    if name == "progressive" and isinstance(
        init, hasten.Model
    ):  # its teacher is the student of 8 steps, at the nodes that it knows
        teacher, init = init, None
    print(f"{name}: {run.method}", flush=True)
    return distill_model(
        teacher,
        args.out / name,
        run.method,
        data,
        init=init,
        minutes=args.minutes if args.steps is None else None,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        batch_size=args.batch_size,
        seed=SEED,
        precision=args.precision,
        optimizer=args.optimizer,
        log=lambda line: print(line, flush=True),
        command=f"python -m recipes.emoji_students {args.model} {args.data} --only {name}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="guided8,diffusion_gan,consistency,adversarial,dmd", help="comma-separated")
    parser.add_argument("--minutes", type=float, default=20.0, help="for each student")
    parser.add_argument("--steps", type=int, help="for each student, in place of minutes")
    parser.add_argument("--guidance-scale", type=float, help="default: the model's recommended one")
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--optimizer", default="adamw")
    args = parser.parse_args()
    teacher = hasten.load(args.model)
    channels, height, width = image_size(teacher)
    images = open_data(args.data, size=(height, width), channels=channels, label="none")
    data = encode_captioned(teacher, images, args.out / "encoded")
    for name in args.only.split(","):
        result = train(name, teacher, data, args)
        print(json.dumps({"student": name, **{key: result[key] for key in ("folder", "evaluations", "seconds")}}))


if __name__ == "__main__":
    main()
