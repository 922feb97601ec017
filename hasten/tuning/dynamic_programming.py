"""The time grids with the best likelihood bound, for every number of steps at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_choice, check_numbers
from ..plan.table import plan
from ..samplers.analytic import curve, measured_table
from ..schedules.base import Schedule
from ..times import Karras, Quadratic, UniformLambda, UniformTime
from ._bound import VARIANCES, edge_costs, variational_bound
from ._task import Tuned, Tuner, TuningTask
from .moments import Moments

__all__ = ["DynamicProgramming", "Paths", "candidate_times", "shortest_paths"]


class Paths(NamedTuple):
    """The shortest paths from node 0 with exactly k edges, for k = 0 .. K.

    Args:
        cost: (K + 1, T + 1), of the path to each node, infinite where there is none.
        back: (K + 1, T + 1), the previous node.
    """

    cost: Tensor
    back: Tensor

    def nodes(self, k: int, end: int = -1) -> list[int]:
        """The k + 1 nodes of the path with k edges to node `end`, ascending.

        Raises:
            BadInput: if there is no such path.
        """
        node = range(self.cost.shape[1])[end]
        if not 0 <= k < len(self.cost) or torch.isinf(self.cost[k, node]):
            raise BadInput(f"there is no path of {k} steps to node {node}: choose 1 to {min(node, len(self.cost) - 1)}")
        path = [node]
        for row in range(k, 0, -1):
            path.append(int(self.back[row, path[-1]]))
        return path[::-1]


def shortest_paths(costs: Tensor, K: int) -> Paths:
    """`V[k, r] = min_s V[k-1, s] + L(s, r)`, V[0, 0] = 0, for all k up to K: O(K T^2).

    Args:
        costs: L (T + 1, T + 1), row s, column r, +inf where there is no edge.
        K: the largest number of edges.

    Raises:
        BadInput: for a table that is not square, or K < 1.

    References:
        Watson, Ho, Norouzi, Chan 2021, arXiv:2106.03802, section 4.
    """
    if costs.ndim != 2 or costs.shape[0] != costs.shape[1] or K < 1:
        raise BadInput(f"shortest_paths needs a square table and K >= 1, found {tuple(costs.shape)} and K = {K}")
    V = torch.full(costs.shape[:1], torch.inf, dtype=costs.dtype)
    V[0] = 0.0
    cost, back = [V], [torch.zeros(len(V), dtype=torch.long)]
    for _ in range(K):
        V, s = (V[:, None] + costs).min(0)
        cost.append(V)
        back.append(s)
    return Paths(torch.stack(cost), torch.stack(back))


def candidate_times(schedule: Schedule, start: float, count: int) -> Tensor:
    """0 and `count` times from `schedule.t_min` to `start`, equally spaced in lam: (count + 1,), ascending."""
    return UniformLambda(start=start)(schedule, count).flip(0)


@dataclass(frozen=True)
class DynamicProgramming(Tuner):
    """The grid with the best evidence lower bound of ancestral sampling, among all subsets of a fine grid.

    The bound of a chain of steps is the sum of the costs L(s, r) of its steps (see `edge_costs`), which depend on the
    model only through MSE_r = E||x - x0(z_r)||^2. So the best chain of exactly K steps from the noise to t = 0 is a
    shortest path, found for all K at once in O(K T^2).

    MSE is the model's statistic `mse` (`--method moments`), or is measured on `images` real images and saved. The
    result is the plan of the task's sampler on the best grid with as many steps as the task's. Figures, in bits per
    dimension: its bound and those of the grid it replaces and of `uniform`, `quadratic`, `karras` and `lambda`.

    The best bound often does not give the best images: it has many steps near t = 0, on invisible detail. Measure both.

    Args:
        variance: of the steps: "small" and "large" as in DDPM, or "analytic", the optimal one.
        candidates: T, the size of the fine grid.
        decoder: standard deviation of the last step's Gaussian. Default: the best one for each time.
        levels: grey levels in [-1, 1], 0 for data with a density.
        images: number of images to measure MSE with.
        points: number of times to measure MSE at.

    Raises:
        BadInput: for options out of range; in `tune`, if there is neither MSE nor images, for a grid that does not end
            at 0 and for more steps than candidates.

    References:
        Watson, Ho, Norouzi, Chan 2021, arXiv:2106.03802.
    """

    needs_data: ClassVar[bool] = False
    variance: str = "small"
    candidates: int = 500
    decoder: float | None = None
    levels: int = 256
    images: int = 500
    points: int = 64
    mse: tuple[tuple[float, ...], tuple[float, ...]] | None = field(default=None, repr=False, metadata={"bound": True})

    def __post_init__(self) -> None:
        check_choice("dynamic_programming variance", self.variance, VARIANCES)
        if self.candidates < 2 or self.levels < 0 or self.levels == 1 or self.images < 16 or self.points < 2:
            raise BadInput(
                f"dynamic_programming needs candidates >= 2, levels >= 2 or 0, images >= 16, points >= 2, found {self}"
            )
        check_numbers(self)

    def bind(self, statistics: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> DynamicProgramming:
        """The method with the model's squared errors if they were measured."""
        return replace(self, mse=measured_table(statistics, "mse")) if "mse" in statistics else self

    def tune(self, task: TuningTask) -> Tuned:
        """The plan on the best grid."""
        times = task.times.detach().double()
        if times[-1] != 0:
            raise BadInput(f"dynamic_programming needs a grid that ends at t = 0, found {float(times[-1]):g}")
        if task.steps > self.candidates:
            raise BadInput(f"dynamic_programming: {task.steps} steps of {self.candidates} candidates: raise candidates")
        statistics: dict[str, Tensor] = {}
        bound = self
        if self.mse is None:
            statistics = self._measure(task)
            bound = self.bind(statistics, {})
        mse = bound.errors(task.schedule)
        grid = candidate_times(task.schedule, float(times[0]), self.candidates)
        paths = shortest_paths(self.costs(task.schedule, grid, mse), task.steps)
        best = grid[paths.nodes(task.steps)].flip(0)

        def bits(chain: Tensor) -> float:
            errors = mse(task.schedule.lam(chain[:-1]))
            bound = variational_bound(
                task.schedule, chain, errors, self.variance, decoder=self.decoder, width=self.width
            )
            return float(f"{bound.total:.6g}")

        figures: dict[str, Any] = {"bits_per_dimension": bits(best), "bits_per_dimension_before": bits(times)}
        start = float(times[0])
        for spacing in (UniformTime, Quadratic, Karras, UniformLambda):
            figures[f"bits_per_dimension_{spacing.name}"] = bits(spacing(start=start)(task.schedule, task.steps))
        figures |= {"variance": self.variance, "candidates": self.candidates}
        return Tuned(plan=plan(task.sampler, task.schedule, best), statistics=statistics, figures=figures)

    def errors(self, schedule: Schedule) -> Callable[[Tensor], Tensor]:
        """The squared error as a function of lam, interpolated from the measured ones."""
        if self.mse is None:
            raise BadInput("dynamic_programming has no squared errors yet: bind(statistics, {}) or tune(task)")
        return curve(self.mse, schedule, "mse")

    @property
    def width(self) -> float:
        """The width of a grey level in [-1, 1]."""
        return 2 / (self.levels - 1) if self.levels else 0.0

    def costs(self, schedule: Schedule, grid: Tensor, mse: Callable[[Tensor], Tensor]) -> Tensor:
        """The costs of all steps between grid times (T + 1, T + 1), nats per dimension; `mse` a function of lam."""
        errors = torch.cat([torch.zeros(1, dtype=torch.float64), mse(schedule.lam(grid[1:]))])
        return edge_costs(schedule, grid, errors, self.variance, decoder=self.decoder, width=self.width)

    def _measure(self, task: TuningTask) -> dict[str, Tensor]:
        """Measure the squared errors on real images."""
        if task.images is None:
            raise BadInput(
                "dynamic_programming needs the model's squared errors or real images to measure them: --data"
            )
        measure = Moments(times=self.points, images=self.images)
        statistics = measure.tune(task).statistics
        return {key: statistics[key] for key in ("mse_times", "mse")}
