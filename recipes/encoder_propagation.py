"""Cost and quality of feature caching on the bundled teacher, at 50 DDIM steps.

    python -m recipes.encoder_propagation --out runs/reuse.jsonl --n 1000
    python -m recipes.encoder_propagation --out runs/reuse.jsonl --only paper --only found --n 100 --no-timing

One JSON line per variant: the number of encoder and decoder evaluations in a trajectory, the speed-up in
multiply-accumulates (`macs`) and, from interleaved runs, in time (`seconds` and `cpu_seconds`, a ratio with its range),
the error relative to the plain sampler (root mean square), the Frechet distance of the images of seeds 0, 1, ... and
its relative change from the plain sampler's. The key steps are searched on other seeds. Time ratios on a busy device
are unreliable: see their range.

Measured on 2026-11-21 at guidance scale 1 with n = 64 and samples = 4 (with so few images only the
rows of this table are comparable). "macs" is the speed-up in multiply-accumulates; error and change are relative to the
plain sampler:

    variant               keys   macs    error   distance   change
    plain                   50   1.000       0      1.589        -
    paper                    9   1.363   0.147      4.300   +171 %
    paper, forecast          9   1.363   0.074      2.213    +39 %
    uniform                  9   1.363   0.129      2.872    +81 %
    found                    9   1.363   0.113      2.716    +71 %
    found, forecast          9   1.363   0.077      1.743   +9.7 %
    found 14, forecast      14   1.305   0.029      1.618   +1.8 %
    deep cache, forecast    17   1.705   0.036      1.588   -0.0 %
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch
from torch import Tensor

import hasten
from hasten.accelerators._caching.wrapper import FeatureReuse
from hasten.metrics import evaluate_images, feature_net, reference
from hasten.performance.cost import interleave, macs, ratio

SEARCHED = "keys=found"
SEARCH = SEARCHED + ",samples={samples},seed=100000"  # after ";": options for sampling
VARIANTS = {
    "plain": None,
    "paper": "encoder_propagation",
    "paper, forecast": "encoder_propagation:extrapolate=1",
    "uniform": "encoder_propagation:keys=uniform,every=6",
    "uniform, forecast": "encoder_propagation:keys=uniform,every=6,extrapolate=1",
    "found": f"encoder_propagation:{SEARCH}",
    "found, forecast": f"encoder_propagation:{SEARCH};extrapolate=1",
    "found 6, forecast": f"encoder_propagation:{SEARCH},budget=6;extrapolate=1",
    "found 14, forecast": f"encoder_propagation:{SEARCH},budget=14;extrapolate=1",
    "found, forecast, parallel": f"encoder_propagation:{SEARCH};extrapolate=1,parallel=4",
    "deep cache": "deep_cache:every=3",
    "deep cache, forecast": "deep_cache:every=3,extrapolate=1",
}


def key_fractions(model: hasten.Model) -> dict[str, float]:
    """The fraction of the network's multiply-accumulates that only runs at key steps."""
    net: Any = model.denoiser.net
    x, time, label = torch.randn(1, *model.shape), torch.full((1,), 0.5), torch.zeros(1, dtype=torch.long)
    emb = net.embed(time, label)
    total, first = macs(net, x, time, label), net.shallow_encode(x, emb)
    return {"encoder_propagation": macs(net.encode, x, emb) / total, "deep_cache": macs(net.deep, first, emb) / total}


def wrapper(model: hasten.Model, config: dict[str, Any], accelerators: tuple[str, ...]) -> FeatureReuse:
    """The accelerated denoiser of a sampling configuration."""
    way = model.way(**config, accelerators=accelerators)
    return next(module for module in way.denoiser.modules() if isinstance(module, FeatureReuse))


def resolve_keys(
    model: hasten.Model, config: dict[str, Any], variants: dict[str, str | None]
) -> dict[str, tuple[str, ...]]:
    """The accelerators of every variant, with searches replaced by the key steps that they return."""
    keys: dict[str, tuple[int, ...]] = {}
    ways: dict[str, tuple[str, ...]] = {}
    for name, text in variants.items():
        if text is not None and SEARCHED in text:
            what, _, options = text.partition(":")
            of_search, _, rest = options.partition(";")
            if of_search not in keys:
                keys[of_search] = wrapper(model, config, (f"{what}:{of_search}",)).keys
            found = f"keys=({','.join(map(str, keys[of_search]))})"
            text = f"{what}:{found}{',' if rest else ''}{rest}"
        ways[name] = () if text is None else (text,)
    return ways


def clocked(call: Callable[[], Any], into: list[float]) -> None:
    """Run it and note its CPU seconds."""
    begun = time.process_time()
    call()
    into.append(time.process_time() - begun)


def frechet(images: Tensor, model: hasten.Model) -> float:
    """The Frechet distance of the images of seeds 0, 1, ..."""
    statistics = reference("fashion")
    measures = evaluate_images(
        images, model.labels(len(images)), feature_net(statistics.features), statistics, range(len(images))
    )
    return measures["frechet"].value


def main(
    out: Path = Path("runs/encoder_propagation.jsonl"),
    *,
    n: int = 1000,
    steps: int = 50,
    guidance_scale: Annotated[list[float], cyclopts.Parameter(negative=())] = [1.0, 2.0],  # noqa: B006
    only: Annotated[list[str], cyclopts.Parameter(negative=())] = [],  # noqa: B006
    samples: int = 8,
    timing: bool = True,
    batch: int = 16,
    repeats: int = 5,
    runtime: str = "fp32",
) -> None:
    """Measure.

    Args:
        out: a JSON line a row, added to what is there.
        n: images of the distance and the error.
        steps: of DDIM.
        guidance_scale: 1 is the plain conditional model.
        only: these variants (the plain one is always run).
        samples: images for the search of key steps.
        timing: whether to time a batch of `batch` images, `repeats` times in turn.
        batch: of the timing.
        repeats: of the timing.
        runtime: of the network.
    """
    model = hasten.load("fashion")
    fractions = key_fractions(model)
    unknown = set(only) - set(VARIANTS)
    if unknown:
        raise hasten.BadInput(f"unknown variant {min(unknown)!r}: {hasten.errors.nearest(min(unknown), VARIANTS)}")
    chosen = {name: text for name, text in VARIANTS.items() if name == "plain" or not only or name in only}
    out.parent.mkdir(parents=True, exist_ok=True)
    for scale in guidance_scale:
        config: dict[str, Any] = {"sampler": "ddim", "times": "trailing", "steps": steps, "guidance_scale": scale}
        ways = resolve_keys(
            model, config, {name: text and text.format(samples=samples) for name, text in chosen.items()}
        )
        seconds: dict[str, list[float]] = {}
        cpu: dict[str, list[float]] = {}
        if timing:
            calls = {}
            for name, way in ways.items():
                call = partial(model.sample, batch, **config, accelerators=way, precision=runtime)
                calls[name] = partial(clocked, call, cpu.setdefault(name, []))
            seconds = interleave(calls, repeats)
        plain: Tensor | None = None
        usual = 0.0
        for name, way in ways.items():
            row: dict[str, Any] = {"name": name, "guidance_scale": scale, "steps": steps, "n": n}
            if way:
                fast = wrapper(model, config, way)
                begun = fast.encoder_calls, fast.decoder_calls, fast.queries
                row |= {"accelerator": way[0], "keys": fast.keys}
            if n:
                images = model.sample(n, **config, accelerators=way, batch_size=100, precision=runtime)
                row["frechet"] = round(frechet(images, model), 4)
                plain = images if plain is None else plain
                usual = usual or row["frechet"]
                row["change"] = round(row["frechet"] / usual - 1, 4)
                row["error"] = round(float((images - plain).norm() / plain.norm()), 4)
            if way and n:
                many = max((fast.queries - begun[2]) // steps, 1)
                row["encoder_calls"] = (fast.encoder_calls - begun[0]) / many
                row["decoder_calls"] = (fast.decoder_calls - begun[1]) / many
            if way:
                row["macs"] = round(fast.expected_speedup(fractions[way[0].partition(":")[0]]), 3)
            if timing:
                for clock, times in (("seconds", seconds), ("cpu_seconds", cpu)):
                    found = ratio(times["plain"][-repeats:], times[name][-repeats:])
                    row[clock] = [round(value, 3) for value in (found.median, found.low, found.high)]
            print(json.dumps(row), flush=True)
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
