"""How far `preconditioned` is from the exact flow, on held-out mixtures, compared with UniPC on six grids.

python -m recipes.preconditioned_mixtures
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.exact import GaussianMixture, m2, m64
from hasten.plan import plan
from hasten.plan.basis import Basis
from hasten.samplers.preconditioned import Preconditioned, local_variance
from hasten.samplers.unipc import UniPC
from hasten.schedules import VE, Discrete, Schedule
from hasten.times import CosineAngle, Karras, Trailing, UniformLambda, UniformTime

SCHEDULES = {"linear": Discrete.linear(), "cosine": Discrete.cosine()}
STEPS = (5, 6, 8, 10, 15, 20)
# seed, dimensions, components, within-mode scale, decay of the scale over the dimensions
HELD_OUT = {"H1": (11, 16, 8, 0.3, 0.5), "H2": (12, 16, 40, 0.1, 0.5), "H3": (13, 64, 20, 0.5, 1.0)}
TRUTH = VE(sigma_min=1e-4, sigma_max=1e5)  # alpha = 1, any level at hand


def mixture(seed: int, d: int, K: int, b: float, a: float, schedule: Schedule) -> GaussianMixture:
    """Weights .5 + U(0, 1); means s_j N(0, 1), variances b^2 s_j^2 (.5 + U(0, 1)), s_j = (j + 1)^-a."""
    g = np.random.default_rng(seed)
    s = (np.arange(d) + 1.0) ** -a
    weights, means = 0.5 + g.random(K), g.standard_normal((K, d)) * s
    variances = b**2 * s**2 * (0.5 + g.random((K, d)))
    return GaussianMixture(*(torch.from_numpy(v) for v in (weights, means, variances)), schedule)


def varied(seed: int, schedule: Schedule) -> GaussianMixture:
    """A mixture of 3 to 40 components in 2 to 64 dimensions, from near-discrete to smooth."""
    g = np.random.default_rng(10_000 + seed)
    d, K = int(g.choice([2, 4, 8, 16, 32, 64])), int(g.integers(3, 41))
    b, a = float(np.exp(g.uniform(math.log(0.05), math.log(0.6)))), float(g.uniform(0.25, 1.25))
    return mixture(seed, d, K, b, a, schedule)


def problem(name: str, schedule: Schedule) -> GaussianMixture:
    """ "M2", "M64", "H1", "H2", "H3", or a seed of the varied ones, "200"."""
    if name in HELD_OUT:
        return mixture(*HELD_OUT[name], schedule)
    return {"M2": m2, "M64": m64}[name](schedule) if name.startswith("M") else varied(int(name), schedule)


def statistics(model: GaussianMixture, moments: str, samples: int = 500) -> dict[str, Tensor]:
    """Exact mean and covariance, and the local variances from 500 data points and the denoiser."""
    w, mu = model.weights, model.means
    mean = w @ mu
    covariance = torch.diag(w @ model.variances) + torch.einsum("k,ki,kj->ij", w, mu - mean, mu - mean)
    base = {"mean": mean, "covariance": covariance}
    v, U = torch.linalg.eigh(covariance)
    levels = torch.logspace(-2, 1.2, 24, dtype=torch.float64)
    x = model.sample(samples, torch.Generator().manual_seed(5))
    measured = local_variance(model, x, levels, Basis(mean, v, "matrix", U), batch=samples)
    return {**base, "local_levels": levels, "local_variance": measured} if moments == "local" else base


def methods(model: GaussianMixture) -> dict[str, Preconditioned]:
    """The sampler with local variances, with the covariance only, and with one variance and the largest."""
    full = Preconditioned(moments="full")
    base = statistics(model, "full")
    top, scalar = float(torch.linalg.eigvalsh(base["covariance"])[-1].sqrt()), base["covariance"].diagonal().mean()
    return {
        "local": full.bind(statistics(model, "local"), {}),
        "covariance": full.bind(base, {}),
        "scalar": Preconditioned(basis=Basis(base["mean"], scalar), top=top),
    }


def starts(model: GaussianMixture, rows: int, seed: int, q0: float) -> tuple[Tensor, Tensor]:
    """y at q0 and the end of the exact flow from it."""
    y = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, model.means.shape[1])))
    y = y * math.sqrt(1 + q0**2)
    exact = GaussianMixture(model.weights, model.means, model.variances, TRUTH)
    return y, exact.ode(y, TRUTH.time(-math.log(q0)), 0.0, rtol=1e-8, atol=1e-9)


def error(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """RMS over all entries, and the median over samples of each sample's RMS."""
    square = (found - exact).square().mean(1)
    return float(square.mean().sqrt()), float(square.sqrt().median())


def unipc(model: GaussianMixture, x: Tensor, exact: Tensor, steps: int, schedule: Schedule) -> tuple[float, float]:
    """The least error of UniPC-2 and -3 over six grids, selected for each cell, in its favour."""
    grids = [UniformLambda(), UniformTime(), Trailing(), Karras(), CosineAngle(), CosineAngle(scale=0.5)]
    found = [
        error(plan(UniPC(order), schedule, grid(schedule, steps))(model, x), exact)
        for grid in grids
        for order in (2, 3)
    ]
    return min(rms for rms, _ in found), min(median for _, median in found)


def rows(name: str, schedule_name: str, count: int) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """(method, its errors at each of STEPS) on one mixture."""
    schedule = SCHEDULES[schedule_name]
    model = problem(name, schedule)
    seed = 100 if name in HELD_OUT else 0
    t0 = torch.tensor(schedule.t_max, dtype=torch.float64)
    y, exact = starts(model, count, seed, float(schedule.q(t0)))
    x = y * schedule.alpha(t0)
    yield "UniPC, best grid", [unipc(model, x, exact, steps, schedule) for steps in STEPS]
    for label, sampler in methods(model).items():
        times = [UniformTime()(schedule, steps) for steps in STEPS]  # of which only the ends count
        yield label, [error(plan(sampler, schedule, grid)(model, x), exact) for grid in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", default="M2,M64,H1,H2,H3", help="comma-separated; a-b for a range of seeds")
    parser.add_argument("--schedules", default="linear,cosine")
    parser.add_argument("--rows", type=int, default=256, help="samples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = []
    for part in args.problems.split(","):
        low, dash, high = part.partition("-")
        names += [str(seed) for seed in range(int(low), int(high) + 1)] if dash else [part]
    if args.rows < 1:
        raise BadInput(f"rows must be 1 or more, found {args.rows}")
    totals: dict[tuple[str, str], list[Tensor]] = {}
    for name in names:
        for schedule_name in args.schedules.split(","):
            for label, cells in rows(name, schedule_name, args.rows):
                print(
                    f"{name:4} {schedule_name} {label:17}", " ".join(f"{r:.4f}/{m:.4f}" for r, m in cells), flush=True
                )
                totals.setdefault((schedule_name, label), []).append(torch.tensor(cells).log())
    for (schedule_name, label), cells in totals.items():
        means = torch.stack(cells).mean(0).exp().tolist()
        print(f"all  {schedule_name} {label:17}", " ".join(f"{r:.4f}/{m:.4f}" for r, m in means))


if __name__ == "__main__":
    main()
