"""A quantised network that takes the activation scales of the time it is asked about."""

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
    """`net`, with group k of its activation scales where k of the `bounds` lie below the time: `(x, time (B,)) -> raw`.

    A batch with times of several groups is run group by group. Whoever uses the seams (`embed`, then `encode`, `decode`
    or `run`) has the group of the mean of the times that were last embedded.

    net: the network, or its class name and config as model.json has them. bounds: rising, in the network's own time.
    """

    def __init__(self, net: nn.Module | Mapping[str, Any], bounds: Sequence[float]) -> None:
        super().__init__()
        self.net = net if isinstance(net, nn.Module) else _build(net["class"], net["config"])
        self.bounds = tuple(float(bound) for bound in bounds)

    @property
    def config(self) -> dict[str, Any]:
        """What the network is built from."""
        inner = getattr(self.net, "config", {})  # one's own network may have none
        return {"net": {"class": type(self.net).__name__, "config": inner}, "bounds": list(self.bounds)}

    def forward(self, x: Tensor, time: Tensor, *args: Any, **cond: Any) -> Any:
        """The network's raw output."""
        if time.is_meta:  # shapes and counts of operations only
            return self.net(x, time, *args, **cond)
        known = {bisect_left(self.bounds, t) for t in host_times(time)}
        groups = list(known) if len(known) == 1 else [bisect_left(self.bounds, t) for t in time.tolist()]
        if len(set(groups)) == 1:
            set_group(self.net, groups[0])
            return self.net(x, time, *args, **cond)
        number, made = torch.tensor(groups, device=x.device), None
        for group in sorted(set(groups)):
            rows = (number == group).nonzero().flatten()
            set_group(self.net, group)
            some, told = (
                [_select_rows(arg, rows, len(x)) for arg in args],
                {k: _select_rows(v, rows, len(x)) for k, v in cond.items()},
            )
            part = self.net(x[rows], time[rows], *some, **told)
            made = part.new_empty((len(x), *part.shape[1:])) if made is None else made
            made[rows] = part
        return made

    def embed(self, *args: Any, **cond: Any) -> Any:
        """The network's `embed`; the time is the last argument without a name."""
        time = cond["time"] if "time" in cond else args[-1]
        if not time.is_meta:
            known = host_times(time)
            mean = sum(known) / len(known) if known else float(time.float().mean())
            set_group(self.net, bisect_left(self.bounds, mean))
        return self.net.embed(*args, **cond)  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "net":
                raise
            return getattr(super().__getattr__("net"), name)


def host_times(time: Tensor) -> tuple[float, ...]:
    """The different numbers in a tensor of times, each as often as any other, where who made it has written them beside
    it (`tensor.host_times`), so that nobody waits for the device to read them; () where not."""
    return () if torch.compiler.is_compiling() else getattr(time, "host_times", ())


def _select_rows(value: Any, rows: Tensor, count: int) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == count else value


def _build(name: str, config: Mapping[str, Any]) -> nn.Module:
    """A network of this folder by class name. Raises ValueError where there is none."""
    package = importlib.import_module(__package__)
    for info in pkgutil.iter_modules(package.__path__):
        found = getattr(importlib.import_module(f"{package.__name__}.{info.name}"), name, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found(**config)
    raise ValueError(f"there is no network {name!r}")
