"""Lazy access to `PlanScheduler`, whose module imports diffusers.

Saved pipelines name the class as `hasten.PlanScheduler`: diffusers loads them where hasten has been imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .library import diffusers

if TYPE_CHECKING:
    from .plan_scheduler import PlanScheduler

__all__ = ["PlanScheduler", "plan_scheduler"]


def __getattr__(name: str) -> Any:
    if name == "PlanScheduler":
        return plan_scheduler()
    if name == "SchedulerMixin":  # diffusers looks here for the base class, which tells how a component is loaded
        return diffusers().SchedulerMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def plan_scheduler() -> type[PlanScheduler]:
    """The class `PlanScheduler`.

    Raises:
        BadInput: where `diffusers` is missing or too old.
    """
    diffusers()
    from .plan_scheduler import PlanScheduler

    return PlanScheduler
