"""Plans: a sampler on given times as a table of numbers. The package can be called: `hasten.plan(sampler, ...)`."""

from __future__ import annotations

from ..utils.callable_module import make_callable
from .table import Plan, plan

__all__ = ["Plan", "plan"]

make_callable(__name__, plan)
