"""Quality of cached features that are reused, extrapolated, or continued with fitted weights, at equal key steps.

    python -m benchmarks.forecasts --out forecasts.jsonl
    python -m benchmarks.forecasts --n 16 --only plain --only fitted        a trial

The bundled model, 50 steps of DDIM under guidance 2, encoder propagation with 10 key steps, searched with each way of
continuing the features on 8 images of other seeds. Reported against the plain images of the same seeds: PSNR (mean of
the images'), the Frechet distance to the data and its relative change, the key steps, and CPU seconds in turns, batch
by batch.
"""

from __future__ import annotations

import json
import math
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch
from torch import Tensor

import hasten
from hasten.accelerators._caching.wrapper import FeatureReuse
from hasten.metrics import evaluate_images, feature_net, reference
from hasten.metrics.difference import image_difference
from hasten.plan.draw import draw
from hasten.sampling import Noise

WAYS: dict[str, str] = {
    "reused": "encoder_propagation:keys=found,budget={keys},samples={samples}",
    "linear": "encoder_propagation:keys=found,budget={keys},samples={samples},extrapolate=1",
    "chebyshev": "encoder_propagation:keys=found,budget={keys},samples={samples},extrapolate=chebyshev",
    "fitted": "encoder_propagation:keys=found,budget={keys},samples={samples},extrapolate=fitted",
    "deep cache, reused": "deep_cache:keys=found,budget={keys},samples={samples}",
    "deep cache, fitted": "deep_cache:keys=found,budget={keys},samples={samples},extrapolate=fitted",
}


def frechet(images: Tensor, labels: Any) -> float:
    """The Frechet distance of the images of seeds 0, 1, ..."""
    statistics = reference("fashion")
    net = feature_net(statistics.features)
    return evaluate_images(images, labels, net, statistics, range(len(images)))["frechet"].value


@torch.no_grad()
def main(
    *,
    n: int = 64,
    steps: int = 50,
    keys: int = 10,
    samples: int = 8,
    guidance_scale: float = 2.0,
    batch: int = 16,
    only: Annotated[list[str], cyclopts.Parameter(negative=())] = [],  # noqa: B006
    out: Path | None = None,
) -> None:
    """Measure. `only`: some of the ways; the plain images are always made."""
    model = hasten.load("fashion")
    setting: dict[str, Any] = {"sampler": "ddim", "times": "trailing", "steps": steps, "guidance_scale": guidance_scale}
    runs: dict[str, Any] = {"plain": model.resolve(**setting, precision="fp32")}
    found: dict[str, tuple[int, ...]] = {}
    for name, text in WAYS.items():
        if not only or name in only:
            begin = time.process_time()
            spec = text.format(keys=keys, samples=samples)
            runs[name] = model.resolve(**setting, precision="fp32", accelerators=(spec,))
            found[name] = next(m for m in runs[name].denoiser.modules() if isinstance(m, FeatureReuse)).keys
            print(f"{name}: key steps {found[name]}, {time.process_time() - begin:.0f} CPU seconds", flush=True)
    images: dict[str, list[Tensor]] = {name: [] for name in runs}
    seconds = dict.fromkeys(runs, 0.0)
    labels = model.labels(n)
    for turn, first in enumerate(range(0, n, batch)):
        count = min(batch, n - first)
        noise = Noise(range(first, first + count), model.shape)
        cond = {} if labels is None else {"label": labels[first : first + count]}
        for name in list(runs) if turn % 2 == 0 else list(runs)[::-1]:
            resolved, begin = runs[name], time.process_time()
            x = draw(resolved.denoiser, None, resolved.times, noise, plan=resolved.plan, cond=cond)
            seconds[name] += time.process_time() - begin
            images[name].append(x)
        print(f"{first + count} of {n} images: " + ", ".join(f"{k} {v:.0f} s" for k, v in seconds.items()), flush=True)
    plain = torch.cat(images["plain"])
    measured = n >= 10  # fewer images are no distribution
    usual = frechet(plain, labels) if measured else math.nan
    for name, parts in images.items():
        result = torch.cat(parts)
        distance = frechet(result, labels) if measured else math.nan
        row = {
            "name": name,
            "psnr": round(image_difference(result, plain)["psnr"], 2),
            "frechet": round(distance, 4),
            "change": round(distance / usual - 1, 4),
            "keys": found.get(name),
            "speedup": round(seconds["plain"] / seconds[name], 2),
            "n": n,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        print(json.dumps(row), flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
