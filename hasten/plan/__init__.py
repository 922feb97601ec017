"""Plans: a sampler on given times as a table of numbers. The package can be called: `hasten.plan(sampler, ...)`."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

from .table import Plan, plan

__all__ = ["Plan", "plan"]


class _Callable(types.ModuleType):
    """`hasten.plan` is this package and, called, the function of that name in it."""

    __call__: Callable[..., Plan] = staticmethod(plan)
    __signature__ = inspect.signature(plan)

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Callable
