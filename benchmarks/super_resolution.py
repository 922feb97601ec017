"""Super-resolution of aerial photographs: quality by number of network evaluations, and speed.

    python -m benchmarks.super_resolution quality --data aerial.zip --out rows.jsonl --models LWTDM=runs/lwtdm \
        SR3=runs/sr3 --counts 200 50 20 10 4 1 --limit 104 --crop 128
    python -m benchmarks.super_resolution speed --data aerial.zip --out speed.jsonl --baseline "SR3-like=runs/sr3" \
        --rows "LWTDM, DDIM 50=runs/lwtdm@sampler=ddim,steps=50" "4 steps=runs/student@steps=4"

`quality`: a row for bicubic enlargement of each factor, and for every model and number of steps: PSNR, SSIM, LPIPS,
Frechet distance and KID (EfficientNet-lite0) to the true images, and the consistency error, on the test split: --limit
squares of --crop pixels, the first of every image before the second ones. Models are NAME=FOLDER, with settings after
an @: `LWTDM=runs/lwtdm@sampler=ddim,times=uniform,start=temperature:value=0`, accelerators separated by a plus. Every
model is sampled with each number of --counts; one with `steps=` or `plan=` in its settings, or a student, with its own
number alone.

`speed`: seconds of one image of --side pixels, all rows in turns in one run, on --threads threads. --baseline is
sampled by ancestral sampling with 50 steps, from which the 2,000 of its chain are extrapolated, since each costs the
same; its row says so. The ratio is to the first row of --rows.

Rows that are in the file already are not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import hasten
from hasten.compare.counting import count_evaluations
from hasten.compare.restoration import sample_pairs
from hasten.files import append_json_line, read_json_lines
from hasten.model import Model
from hasten.performance.cost import interleave, ratio
from hasten.performance.device import processor
from hasten.plan.config import SamplingConfig
from hasten.workflows.restoration import RestorationPairs, open_pairs
from hasten.workflows.restoration_meter import RestorationMeter, open_meter

COUNTS = (2000, 500, 200, 50, 20, 10, 4, 1)
CHAIN, MEASURED = 2000, 50  # steps of the baseline's chain, and those that are measured
NUMBERS = {"steps": int, "guidance_scale": float}


def parse_row(text: str) -> tuple[str, str, dict[str, Any]]:
    """NAME, FOLDER and settings of `NAME=FOLDER@key=value,key=value`."""
    name, _, rest = text.partition("=")
    folder, _, options = rest.partition("@")
    settings: dict[str, Any] = {}
    key = ""
    for part in options.split(",") if options else ():
        left, equals, value = part.partition("=")
        if equals and left in (*SamplingConfig.names(),):
            key, settings[left] = left, value
        elif key:  # a comma within a value, such as of start=temperature:value=0.5,...
            settings[key] += f",{part}"
        else:
            raise SystemExit(f"{text}: settings are key=value with keys of SamplingConfig, found {part!r}")
    settings = {key: NUMBERS.get(key, str)(value) for key, value in settings.items()}
    if "accelerators" in settings:
        settings["accelerators"] = tuple(settings["accelerators"].split("+"))
    if not folder:
        raise SystemExit(f"a model is NAME=FOLDER, or NAME=FOLDER@steps=20,sampler=ddim, found {text!r}")
    return name, folder, settings


def own_steps(model: Model, settings: dict[str, Any]) -> bool:
    """Whether a model has a number of steps of its own: a student, or one that the settings name."""
    return "steps" in settings or "plan" in settings or "distilled" in model.card


def config_of(settings: dict[str, Any]) -> SamplingConfig:
    """How a row is sampled, in fp32 unless it says otherwise."""
    return SamplingConfig(**{"precision": "fp32", **settings})


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures with five digits."""
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in figures.items()}


def quality(given: argparse.Namespace) -> None:
    """Measure the missing rows of the table of quality."""
    known = {(row["name"], row["steps"], row["factor"], row["pairs"]) for row in read_json_lines(given.out)}
    opened: dict[tuple[int, str], tuple[RestorationPairs, RestorationMeter]] = {}
    for text in given.models:
        name, folder, settings = parse_row(text)
        model = hasten.load(folder)
        key = (model.source_factor, str(model.card.get("degrade")))
        if key not in opened:
            pairs = open_pairs(model, given.data, size=given.crop, n=given.limit, report=print)
            opened[key] = pairs, open_meter(pairs, given.border, None, given.lpips, report=print)
        pairs, meter = opened[key]
        common = {"factor": pairs.factor, "pairs": pairs.description, "measured_with": meter.settings}
        if ("bicubic", 0, pairs.factor, pairs.description) not in known:
            known.add(("bicubic", 0, pairs.factor, pairs.description))
            write(given.out, {"name": "bicubic", "steps": 0, "nfe": 0, **rounded(meter.bicubic()), **common})
        for count in [None] if own_steps(model, settings) else given.counts:
            how = settings if count is None else {**settings, "steps": count}
            resolved = model.resolve(config_of(how), batch_size=given.batch_size)
            steps = int(resolved.settings()["steps"])
            if (name, steps, pairs.factor, pairs.description) in known:
                continue
            with count_evaluations(model) as evaluations:
                images, seconds = sample_pairs(model, resolved, pairs, given.seed, given.batch_size)
            row = {"name": name, "steps": steps, "nfe": evaluations[0] / len(pairs), **rounded(meter.measure(images))}
            write(given.out, {**row, "seconds_per_image": seconds, **common, **describe(model, folder, resolved)})


def describe(model: Model, folder: str, resolved: Any) -> dict[str, Any]:
    """What a row says of its model."""
    weights = sum(p.numel() for p in model.denoiser.parameters())
    return {"folder": folder, "sha256": model.sha256, "weights": weights, "how": resolved.settings()}


def write(path: Path, row: dict[str, Any]) -> None:
    """Append and print a row."""
    append_json_line(path, {**row, "hardware": processor(torch.device("cpu")), "threads": torch.get_num_threads()})
    shown = {key: row.get(key) for key in ("name", "steps", "psnr", "ssim", "lpips", "frechet", "kid", "consistency")}
    print(" ".join(f"{key} {value}" for key, value in shown.items() if value is not None), flush=True)


def speed(given: argparse.Namespace) -> None:
    """Time all rows in turns."""
    torch.set_num_threads(given.threads)
    calls, described = {}, {}
    baseline = None if given.baseline is None else parse_row(given.baseline)
    rows = [parse_row(text) for text in given.rows]
    if baseline is not None:
        name, folder, settings = baseline
        rows.append((name, folder, {"sampler": "ddpm", "times": "uniform", **settings, "steps": MEASURED}))
    for name, folder, settings in rows:
        model = hasten.load(folder)
        pairs = open_pairs(model, given.data, size=given.side, n=1)
        resolved = model.resolve(config_of(settings), batch_size=1)
        calls[name] = lambda model=model, resolved=resolved, pairs=pairs: sample_pairs(model, resolved, pairs)
        described[name] = describe(model, folder, resolved)
    start = time.perf_counter()
    seconds = interleave(calls, given.rounds, warmup=1)
    first = next(iter(calls))
    for name, own in seconds.items():
        row = {"name": name, "side": given.side, "seconds": own, "median": statistics.median(own), **described[name]}
        if baseline is not None and name == baseline[0]:
            scale = CHAIN / MEASURED
            row |= {"measured_steps": MEASURED, "extrapolated_steps": CHAIN, "extrapolated": row["median"] * scale}
            print(f"{name}: {row['extrapolated']:.4g} s for {CHAIN} steps, extrapolated from {MEASURED} measured ones")
        speedup = ratio(seconds[first], own)
        row |= {"speedup": speedup.median, "speedup_low": speedup.low, "speedup_high": speedup.high, "against": first}
        print(f"{name}: {row['median']:.4g} s an image of {given.side} x {given.side}, {speedup} of {first}")
        append_json_line(given.out, {**row, "hardware": processor(torch.device("cpu")), "threads": given.threads})
    print(f"{given.rounds} rounds in {time.perf_counter() - start:.0f} s")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("table", choices=("quality", "speed"), nargs="?", default="quality")
    parser.add_argument("--data", default="aerial.zip", help="with a test split of images of --crop pixels or more")
    parser.add_argument("--out", type=Path, default=Path("super_resolution.jsonl"))
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=FOLDER[@steps=4,sampler=ddim]")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--limit", type=int, default=416)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--border", type=int, default=0)
    parser.add_argument("--lpips", help="trunk, file or folder of its weights")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME=FOLDER@steps=50,sampler=ddim")
    parser.add_argument("--baseline", metavar="NAME=FOLDER", help="whose 2,000 steps are extrapolated")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    (quality if given.table == "quality" else speed)(given)


if __name__ == "__main__":
    main()
