"""Blurring, soft, heat and cold diffusion on 8x8 garments, with a small network: minutes on one core.

    python -m benchmarks.blurring_small --data FASHION
    python -m benchmarks.blurring_small --data FASHION --rows blurring cold --steps 2000

The first 5,000 images of Fashion-MNIST, padded to 32x32 and averaged to 8x8; a residual MLP of 0.8 M weights, AdamW
2e-3 falling to 0, batch 256, 400 steps, averaged weights. A line for each process and sampler: the Frechet distance of
the pixels of 600 samples, seeds 0 to 599, to these images, at 10 and 25 steps of the uniform grid. The full-size
experiment is `benchmarks.blurring`.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.metrics.frechet import frechet_distance, moments
from hasten.pick import pick
from hasten.plan.draw import draw
from hasten.processes import Blurring, Soft
from hasten.sampling import Noise
from hasten.train import open_data
from hasten.train.data import to_float
from hasten.train.process_loss import ProcessLoss

DATA = "/usr/share/datasets/fashion-mnist"  # of the Debian package dataset-fashion-mnist
SHAPE = (1, 8, 8)
BLURRING = ("blurring:shrink=0", "blurring", "blurring:eta=0,shrink=0", "blurring:eta=0")
SOFT = ("soft", "soft:form=ode", "soft:form=naive")
ROWS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "plain": (Blurring(SHAPE, 0.0), ("blurring", "blurring:eta=0")),
    "blurring": (Blurring(SHAPE, 2.0), BLURRING),
    "soft": (Soft(SHAPE, blur_max=2.7), SOFT),
    "soft, noise 0.2": (Soft(SHAPE, blur_max=2.7, noise_max=0.2), SOFT),
    "heat": (
        Soft(SHAPE, blur_max=5.6, noise_min=0.02, noise_max=0.02),
        (*(f"soft:form=naive,noise={n:g}" for n in (0.5, 1.0, 1.25, 2.0)), "soft:form=cold"),
    ),
    "cold": (
        Soft(SHAPE, blur_max=8.0, noise_min=0.002, noise_max=0.002, objective="l1"),
        ("soft:form=naive,noise=0", "soft:form=cold"),
    ),
}


class Net(nn.Module):
    """A residual MLP of 64 pixels and a time."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.time = nn.Linear(32, width)
        self.first = nn.Linear(64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(3)
        )
        self.last = nn.Linear(width, 64)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        f = time[:, None] * torch.exp(torch.linspace(0, 5, 16))
        emb = self.time(torch.cat([f.sin(), f.cos()], 1))
        h = self.first(x.flatten(1)) + emb
        for block in self.blocks:
            h = h + block(h + emb)
        out: Tensor = self.last(h)
        return out.reshape(x.shape)


def train(process: Any, images: Tensor, steps: int, seed: int) -> Denoiser:
    """The denoiser with averaged weights."""
    torch.manual_seed(seed)
    denoiser = Denoiser(Net(), process, "v" if isinstance(process, Blurring) else "residual")
    average = {name: value.clone() for name, value in denoiser.state_dict().items()}
    optimiser, loss = torch.optim.AdamW(denoiser.parameters(), 2e-3), ProcessLoss(label_drop=0.0)
    for k in range(steps):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - k / steps)
        value = loss(denoiser, {"x": images[torch.randint(len(images), (256,))]})
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        for name, weight in denoiser.state_dict().items():
            average[name].lerp_(weight, 0.005)
    denoiser.load_state_dict(average)
    return denoiser.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=DATA, help="folder with the four IDX files of Fashion-MNIST")
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    x = to_float(open_data(args.data, "train", channels=1).images(torch.arange(10_000)))
    x = nn.functional.avg_pool2d(nn.functional.pad(x, (2, 2, 2, 2), value=-1.0), 4)
    images, reference = x[:5000], moments(x[:5000].flatten(1).double())
    floor = frechet_distance(*moments(x[5000:].flatten(1).double()), *reference)
    print(f"real-data baseline, 5,000 further images: {floor:.3f}")
    for name in args.rows:
        process, samplers = ROWS[name]
        process = process.fitted(images) if isinstance(process, Soft) else process
        began = time.perf_counter()
        denoiser = train(process, images, args.steps, args.seed)
        print(f"{name}: trained in {time.perf_counter() - began:.0f} s", flush=True)
        for sampler in samplers:
            found = []
            for steps in (10, 25):
                noise = Noise(range(args.images), SHAPE)
                drawn = draw(denoiser, sampler, pick("times", "uniform"), noise, steps=steps).clamp(-1, 1)
                found.append(frechet_distance(*moments(drawn.flatten(1).double()), *reference))
            print(f"  {sampler:28} " + "  ".join(f"{value:7.3f}" for value in found), flush=True)


if __name__ == "__main__":
    main()
