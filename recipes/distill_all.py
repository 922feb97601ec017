"""All distillation methods on the bundled teacher, with the same number of model evaluations in training.

    python -m recipes.distill_all --teacher runs/guided/guidance --out runs/all --evaluations 1.5e5
    python -m recipes.distill_all --out runs/all --table-only       only the table of existing results

--teacher: a model; here the student of stage one of `guided` (one evaluation a step with guidance inside), fixed at
--guidance-scale, so that no method needs two branches; methods that learn from data alone are evaluated without it.
Each method runs through `distill_model` with the options of METHODS, into its own folder; finished runs are not
repeated. Each student is evaluated at its number of steps, a network for several at all of them (consistency sampling:
at 1, 2, 4): distance, class accuracy, precision and recall of --n images of the seeds 0, 1, ... The two reference rows
are the teacher with the same number of steps (the best of a few samplers), and at its best. One JSON line per row in
`rows.jsonl`.
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
# regression methods use the learning rate that was best for stage one of `guided`; the others their default
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


def evaluate(model: hasten.Model, n: int, guidance_scale: float, **config: Any) -> dict[str, Any]:
    """Metrics of `n` images."""
    start = time.perf_counter()
    images = model.sample(n, batch_size=100, precision="bf16", guidance_scale=guidance_scale, **config)
    seconds = time.perf_counter() - start
    statistics = reference("fashion")
    measures = evaluate_images(images, model.labels(n), feature_net(statistics.features), statistics, range(n))
    figures = {name: measures[name].value for name in ("frechet", "accuracy", "precision", "recall")}
    return {**figures, "floor": measures["frechet"].floor, "n": n, "seconds_per_image": seconds / n}


def students(folder: Path) -> Iterator[tuple[str, int, hasten.Model, dict[str, Any]]]:
    """The students of a finished run: (stage, steps, model, sampling configuration)."""
    folders = sorted(p.parent for p in folder.glob("*/model.json"))
    for path in folders or [folder]:
        model = hasten.load(path)
        if model.card["distilled"]["figures"].get("direction") == "encode" or model.steps > max(STEPS):
            continue
        step_counts = (1, 2, 4) if model.sampler.startswith("consistency") else model.denoiser.step_counts
        for steps in step_counts or ():
            yield path.name, steps, model, {"sampler": model.sampler, "times": model.times, "steps": steps}
        if step_counts:
            continue
        yield path.name, model.steps, model, {}


def reference_rows(teacher: hasten.Model, n: int, scale: float) -> Iterator[dict[str, Any]]:
    """The teacher with few steps, each with the best of several samplers, and with many."""
    for steps in STEPS:
        configs = [{"sampler": s, "times": t, "steps": steps} for s, t in TEACHER if steps > 1 or s == "ddim"]
        candidates = [{**evaluate(teacher, n, scale, **config), "way": config} for config in configs]
        yield {"method": "teacher", "steps": steps, **min(candidates, key=lambda row: row["frechet"])}
    for config in ({"sampler": "ddim", "times": "trailing", "steps": 64}, {"sampler": "unipc:order=2", "steps": 32}):
        yield {"method": "teacher", "steps": config["steps"], "way": config, **evaluate(teacher, n, scale, **config)}


def kind(row: dict[str, Any]) -> str:
    """The kind of a row's stage: its name without the number of steps."""
    return row.get("stage", "").rstrip("0123456789")


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
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
    """Run the missing methods and print the table."""
    results = out / "rows.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    rows = read_json_lines(results)

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        append_json_line(results, row)

    if not table_only:
        loaded = hasten.load(teacher)
        pending = [n for n in ("teacher", *METHODS) if not only or n in only]
        pending = [n for n in pending if all(row["method"] != n for row in rows)]
        if "teacher" in pending:
            for row in reference_rows(loaded, n, guidance_scale):
                add(row)
        for name in pending:
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
                    precision="bf16",
                    show=False,
                )
            except HastenError as e:
                print(f"{name}: {e}", flush=True)
                continue
            for stage, steps, model, config in students(folder):
                row = {"method": name, "stage": stage, "steps": steps, "spec": method}
                row |= evaluate(model, n, model.guidance_scale, **config)
                add({**row, "training_evaluations": run["evaluations"], "training_seconds": run["seconds"]})
                print(
                    f"{name}, {steps} steps: distance {row['frechet']:.3f}, accuracy {row['accuracy']:.3f}", flush=True
                )
    print(table(rows))


if __name__ == "__main__":
    cyclopts.run(main)
