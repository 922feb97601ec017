"""Fit a plan over both branches of classifier-free guidance, within a budget of evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import BadInput
from ..plan.guided import guided_plan
from ..plan.table import Plan, plan
from ..times import CosineAngle, Quadratic, TimeGrid
from ._starts import resized, skipping_grids
from ._task import Tuned, TuningTask
from .fitted_plan import FittedPlan

__all__ = ["GuidedPlan"]


@dataclass(frozen=True)
class GuidedPlan(FittedPlan):
    """A fitted plan that evaluates the conditional and the unconditional branch one by one, where each is worth most.

        x_{k+1} = a_k x_k + b_k y_k + sum_{j<k} D[k, j] (y_j - y_k),      y_k = c(x_k, t_k) or u(x_k, t_k)

    Classifier-free guidance costs two evaluations a step, of both branches at one state. Here every evaluation has a
    state, a time and coefficients of its own, so that the scale too may differ from row to row, and only some of
    them evaluate the unconditional branch. All is fitted as in `FittedPlan`, to the fine solution *under guidance*. The
    starts are guidance in every step, in some steps with the last difference in the others (`guided_plan`), and in an
    interval, for each number of unconditional evaluations; the best is kept.

    The plan is for one guidance scale. Its NFE counts single branches: one of 12 costs what 6 guided steps cost.

    Args:
        evaluations: of single branches, at least 2. Default: the number of steps of the task's grid.
        uncond: at most this many of them evaluate the unconditional branch. Default: half.

    Raises:
        BadInput: for options out of range; in `tune`, without guidance, and under guidance with an interval, a
            rescaling or further guides.

    References:
        Ours. Guidance: Ho, Salimans 2022, arXiv:2207.12598.
    """

    evaluations: int | None = None
    uncond: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluations is not None and self.evaluations < 2:
            raise BadInput(f"guided_plan(evaluations={self.evaluations}): must be at least 2")
        if self.uncond is not None and self.uncond < 1:
            raise BadInput(
                f"guided_plan(uncond={self.uncond}): must be at least 1; without, there is no guidance to fit"
            )

    def tune(self, task: TuningTask) -> Tuned:
        """The fitted plan, and the errors before and after: root mean squared distances per entry."""
        guide: Any = getattr(task.denoiser, "guide", None) if self._has_branches(task) else None
        if guide is None or guide.interval is not None or guide.rescale:
            found = "no guidance" if guide is None else str(guide)
            raise BadInput(f"guided_plan needs a guidance scale other than 1 and no further guides, found {found}")
        if self._count(task) < 2:
            raise BadInput("guided_plan needs at least 2 evaluations, one of each branch")
        tuned = super().tune(task)
        assert tuned.plan is not None and tuned.plan.branches is not None
        tuned.figures["uncond"] = tuned.plan.branches.count("uncond")
        return tuned

    def candidates(self, fit: Any, task: TuningTask) -> Iterator[tuple[str, Plan]]:
        """The sampler on several grids, with each number of unconditional evaluations in several places."""
        schedule, scale, count = task.schedule, self._scale(task), self._count(task)
        top, ends = float(task.times[0]), float(task.times[-1]) == 0
        grids: dict[str, TimeGrid] = {}
        if ends and self.teleport:
            grids |= skipping_grids(schedule, top, fit.low)
        if ends and self.search == "all":
            grids |= {"angle .5": CosineAngle(start=top, scale=0.5), "quadratic": Quadratic(start=top)}
        found = False
        for evaluated in range(min(self.uncond or count, count // 2), 0, -1):
            steps = count - evaluated
            tables = {"": plan(task.sampler, schedule, resized(schedule, task.times, steps))}
            if steps > 1:
                tables |= {f" on {name}": plan(task.sampler, schedule, g(schedule, steps)) for name, g in grids.items()}
            for name, table in tables.items():
                if table.nfe != steps:
                    continue
                found = True
                for reuse in (True, False):
                    for places in (uncond_placements if reuse else intervals)(steps, evaluated):
                        where = ("unconditional in " if reuse else "interval ") + ",".join(map(str, places))
                        yield f"{table.sampler}{name}, {where}", guided_plan(table, scale, places, reuse=reuse)
        if not found:
            raise BadInput(
                f"guided_plan starts from samplers of one evaluation a step, not {type(task.sampler).__name__}"
            )

    def baseline(self, task: TuningTask) -> Plan:
        """The sampler under guidance in every step, with as many evaluations."""
        times = resized(task.schedule, task.times, max(self._count(task) // 2, 1))
        return guided_plan(plan(task.sampler, task.schedule, times), self._scale(task))

    def _has_branches(self, task: TuningTask) -> bool:
        return callable(getattr(task.denoiser, "branch", None))

    def _scale(self, task: TuningTask) -> float:
        denoiser: Any = task.denoiser
        return float(denoiser.guide.scale)

    def _count(self, task: TuningTask) -> int:
        return task.steps if self.evaluations is None else self.evaluations


def uncond_placements(steps: int, evaluated: int) -> list[tuple[int, ...]]:
    """Places of the unconditional evaluations: evenly, or one after another, from the first or the second step on."""
    even = tuple(i * steps // evaluated for i in range(evaluated))
    later = tuple(1 + i * (steps - 1) // evaluated for i in range(evaluated)) if evaluated < steps else even
    second = tuple(range(1, evaluated + 1)) if evaluated < steps else even
    return list(dict.fromkeys((even, later, tuple(range(evaluated)), second)))


def intervals(steps: int, evaluated: int) -> list[tuple[int, ...]]:
    """Consecutive steps, those of the noisier half; none where they are all steps."""
    if evaluated == steps:
        return []
    return [tuple(range(k, k + evaluated)) for k in range((steps - evaluated) // 2 + 1)]
