"""Plans: a sampler on given times as a table of numbers. The package can be called: `hasten.plan(sampler, ...)`."""

from __future__ import annotations

from ..utils.callable_module import make_callable
from .guided import guided_plan
from .table import Plan, plan

__all__ = ["Plan", "guided_plan", "plan"]

make_callable(__name__, plan)
