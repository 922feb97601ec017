"""The average-brightness problem on real images, and its remedies.

    python -m recipes.fashion_brightness --out runs/brightness [--data FOLDER]

The images of Fashion-MNIST whose mean is among the lowest 30 % are one class, "dark", those among the highest 30 %
another, "bright". Two models of them, both fine-tuned for the same steps from the bundled teacher's weights:

- `table`: predicts the noise on Stable Diffusion's table, which ends at alpha = .068 (q = sigma / alpha = 14.6), with
  the usual loss of noise prediction. The teacher's U-Net predicts v; eps = sigma x_t + alpha v is the same function of
  the same weights, so they are a valid initialisation.
- `zero`: predicts v on the same table rescaled to end at alpha = 0 (Lin et al. 2023, arXiv:2305.08891).

`table` is sampled from N(0, I), as usual; after the step of SingDiffusion (Zhang et al. 2024, arXiv:2403.08381); and
from real images noised to the table's end, an upper bound that shows the remaining problem. `zero` starts at pure
noise.

Result, torch 2.13, one thread of two shared cores: 300 steps of 64 images each, seed 0; 1,000 images a class, seeds
0-1999, UniPC-2 with 16 steps. W1: 1-Wasserstein distance of the images' mean, in [-1, 1], to the test images of the
class; F: Frechet distance to them in the bundled classifier's features. 1,000 training images have W1 .0019 and .0090,
F .26 and .19.

| no guidance | dark: mean | W1 | F | bright: mean | W1 | F |
| --- | --- | --- | --- | --- | --- | --- |
| test images | -.711 | | | -.115 | | |
| `table` from N(0, I) | -.458 | .253 | 7.95 | -.262 | .156 | 3.71 |
| `table`, singdiffusion | -.658 | .068 | 3.02 | -.205 | .092 | 3.99 |
| `table`, noised real images | -.655 | .067 | 2.92 | -.207 | .094 | 3.26 |
| `zero` from N(0, I) | -.697 | .045 | 2.60 | -.149 | .039 | 2.95 |

So the step reaches the brightness of true noised images, the best that an initialisation can do; the remaining error is
that of the model, after 300 steps. It did not reduce the Frechet distance of the bright class. `zero`, at the same
cost, was better.

With guidance 2, 250 images a class (W1 of as many training images .0038 and .0099; F at this count is not comparable
with the above, its intervals are 1.3 to 2 either way):

| guidance 2 | dark: mean | W1 | F | bright: mean | W1 | F |
| --- | --- | --- | --- | --- | --- | --- |
| `table` from N(0, I) | -.519 | .192 | 6.20 | -.215 | .119 | 5.84 |
| `table`, singdiffusion | -.662 | .078 | 6.31 | -.118 | .070 | 7.45 |
| `table`, singdiffusion, undivided | -.758 | .079 | 8.85 | -.048 | .086 | 9.72 |
| `zero` from N(0, I) | -.802 | .091 | 7.95 | -.030 | .088 | 8.66 |

Here too brightness is corrected and the Frechet distance is not: guidance itself separates the two classes.

The first step is the table of class means: on a tenth of 20,000 of these images its loss is .24514; the paper's U-Net
(widths 32/64, no table) reached .24589 in 332 steps.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.guides import CFG
from hasten.loading import load
from hasten.metrics import evaluate_images, feature_net, reference_from_images
from hasten.nets.unet import UNet
from hasten.plan.draw import draw
from hasten.samplers import UniPC
from hasten.sampling import Noise
from hasten.schedules import Discrete, rescale_zero_snr
from hasten.starts import SingDiffusion
from hasten.times import UniformLambda
from hasten.train import Batches, Data, DenoisingLoss, Fit, TrainedModule, open_data, to_float
from hasten.tuning import TuningTask
from hasten.tuning.first_step import FirstStep

DATA = "/usr/share/datasets/fashion-mnist"  # of the Debian package dataset-fashion-mnist
SEED, BATCH, STEPS = 0, 64, 300
NAMES = ("dark", "bright")
LOW_Q = 0.0472  # the lowest noise level: the teacher's own grid, lambda:low=0.03


class OnTable(nn.Module):
    """The teacher's U-Net with the time input `lam` and eps or v prediction: `(x_t, lam (B,), label) -> raw (B, *S)`.

    eps = sigma x_t + alpha v on a variance-preserving path; the U-Net's own time is t = 2 atan(e^-lam) / pi.
    """

    def __init__(self, unet: UNet, says: str) -> None:
        super().__init__()
        self.unet, self.says, self.null_label = unet, says, unet.null_label

    def forward(self, x: Tensor, lam: Tensor, label: Tensor | None = None) -> Tensor:
        v = self.unet(x, 2 / math.pi * torch.atan(torch.exp(-lam)), label)
        if self.says == "v":
            return v
        alpha, sigma = (torch.sigmoid(2 * sign * lam).sqrt().view(-1, 1, 1, 1) for sign in (1, -1))
        return sigma * x + alpha * v


def halves(folder: str, split: str) -> Data:
    """The dark (0) and bright (1) images of a split; the thresholds are the training split's 30 % and 70 %."""
    train = open_data(folder, "train")
    means = to_float(train.images(range(len(train)))).mean((1, 2, 3))
    low, high = (float(means.quantile(p)) for p in (0.3, 0.7))
    data = train if split == "train" else open_data(folder, split)
    images = data.images(range(len(data)))
    mean = to_float(images).mean((1, 2, 3))
    inside = (mean <= low) | (mean >= high)
    return Data.of(images[inside], (mean[inside] >= high).long(), NAMES, f"{folder}, dark and bright")


def build(says: str, mix: Tensor) -> Denoiser:
    """The untuned model: the teacher's weights, with each class embedded as its `mix` (2, 10) of the ten."""
    old = load("fashion").denoiser.net
    net = UNet(**{**old.config, "classes": 2})
    weights = {k: v.clone() for k, v in old.state_dict().items()}
    embedding = weights["label.weight"]
    weights["label.weight"] = torch.cat([mix.to(embedding) @ embedding[:10], embedding[10:]])
    net.load_state_dict(weights)
    table = Discrete.scaled_linear()
    schedule = table if says == "eps" else rescale_zero_snr(table)
    return Denoiser(OnTable(net, says), schedule, says, clock="lam")


def train(out: Path, folder: str, says: str, steps: int = STEPS) -> Denoiser:
    """Train one of the two models, with averaged weights; resumes an interrupted run."""
    data = halves(folder, "train")
    assert data.labels is not None
    original = open_data(folder, "train")
    means = to_float(original.images(range(len(original)))).mean((1, 2, 3))
    low, high = (means.quantile(p) for p in (0.3, 0.7))
    assert original.labels is not None
    counts = [torch.bincount(original.labels[part], minlength=10) for part in (means <= low, means >= high)]
    mix = torch.stack([c / c.sum() for c in counts])
    denoiser = build(says, mix)
    loss = DenoisingLoss(label_drop=0.1)
    player = TrainedModule(says, denoiser, lambda batch: loss(denoiser, batch), lr=2e-4)
    fit = Fit(steps=steps, warmup=20, precision="bf16", seed=SEED, tensorboard=False)
    averaged = fit([player], Batches(data, BATCH, seed=SEED), out / says)[says]
    assert isinstance(averaged, Denoiser)
    return averaged.eval().requires_grad_(False)


@torch.no_grad()
def sample(model: Denoiser, n: int, scale: float, start: SingDiffusion | Tensor | None, steps: int = 16) -> Tensor:
    """Images (2 n, 1, 28, 28), classes in turn, seeds 0 .. 2 n - 1, by UniPC-2. A Tensor `start`: images to noise."""
    schedule = model.schedule
    grid = UniformLambda(low=float(schedule.time(-math.log(LOW_Q))))(schedule, steps)
    guided, images = CFG(scale=scale).wrap(model), []
    with torch.autocast("cpu", torch.bfloat16):
        for first in range(0, 2 * n, 100):
            noise = Noise(range(first, min(first + 100, 2 * n)), (1, 28, 28))
            label = torch.arange(first, first + len(noise)) % 2
            x = None
            if isinstance(start, Tensor):
                real = start[first : first + len(noise)]
                x = float(schedule.alpha(grid[0])) * real + float(schedule.sigma(grid[0])) * noise.initial()
            elif start is not None:
                x = start.begin(guided, noise, grid[0], label=label)
            images.append(draw(guided, UniPC(2), grid, noise, x=x, label=label).float().clamp(-1, 1))
    return torch.cat(images)


def evaluate(images: Tensor, test: Data, train_data: Data, references: dict[int, Any]) -> dict[str, Any]:
    """For each class: mean and deviation of brightness, its 1-Wasserstein distance to the test images' (brightness is
    the mean of an image in [-1, 1]), and the Frechet distance to them in the bundled classifier's features."""
    from scipy.stats import wasserstein_distance

    net, found = feature_net("fashion"), {}
    assert test.labels is not None and train_data.labels is not None
    for c, name in enumerate(NAMES):
        if c not in references:
            real = test.images((test.labels == c).nonzero()[:, 0])
            others = train_data.images((train_data.labels == c).nonzero()[:, 0])
            others = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:4000]]
            made = reference_from_images(real, f"fashion, {name}", "test", net, others=others)
            brightness = [to_float(v).mean((1, 2, 3)).numpy() for v in (real, others)]
            references[c] = made, brightness
        reference, (real_brightness, other_brightness) = references[c]
        own = images[c::2]
        brightness = own.mean((1, 2, 3)).numpy()
        frechet = evaluate_images(own, None, net, reference, f"{c}::2")["frechet"]
        found[name] = {
            "mean": float(brightness.mean()),
            "deviation": float(brightness.std()),
            "real_mean": float(real_brightness.mean()),
            "real_deviation": float(real_brightness.std()),
            "wasserstein": float(wasserstein_distance(brightness, real_brightness)),
            "wasserstein_floor": float(wasserstein_distance(other_brightness[: len(own)], real_brightness)),
            "frechet": frechet.value,
            "frechet_interval": frechet.interval,
            "frechet_floor": frechet.floor,
        }
    return found


def picture(brightness: dict[str, Tensor], test: Data, file: Path) -> None:
    """Histograms of the images' brightness, one panel per class; the test images are filled."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    assert test.labels is not None
    for c, axis in enumerate(axes):
        bins = torch.linspace(-1.0, 0.7, 69).numpy()
        real = to_float(test.images((test.labels == c).nonzero()[:, 0])).mean((1, 2, 3))
        axis.hist(real.numpy(), bins, density=True, color="0.8", label="test images")
        for name, values in brightness.items():
            axis.hist(values[c::2].numpy(), bins, density=True, histtype="step", linewidth=1.4, label=name)
        axis.set_title(f'class "{NAMES[c]}"')
        axis.set_xlabel("mean of an image, in [-1, 1]")
    axes[1].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--data", default=DATA, help="folder with the four IDX files")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each model")
    parser.add_argument("--n", type=int, default=1000, help="images a class")
    parser.add_argument("--scales", type=float, nargs="*", default=[1.0, 2.0], help="guidance scales")
    args = parser.parse_args()
    table, zero = (train(args.out, args.data, says, args.steps) for says in ("eps", "v"))
    data, test = halves(args.data, "train"), halves(args.data, "test")
    assert data.labels is not None

    def images(n: int) -> tuple[Tensor, Tensor]:
        assert data.labels is not None
        indices = torch.randperm(len(data), generator=torch.Generator().manual_seed(SEED))[:n]
        return to_float(data.images(indices)), data.labels[indices]

    task = TuningTask(table, UniPC(2), torch.tensor([1.0, 0.0]), (1, 28, 28), images=images, n=len(data))
    tuned = FirstStep().tune(task)
    start = SingDiffusion().bind({}, tuned.parts)
    rows = torch.stack([(data.labels == c).nonzero()[: args.n, 0] for c in (0, 1)], 1).flatten()
    variants: dict[str, tuple[Denoiser, Any]] = {
        "from N(0, I)": (table, None),
        "singdiffusion": (table, start),
        "singdiffusion, undivided": (table, SingDiffusion(divide=False, net=start.net)),
        "zero-SNR, v": (zero, None),
        "from noised real images": (table, to_float(data.images(rows))),
    }
    references: dict[int, Any] = {}
    results: list[dict[str, Any]] = [{"first_step": tuned.figures}]
    for scale in args.scales:
        brightness = {}
        for name, (model, begin) in variants.items():
            if (scale == 1 and "undivided" in name) or (scale != 1 and "real" in name):
                continue
            made = sample(model, args.n, scale, begin)
            brightness[name] = made.mean((1, 2, 3))
            results.append({"way": name, "guidance_scale": scale, **evaluate(made, test, data, references)})
            print(json.dumps(results[-1]), flush=True)
            (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        picture(brightness, test, args.out / f"brightness-{scale:g}.png")


if __name__ == "__main__":
    main()
