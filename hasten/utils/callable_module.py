"""Modules that can be called: `hasten.pick(...)` and `hasten.plan(...)`."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

__all__ = ["make_callable"]


def make_callable(name: str, function: Callable[..., Any]) -> None:
    """Let the imported module `name` be called as `function`; its attributes stay as they are.

    Args:
        name: of the module, as in `sys.modules`.
        function: what a call runs; `inspect.signature(module)` is its signature.
    """

    class CallableModule(types.ModuleType):
        __call__ = staticmethod(function)
        __signature__ = inspect.signature(function)

        def __reduce__(self) -> tuple[Any, ...]:
            return importlib.import_module, (self.__name__,)

    sys.modules[name].__class__ = CallableModule
