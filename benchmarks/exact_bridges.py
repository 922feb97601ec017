"""Samplers of bridges with the exact denoiser of a mixture: DBIM, the hybrid sampler, and diffusion from noise.

    python -m benchmarks.exact_bridges

One dimension, source .2, three modes of deviation .05. Figures: the Wasserstein-1 distance of 20,000 results to as many
draws of the target (about .003 for two sets of draws), by number of model evaluations; no training, half a minute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hasten.exact import GaussianMixture
from hasten.processes import DDBM
from hasten.processes._pinned import bridge_coefficients
from hasten.samplers import UniPC
from hasten.samplers.dbim import DBIM
from hasten.samplers.ddbm import DDBMSampler
from hasten.sampling import walk
from hasten.schedules import VPCosine
from hasten.times import Karras, Trailing, UniformLambda

MEANS, WEIGHTS = torch.tensor([-0.3, 0.1, 0.6]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
STD, SOURCE, N = 0.05, 0.2, 20_000


class Mixture(nn.Module):
    """E[x_0 | z_t, source]."""

    def __init__(self, process: DDBM) -> None:
        super().__init__()
        self.schedule = process

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """The estimate, (B, 1)."""
        a, b, c = bridge_coefficients(self.schedule, t)
        total, d = (b * STD) ** 2 + c**2, z - a * SOURCE - b * MEANS
        chances = WEIGHTS.expand_as(d) if float(b) == 0 else torch.softmax(WEIGHTS.log() - d**2 / (2 * total), -1)
        shift = 0 * d if float(b) == 0 else b * STD**2 / total * d
        return (chances * (MEANS + shift)).sum(-1, keepdim=True)


def main() -> None:
    """Print one line a process and sampler."""
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(N, 1, generator=generator, dtype=torch.float64)

    rows = torch.multinomial(WEIGHTS, N, True, generator=generator)
    target = (MEANS[rows] + STD * noise()[:, 0]).sort()[0]

    def distance(sampler: Any, denoiser: nn.Module, x: Tensor, times: Tensor) -> float:
        return round(float((walk(sampler, denoiser, x, times, noise)[:, 0].sort()[0] - target).abs().mean()), 4)

    x = torch.full((N, 1), SOURCE, dtype=torch.float64)
    for name, process in (("vp", DDBM()), ("ve, sigma_max=2", DDBM(base="ve", sigma_max=2.0))):
        net = Mixture(process)
        for order in (1, 2):
            found = {k: distance(DBIM(order=order), net, x, Karras()(process, k)) for k in (2, 5, 10, 20)}
            print(f"ddbm {name}: dbim:order={order}, karras", found)
        for grid in (Karras(), Trailing()):
            found = {3 * k - 1: distance(DDBMSampler(), net, x, grid(process, k)) for k in (2, 4, 7, 17)}
            print(f"ddbm {name}: ddbm, {grid.name}", found)
    schedule = VPCosine()
    ordinary = GaussianMixture(WEIGHTS, MEANS[:, None], torch.full((3, 1), STD**2).double(), schedule)
    counts = {
        k: distance(UniPC(2), ordinary, noise(), UniformLambda(low=0.03)(schedule, k)) for k in (2, 5, 10, 20, 50)
    }
    print("from noise: unipc, lambda:low=0.03", counts)


if __name__ == "__main__":
    main()
