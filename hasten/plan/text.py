"""Plans and schedules as readable text."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..schedules.base import Schedule
from .program import Program

__all__ = ["describe_schedule", "format_plan"]


def format_plan(plan: Any, numbers: Program) -> str:
    """A plan as text, one line per evaluation.

    Args:
        plan: a `Plan`.
        numbers: its program with coefficients as numbers.
    """
    name, x = plan.schedule.get("name", "?"), "x" if plan.basis is None else "u"
    lines = [f"{plan.sampler} on {name}: {plan.nfe} network evaluations"]
    if plan.basis is not None:
        low, high = (float(v) for v in plan.basis.values[[0, -1]])
        lines.append(f"{plan.basis.kind} basis, {plan.basis.groups} variances from {low:.6g} to {high:.6g}")
    answers = [f"{x}0"] * plan.nfe
    if plan.branches is not None:
        answers = [f"{x}0{branch}" for branch in plan.branches]
        lines.append(f"branches of guidance one by one, for guidance_scale {plan.guidance_scale:g}")
    if plan.begin is not None:
        start = " ".join(_format_term(c, f"{x}(t = {plan.begin:.6f})") for _, c in numbers.start.states)
        lines.append(f"                 {x}_0 = {start.removeprefix('+ ')}")
    for k, row in enumerate(numbers.rows):
        terms = [(c, f"{x}_{j}") for j, c in row.states] + [(c, f"{answers[j]}_{j}") for j, c in row.outputs]
        terms += [(c, f"xi_{j}") for j, c in row.draws]
        text = " ".join(_format_term(c, what) for c, what in terms) or "0"
        lines.append(f"t_{k} = {float(plan.times[k]):.6f}   {x}_{k + 1} = {text.removeprefix('+ ')}")
    return "\n".join([*lines, f"t_{plan.nfe} = {float(plan.times[-1]):.6f}"])


def _format_term(c: Any, what: str) -> str:
    """A term: "+ 0.5 x_0", or with the smallest and the largest number of all directions, "+ [0.5, 0.7] u_0"."""
    if isinstance(c, Tensor):
        return f"+ [{float(c.min()):.6g}, {float(c.max()):.6g}] {what}"
    return f"{'-' if c < 0 else '+'} {abs(c):.6g} {what}"


def describe_schedule(schedule: Schedule) -> str:
    """A schedule in a message: a table by its length."""
    text = repr(schedule)
    table = getattr(schedule, "alphas_cumprod", None)
    return text if table is None else f"{type(schedule).__name__}(table of {len(table)}, last {table[-1]:.4g})"
