"""Diffusion normalizing flow: the bound of a learned forward drift against a fixed one, on a checkerboard in the plane.

    python -m benchmarks.diff_flow --steps 10 --iterations 3000 [--seeds 3]

Two chains of the same number of steps, with the same networks and training: of one the forward drift is -z/2, of the
other it is learned too (`hasten.train.diff_flow`). The figure is the loss on new points, an upper bound of minus the
log likelihood in nats, with its standard error; the entropy of the checkerboard is ln 8 = 2.079.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hasten.train.diff_flow import DiffFlow


def checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """n points, uniform on the 8 black squares of a 4x4 board of side 4, (n, 2)."""
    cell = torch.randint(0, 8, (n,), generator=generator)
    row, column = cell // 2, 2 * (cell % 2) + (cell // 2) % 2
    return torch.stack([column, row], 1) - 2 + torch.rand(n, 2, generator=generator)


class Field(nn.Module):
    """A perceptron of z (B, 2) and t (B,), zero at first."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        u = t[:, None]
        return self.net(torch.cat([z, u, (-u).exp(), u.sin(), u.cos()], 1))


def fixed(z: Tensor, t: Tensor) -> Tensor:
    """The drift of the variance-preserving process."""
    return -z / 2


def bound(flow: DiffFlow, learned: bool, iterations: int, seed: int, batch: int = 512) -> tuple[float, float]:
    """The mean of the loss on 20,000 new points after training, and its standard error."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    extra, score_net = Field(), Field()
    drift: Callable[[Tensor, Tensor], Tensor] = (lambda z, t: -z / 2 + extra(z, t)) if learned else fixed

    def score(z: Tensor, t: Tensor) -> Tensor:
        return -z + score_net(z, t)

    networks = nn.ModuleList([score_net, *([extra] if learned else [])])
    optimiser = torch.optim.Adam(networks.parameters(), 2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    for _ in range(iterations):
        optimiser.zero_grad()
        flow.loss(checkerboard(batch, generator), drift, score).mean().backward()
        nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimiser.step()
        decay.step()
    with torch.no_grad():
        values = flow.loss(checkerboard(20_000, generator), drift, score)
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--horizon", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    flow = DiffFlow(args.steps, args.horizon)
    print("| drift | seed | bound, nats |\n| --- | --- | --- |")
    for name, learned in (("fixed", False), ("learned", True)):
        for seed in range(args.seeds):
            value, error = bound(flow, learned, args.iterations, seed)
            print(f"| {name} | {seed} | {value:.3f} +- {error:.3f} |", flush=True)


if __name__ == "__main__":
    main()
