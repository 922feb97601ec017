"""What a network is asked while it samples, spread over all times, and the activations' ranges that come of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BadInput, NonFinite
from .quantizer import ACTS, fit, search
from .simulated import Simulated, simulated
from .units import Batch, ask

ROOM = 2**15  # activations of one slice of a layer, in one group of times, that are kept for the range search


@dataclass(frozen=True)
class Samples:
    """Calls of a network in a random order: x (N, *S), t (N,) float64, conditions; group (N,), that of each time."""

    x: Tensor
    t: Tensor
    cond: dict[str, Any]
    group: Tensor
    bounds: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, index: Tensor) -> Batch:
        """These calls as one batch."""
        each = {key: len(self) == len(v) if isinstance(v, Tensor) and v.ndim else False for key, v in self.cond.items()}
        cond = {key: value[index] if each[key] else value for key, value in self.cond.items()}
        return self.x[index], self.t[index], cond

    def batches(self, size: int, limit: int | None = None) -> Iterator[tuple[int, Batch]]:
        """(group, batch) after batch, each of one group; limit: so many calls of all together, shared by the groups."""
        groups = sorted(set(self.group.tolist()))
        for group in groups:
            index = (self.group == group).nonzero().flatten()
            if limit is not None:
                index = index[: max(1, limit // len(groups))]
            for part in index.split(size):
                yield group, self.rows(part)


def bounds(clock: Sequence[float], groups: int) -> tuple[float, ...]:
    """The groups - 1 values of the network's time, rising, that cut a sampling into groups of equally many queries."""
    ordered = sorted(set(clock))
    if len(ordered) < groups:
        raise BadInput(f"quantize: {groups} groups of times need as many times, and the sampling has {len(ordered)}")
    cuts = [round(k * len(ordered) / groups) for k in range(1, groups)]
    return tuple((ordered[cut - 1] + ordered[cut]) / 2 for cut in cuts)


def chosen(
    calls: Sequence[Any], clock: Sequence[float], steps: int, seed: int, cuts: tuple[float, ...] = ()
) -> Samples:
    """All rows of `steps` evenly spread calls, numbers 0, n // steps, 2 n // steps, ..., shuffled (Li et al. 2023,
    arXiv:2302.04304, section 3.2); of all calls where there are not so many.

    clock: the network's own time at each call. cuts: between the groups of times.
    """
    if not calls:
        raise BadInput("quantize: the sampling asked the network nothing")
    steps = min(steps, len(calls))
    order = torch.Generator().manual_seed(seed)
    rows: dict[str, list[Tensor]] = {}
    xs, ts, group, same = [], [], [], {}
    for k in range(steps):
        place = k * len(calls) // steps
        x, t, cond = calls[place]
        xs.append(x)
        ts += [float(t)] * len(x)
        group += [bisect_left(cuts, clock[place])] * len(x)
        for key, value in cond.items():
            if isinstance(value, Tensor) and value.ndim and len(value) == len(x):
                rows.setdefault(key, []).append(value)
            else:
                same[key] = value
    shuffled = torch.randperm(len(ts), generator=order)
    here = shuffled.to(xs[0].device)
    cond = {**same, **{key: torch.cat(values)[here] for key, values in rows.items()}}
    t = torch.tensor(ts, dtype=torch.float64)[shuffled]
    return Samples(torch.cat(xs)[here], t, cond, torch.tensor(group)[shuffled], cuts)


class Seen:
    """The least and the greatest value of what passes, and some of the values, at most about `room`."""

    def __init__(self, expected: int, seed: int, room: int = ROOM) -> None:
        self.share = max(1, room // max(expected, 1))  # of each of the expected tensors
        self.low: Tensor | None = None  # on the device: to read them at every call would wait for it
        self.high: Tensor | None = None
        self.kept: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(seed)

    def see(self, x: Tensor) -> None:
        """Look at one tensor."""
        low, high = torch.aminmax(x)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        flat = x.reshape(-1)
        index = torch.randint(len(flat), (min(self.share, len(flat)),), generator=self.generator)
        self.kept.append(flat[index.to(x.device)].float())

    @property
    def finite(self) -> bool:
        """Whether nothing that was seen is NaN or infinity."""
        assert self.low is not None and self.high is not None
        return bool(torch.isfinite(torch.stack([self.low, self.high])).all())  # which are NaN where any value is

    def fitted(self, how: str) -> tuple[Tensor, Tensor]:
        """Scale and zero of the range, (1,)."""
        values = torch.cat(self.kept)[None]
        assert self.low is not None and self.high is not None
        low, high = (end.to(values.dtype).reshape(1) for end in (self.low, self.high))
        return fit(low, high, ACTS[8]) if how == "minmax" else search(values, ACTS[8], low, high)


@torch.no_grad()
def fit_activations(
    denoiser: nn.Module, net: nn.Module, samples: Samples, groups: int, how: str, size: int, seed: int = 0
) -> None:
    """Give every simulated layer of `net` (the network of `denoiser`) the ranges of what it is given on the samples.

    They are seen as the network is, its weights rounded or not, with activations that are not rounded. Nothing is kept
    of a batch but the extremes and a sample, so memory does not depend on how many there are.
    """
    layers = simulated(net)
    for layer in layers.values():
        for piece in layer.pieces:
            piece.act_scale = piece.act_zero = None
    batches = [-(-int((samples.group == g).sum()) // size) for g in range(groups)]
    seen = {
        (name, k, g): Seen(batches[g], seed)
        for name, layer in layers.items() for k in range(len(layer.pieces)) for g in range(groups)
    }  # fmt: skip
    now = [0]

    def hook(name: str) -> Any:
        def look(layer: Simulated, args: tuple[Any, ...]) -> None:
            for k, piece in enumerate(layer.pieces):
                whole = len(layer.pieces) == 1
                seen[name, k, now[0]].see(args[0] if whole else layer.slice(args[0], piece.channels))

        return look

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        for now[0], batch in samples.batches(size):
            ask(denoiser, batch)
    finally:
        for handle in handles:
            handle.remove()
    for (name, _, _), each in seen.items():
        if each.kept and not each.finite:
            raise NonFinite(f"quantize: layer {name} is given NaN or infinity on the calibration samples")
    for name, layer in layers.items():
        for k, piece in enumerate(layer.pieces):
            fitted = [_of(seen, name, k, g, groups).fitted(how) for g in range(groups)]
            piece.act_scale, piece.act_zero = (torch.cat(column) for column in zip(*fitted))


def _of(seen: dict[Any, Seen], name: str, k: int, group: int, groups: int) -> Seen:
    """What was seen in a group, or in the nearest that was."""
    for other in sorted(range(groups), key=lambda other: abs(other - group)):
        if seen[name, k, other].kept:
            return seen[name, k, other]
    raise BadInput(f"quantize: layer {name} does not run on the calibration samples")
