"""Every distillation method on the bundled teacher, at the same number of network evaluations of training.

    python -m recipes.distill_all --teacher runs/guided/guidance --out runs/all --evaluations 1.5e5
    python -m recipes.distill_all --out runs/all --table-only       the table of what is there

--teacher: a model; here the student of stage one of `guided` (one evaluation a step with guidance inside), fixed at
--guidance-scale, so that no method pays for two branches; what learns from data alone is judged as it is. Each method
runs through `distill_model` with the options of METHODS, into a folder of its own; what is finished is not done again.
Each student is judged at its own number of steps, one network for several at all of those (consistency sampling: at
1, 2, 4): distance, class accuracy, precision and recall of --n images of the seeds 0, 1, ... The two reference rows are
the teacher with as many steps (the best of a few samplers), and at its best. One JSON line a row in `rows.jsonl`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cyclopts

import hasten
from hasten.errors import HastenError
from hasten.files import append_json_line, read_json_lines
from hasten.metrics import evaluate_images, feature_net, reference
from hasten.workflows.distill import distill_model

DATA = "/usr/share/datasets/fashion-mnist"
STEPS = (1, 2, 4, 8)
# what learns by regression has the rate that was best for stage one of `guided`; the rest have their own
METHODS: dict[str, str] = {
    "progressive": "progressive:steps=(8,4,2,1),start=32",
    "tract": "tract:lr=1e-3",
    "consistency distillation": "consistency:lr=1e-3",
    "consistency training": "consistency:mode=training,lr=1e-3",
    "denoising student": "denoising_student:pairs=6144,pair_steps=8,lr=1e-3",
    "reflow": "reflow:pairs=4096,pair_steps=8,lr=1e-3",
    "dsno": "dsno:pairs=4096,pair_steps=16,lr=1e-3",
    "rcfd": "rcfd:tau=1,lr=1e-3",
    "mmd": "mmd",
    "adversarial": "adversarial:start=progressive",
    "diffusion gan": "diffusion_gan",
    "denoising diffusion gan": "diffusion_gan:posterior=true",
    "sft-pg": "sft_pg:steps=4,last=0.05,balance=true,lr=2e-5",
    "dmd": "dmd",
    "prodiff": "prodiff:lr=1e-3",
    "guided, stochastic": "guided:steps=(8,4,2,1),start=32,kind=stochastic",
    "guided, one network": "guided:steps=(8,4,2,1),start=16,order=2,shared=true,last=3",
}
TEACHER = (("unipc:order=2", "lambda:low=0.05"), ("unipc:order=3", "lambda:low=0.05"), ("ddim", "trailing"))


def judged(model: hasten.Model, n: int, guidance_scale: float, **way: Any) -> dict[str, Any]:
    """Figures of `n` images."""
    began = time.perf_counter()
    images = model.sample(n, batch_size=100, runtime="bf16", guidance_scale=guidance_scale, **way)
    seconds = time.perf_counter() - began
    known = reference("fashion")
    seen = evaluate_images(images, model.labels(n), feature_net(known.features), known, range(n))
    told = {name: seen[name].value for name in ("frechet", "accuracy", "precision", "recall")}
    return {**told, "floor": seen["frechet"].floor, "n": n, "seconds_per_image": seconds / n}


def students(folder: Path) -> Iterator[tuple[str, int, hasten.Model, dict[str, Any]]]:
    """What a finished run left: (stage, steps, model, how to sample)."""
    found = sorted(p.parent for p in folder.glob("*/model.json"))
    for place in found or [folder]:
        model = hasten.load(place)
        if model.card["distilled"]["figures"].get("direction") == "encode" or model.steps > max(STEPS):
            continue
        several = (1, 2, 4) if model.sampler.startswith("consistency") else model.denoiser.step_counts
        for steps in several or ():
            yield place.name, steps, model, {"sampler": model.sampler, "times": model.times, "steps": steps}
        if several:
            continue
        yield place.name, model.steps, model, {}


def reference_rows(teacher: hasten.Model, n: int, scale: float) -> Iterator[dict[str, Any]]:
    """The teacher with few steps, the best of some samplers each, and with many."""
    for steps in STEPS:
        ways = [{"sampler": s, "times": t, "steps": steps} for s, t in TEACHER if steps > 1 or s == "ddim"]
        few = [{**judged(teacher, n, scale, **way), "way": way} for way in ways]
        yield {"method": "teacher", "steps": steps, **min(few, key=lambda row: row["frechet"])}
    for way in ({"sampler": "ddim", "times": "trailing", "steps": 64}, {"sampler": "unipc:order=2", "steps": 32}):
        yield {"method": "teacher", "steps": way["steps"], "way": way, **judged(teacher, n, scale, **way)}


def kind(row: dict[str, Any]) -> str:
    """What a row's stage did: its name without the count of steps."""
    return row.get("stage", "").rstrip("0123456789")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| method | steps | distance | accuracy | precision | recall | training |", "|---" * 7 + "|"]
    kinds: dict[str, set[str]] = {}
    for row in rows:
        kinds.setdefault(row["method"], set()).add(kind(row))
    for row in sorted(rows, key=lambda row: (row["steps"], row["frechet"])):
        name = row["method"] if len(kinds[row["method"]]) == 1 else f"{row['method']}, {kind(row)}"
        cost = "-" if "training_seconds" not in row else f"{row['training_seconds'] / 60:.0f} min"
        figures = " | ".join(f"{row[key]:.3f}" for key in ("frechet", "accuracy", "precision", "recall"))
        lines.append(f"| {name} | {row['steps']} | {figures} | {cost} |")
    return "\n".join(lines)


def main(
    *,
    out: Path,
    teacher: str = "fashion",
    data: str = DATA,
    guidance_scale: float = 2.0,
    evaluations: float = 1.5e5,
    n: int = 1000,
    batch_size: int = 64,
    only: list[str] | None = None,
    table_only: bool = False,
) -> None:
    """Run what is missing, a method after the other, and print the table."""
    kept = out / "rows.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    rows = read_json_lines(kept)

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        append_json_line(kept, row)

    if not table_only:
        loaded = hasten.load(teacher)
        wanted = [n for n in ("teacher", *METHODS) if not only or n in only]
        wanted = [n for n in wanted if all(row["method"] != n for row in rows)]
        if "teacher" in wanted:
            for row in reference_rows(loaded, n, guidance_scale):
                add(row)
        for name in wanted:
            if name == "teacher":
                continue
            folder, method = out / name.replace(" ", "-"), METHODS[name]
            try:
                run = distill_model(
                    hasten.load(teacher),
                    folder,
                    method,
                    data,
                    evaluations=evaluations,
                    batch_size=batch_size,
                    guidance_scale=guidance_scale,
                    runtime="bf16",
                    show=False,
                )
            except HastenError as e:
                print(f"{name}: {e}", flush=True)
                continue
            for stage, steps, model, way in students(folder):
                row = {"method": name, "stage": stage, "steps": steps, "spec": method}
                row |= judged(model, n, model.guidance_scale, **way)
                add({**row, "training_evaluations": run["evaluations"], "training_seconds": run["seconds"]})
                print(
                    f"{name}, {steps} steps: distance {row['frechet']:.3f}, accuracy {row['accuracy']:.3f}", flush=True
                )
    print(table(rows))


if __name__ == "__main__":
    cyclopts.run(main)
