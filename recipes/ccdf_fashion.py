"""Super-resolution of Fashion-MNIST test images by the bundled teacher, from their upsampling and from noise.

    python -m recipes.ccdf_fashion --out runs/ccdf [--data FOLDER]

Images of 28x28 are averaged over squares of 2x2 or 4x4 (14x14, 7x7) and restored without the class (null label) by
UniPC-2 with exact consistency: `ccdf` starts at t0 from the bicubic upsampling, the full process from pure noise. t0 is
selected on training images, among those that `smallest_time` returns for several fractions of the upsampling's squared
error (along the principal directions that consistency leaves free), by the Frechet distance at the smallest number of
evaluations.

Result, torch 2.13: 500 test images, seeds 0-499, t0 selected on 200 training images (seeds from 100,000); fraction .2
both times. F: Frechet distance to the test split in the bundled classifier's features (the 500 images themselves .35);
accuracy of that classifier (themselves .934); features: squared distance of its features to the true image's.

| 4x | NFE | PSNR, dB | accuracy | F (95 % interval) | features |
| --- | --- | --- | --- | --- | --- |
| bicubic, consistent | 0 | 16.32 | .540 | 18.5 (17.4-19.6) | 33.0 |
| ccdf, t0 .771 | 2 | 17.00 | .740 | 5.84 (5.16-6.52) | 19.9 |
| ccdf, t0 .771 | 4 | 16.28 | .746 | 2.75 (2.25-3.25) | 17.8 |
| ccdf, t0 .771 | 6 | 16.09 | .740 | 2.65 (2.17-3.14) | 17.7 |
| full | 4 | 16.22 | .718 | 4.34 (3.69-4.99) | 20.2 |
| full | 8 | 15.65 | .726 | 2.43 (1.95-2.91) | 19.5 |
| full | 16 | 15.65 | .730 | 2.61 (2.13-3.10) | 19.3 |
| full | 32 | 15.66 | .736 | 2.64 (2.15-3.12) | 19.2 |

| 2x | NFE | PSNR, dB | accuracy | F (95 % interval) | features |
| --- | --- | --- | --- | --- | --- |
| bicubic, consistent | 0 | 19.76 | .846 | 6.06 (5.12-6.99) | 11.9 |
| ccdf, t0 .631 | 2 | 20.86 | .886 | 1.69 (1.23-2.15) | 6.64 |
| ccdf, t0 .631 | 4 | 20.77 | .886 | 1.01 (.65-1.37) | 6.21 |
| ccdf, t0 .631 | 6 | 20.64 | .886 | 1.04 (.68-1.40) | 6.37 |
| full | 4 | 20.44 | .868 | 1.47 (1.07-1.87) | 7.39 |
| full | 8 | 20.17 | .872 | .97 (.62-1.32) | 6.98 |
| full | 16 | 20.13 | .872 | 1.02 (.67-1.37) | 7.02 |
| full | 32 | 20.13 | .874 | 1.04 (.68-1.39) | 7.04 |

With 4 evaluations ccdf has the Frechet distance of the full process with 8 to 32, within intervals, and is closer to
the true image than the full process at any number. By distance alone the saving is a factor of 2: the full process
converges with 8. Nearest-neighbour upsampling leaves block artefacts at 4x.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten import images as pictures
from hasten.files import write_file
from hasten.loading import load
from hasten.metrics import evaluate_images, extract, feature_net, frechet_distance, moments
from hasten.model import Model
from hasten.plan.draw import draw
from hasten.samplers import UniPC
from hasten.sampling import Noise
from hasten.starts.ccdf import CCDF, Consistent, down, smallest_time, up
from hasten.times import UniformLambda
from hasten.train import open_data, to_float

DATA = "/usr/share/datasets/fashion-mnist"  # of the Debian package dataset-fashion-mnist
FRACTIONS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
LOW = 0.03  # the teacher's own grid


def read(folder: str, split: str, n: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) in [-1, 1] and labels (n,), deterministic in the arguments."""
    data = open_data(folder, split)
    assert data.labels is not None
    indices = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[first : first + n]
    return to_float(data.images(indices)), data.labels[indices]


def free(x: Tensor, factor: int) -> Tensor:
    """The component of x that consistency leaves free: x minus its block means."""
    return x - up(down(x, factor), factor)


def times(x: Tensor, factor: int, model: Model) -> dict[float, float]:
    """t0 by fraction of the squared error, from the images `x` (n, 1, 28, 28)."""
    start = CCDF(factor=factor)
    error = (x - start.initial(down(x, factor), tuple(x.shape))).flatten(1).double()
    rest = free(x, factor).flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov((rest - rest.mean(0)).T))
    free_directions = values > 1e-6 * float(values.max())  # consistency determines the others
    squared = (error @ vectors[:, free_directions]).square().mean(0)
    schedule = model.denoiser.schedule
    return {
        fraction: smallest_time(schedule, values[free_directions], squared, fraction, "ddim") for fraction in FRACTIONS
    }


@torch.no_grad()
def restore(model: Model, y: Tensor, factor: int, steps: int, start: CCDF | None, seed: int = 0) -> Tensor:
    """Restore images (n, 1, 28, 28) from the small ones `y`; without `start` from pure noise, with consistency too."""
    images = []
    grid = UniformLambda(start=None if start is None else start.time, low=LOW)(model.denoiser.schedule, steps)
    with torch.autocast("cpu", torch.bfloat16):
        for first in range(0, len(y), 100):
            part = y[first : first + 100]
            noise = Noise(range(seed + first, seed + first + len(part)), model.shape)
            assert model.denoiser.null_label is not None
            label = torch.full((len(part),), model.denoiser.null_label)
            x = None if start is None else start.begin(model.denoiser, noise, grid[0], part)
            wrapped = Consistent(model.denoiser, part, factor)
            images.append(draw(wrapped, UniPC(2), grid, noise, x=x, label=label).float().clamp(-1, 1))
    return torch.cat(images)


def psnr(x: Tensor, truth: Tensor) -> float:
    """Mean over images of 10 log10(4 / mean squared error), dB; images in [-1, 1]."""
    return float((10 * torch.log10(4 / (x - truth).square().flatten(1).mean(1).clamp(min=1e-10))).mean())


def evaluate(x: Tensor, truth: Tensor, label: Tensor) -> dict[str, Any]:
    """PSNR, accuracy of the bundled classifier, Frechet distance to the test split, and squared feature distance to the
    true images."""
    net = feature_net("fashion")
    measures = evaluate_images(x, label, net, "fashion", None)
    feature_distance = (extract(net, x)[0] - extract(net, truth)[0]).square().sum(1).mean()
    return {
        "psnr": psnr(x, truth),
        "accuracy": measures["accuracy"].value,
        "frechet": measures["frechet"].value,
        "interval": measures["frechet"].interval,
        "features": float(feature_distance),
    }


def choose(model: Model, x: Tensor, factor: int, steps: int) -> tuple[CCDF, dict[str, Any]]:
    """Select t0 by the Frechet distance of restored training images to the originals."""
    net, candidates = feature_net("fashion"), {}
    mean, covariance = moments(extract(net, x)[0])
    for fraction, t0 in times(x, factor, model).items():
        start = CCDF(time=round(t0, 4), factor=factor)
        images = restore(model, down(x, factor), factor, steps, start, seed=100_000)
        distance = frechet_distance(*moments(extract(net, images)[0]), mean, covariance)
        candidates[fraction] = {"time": start.time, "frechet": distance, "psnr": psnr(images, x)}
    best = min(candidates, key=lambda fraction: candidates[fraction]["frechet"])
    return CCDF(time=candidates[best]["time"], factor=factor), {"share": best, "tried": candidates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data", default=DATA, help="folder with the four IDX files")
    parser.add_argument("--n", type=int, default=500, help="test images")
    parser.add_argument("--tuning", type=int, default=300, help="training images to select t0")
    parser.add_argument("--steps", type=int, nargs="*", default=[2, 3, 4, 6, 8], help="evaluations from t0")
    parser.add_argument("--full", type=int, nargs="*", default=[4, 8, 16, 32], help="evaluations from pure noise")
    parser.add_argument("--factors", type=int, nargs="*", default=[4, 2])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = load("fashion")
    train, _ = read(args.data, "train", args.tuning)
    x, label = read(args.data, "test", args.n)
    rows: list[dict[str, Any]] = [{"way": "the images themselves", **evaluate(x, x, label)}]
    for factor in args.factors:
        start, tuning = choose(model, train, factor, min(s for s in args.steps if s > 2))
        rows.append({"factor": factor, "way": "chosen", **tuning})
        y, shown = down(x, factor), [x[:10]]
        initial = start.initial(y, tuple(x.shape))
        shown += [up(y, factor)[:10], initial[:10]]
        rows.append(
            {"factor": factor, "way": "bicubic, consistent", "nfe": 0, **evaluate(initial.clamp(-1, 1), x, label)}
        )
        methods = [(steps, start) for steps in args.steps] + [(steps, None) for steps in args.full]
        for steps, start_from in methods:
            images = restore(model, y, factor, steps, start_from)
            if start_from is not None and steps == 4 or start_from is None and steps in (4, max(args.full)):
                shown.append(images[:10])
            method = "full" if start_from is None else f"ccdf:time={start_from.time:g},factor={factor}"
            rows.append({"factor": factor, "way": method, "nfe": steps, **evaluate(images, x, label)})
            print(json.dumps(rows[-1]), flush=True)
            (args.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
        sheet = pictures.make_image_grid(torch.cat(shown), columns=10)
        write_file(
            args.out / f"restored-{factor}.png", pictures.encode_png(sheet, {"rows": "true, small, bicubic, ..."})
        )


if __name__ == "__main__":
    main()
