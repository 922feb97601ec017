"""A quantized network that selects its activation scales by time."""

from __future__ import annotations

import importlib
import pkgutil
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .quantized import set_group

__all__ = ["TimeGroups"]


class TimeGroups(nn.Module):
    """`net` with the activation scales of group k, the number of `bounds` below the time: `(x, time (B,)) -> raw`.

    A batch with times of several groups is run group by group. `embed`, followed by `encode`, `decode` or `run`,
    selects the group of the mean of its times.

    Args:
        net: the network, or its class name and config as in model.json.
        bounds: ascending, in the network's own time.

    Raises:
        ValueError: for an unknown class name.
    """

    net: Any  # a module, which may have further methods

    def __init__(self, net: nn.Module | Mapping[str, Any], bounds: Sequence[float]) -> None:
        super().__init__()
        self.net = net if isinstance(net, nn.Module) else _build(net["class"], net["config"])
        self.bounds = tuple(float(bound) for bound in bounds)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that the network is built from."""
        inner = getattr(self.net, "config", {})  # custom networks may have none
        return {"net": {"class": type(self.net).__name__, "config": inner}, "bounds": list(self.bounds)}

    def forward(self, x: Tensor, time: Tensor, *args: Any, **cond: Any) -> Any:
        """The network's raw output."""
        if time.is_meta:  # only shapes and operation counts
            return self.net(x, time, *args, **cond)
        distinct = {bisect_left(self.bounds, t) for t in host_times(time)}
        groups = list(distinct) if len(distinct) == 1 else [bisect_left(self.bounds, t) for t in time.tolist()]
        if len(set(groups)) == 1:
            set_group(self.net, groups[0])
            return self.net(x, time, *args, **cond)
        group_of, out = torch.tensor(groups, device=x.device), None
        for group in sorted(set(groups)):
            rows = (group_of == group).nonzero().flatten()
            set_group(self.net, group)
            row_args = [_select_rows(arg, rows, len(x)) for arg in args]
            row_cond = {k: _select_rows(v, rows, len(x)) for k, v in cond.items()}
            y = self.net(x[rows], time[rows], *row_args, **row_cond)
            out = y.new_empty((len(x), *y.shape[1:])) if out is None else out
            out[rows] = y
        return out

    def embed(self, *args: Any, **cond: Any) -> Any:
        """The network's `embed`; the time is the last positional argument."""
        time = cond["time"] if "time" in cond else args[-1]
        if not time.is_meta:
            times = host_times(time)
            mean = sum(times) / len(times) if times else float(time.float().mean())
            set_group(self.net, bisect_left(self.bounds, mean))
        return self.net.embed(*args, **cond)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "net":
                raise
            return getattr(super().__getattr__("net"), name)


def host_times(time: Tensor) -> tuple[float, ...]:
    """The distinct values of a tensor of times, each equally frequent, if its creator attached them.

    They are read from `tensor.host_times`, which avoids a device synchronisation; () if there are none.
    """
    return () if torch.compiler.is_compiling() else getattr(time, "host_times", ())


def _select_rows(value: Any, rows: Tensor, count: int) -> Any:
    """Rows of a tensor with one row per sample; any other value unchanged."""
    return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == count else value


def _build(name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build a network of this folder by class name; raises ValueError if there is none."""
    package = importlib.import_module(__package__)
    for info in pkgutil.iter_modules(package.__path__):
        cls = getattr(importlib.import_module(f"{package.__name__}.{info.name}"), name, None)
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            return cls(**config)
    raise ValueError(f"there is no network {name!r}")
