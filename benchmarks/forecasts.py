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

from .turns import in_turns, timed_draw

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

    def sample(name: str, first: int, count: int) -> None:
        cond = {} if labels is None else {"label": labels[first : first + count]}
        x, taken = timed_draw(runs[name], range(first, first + count), model.shape, cond)
        images[name].append(x)
        seconds[name] += taken

    in_turns(list(runs), [(first, min(batch, n - first)) for first in range(0, n, batch)], sample)
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
