"""Calibration samples, spread over all times of the sampling, and the ranges of activations on them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BadInput, NonFinite
from .fake_quant import FakeQuantLayer, fake_quant_layers
from .quantizer import ACTS, fit_range, search_range
from .units import Batch, raw_of_batch

__all__ = ["RangeObserver", "Samples", "calibration_samples", "fit_activations", "time_group_bounds"]

OBSERVED = 2**15  # activations of one slice of a layer, in one group of times, that the range search uses


@dataclass(frozen=True)
class Samples:
    """Model evaluations in a random order.

    Attributes:
        x: (N, *S), x_t.
        t: (N,) float64.
        cond: conditions; tensors of N rows are indexed by row.
        group: (N,), the group of each time.
        bounds: (G - 1,), the network's times between the groups, increasing.
    """

    x: Tensor
    t: Tensor
    cond: dict[str, Any]
    group: Tensor
    bounds: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, index: Tensor) -> Batch:
        """These model evaluations as one batch."""

        def by_row(value: Any) -> bool:
            return isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(self)

        cond = {key: value[index] if by_row(value) else value for key, value in self.cond.items()}
        return self.x[index], self.t[index], cond

    def batches(self, size: int, limit: int | None = None) -> Iterator[tuple[int, Batch]]:
        """(group, batch) pairs, each batch of one group.

        Args:
            size: the maximum batch size.
            limit: the maximum number of model evaluations, divided evenly over the groups; None: all.
        """
        groups = sorted(set(self.group.tolist()))
        for group in groups:
            index = (self.group == group).nonzero().flatten()
            if limit is not None:
                index = index[: max(1, limit // len(groups))]
            for batch in index.split(size):
                yield group, self.rows(batch)


def time_group_bounds(clock: Sequence[float], groups: int) -> tuple[float, ...]:
    """The bounds that divide a sampling into groups of equally many time steps.

    Args:
        clock: the network's times.
        groups: how many groups.

    Returns:
        (groups - 1,), increasing.

    Raises:
        BadInput: for more groups than times.
    """
    ordered = sorted(set(clock))
    if len(ordered) < groups:
        raise BadInput(f"quantize: {groups} groups of times need as many times, and the sampling has {len(ordered)}")
    splits = [round(k * len(ordered) / groups) for k in range(1, groups)]
    return tuple((ordered[k - 1] + ordered[k]) / 2 for k in splits)


def calibration_samples(
    calls: Sequence[Any], clock: Sequence[float], steps: int, seed: int, bounds: tuple[float, ...] = ()
) -> Samples:
    """All rows of `steps` evenly spaced model evaluations, numbers 0, n // steps, 2 n // steps, ..., shuffled.

    Args:
        calls: recorded model evaluations, in order.
        clock: the network's time at each.
        steps: how many are used, at most all.
        seed: of the order.
        bounds: between the groups of times.

    Raises:
        BadInput: where there are no model evaluations.

    References:
        Li et al. 2023, arXiv:2302.04304, section 3.2.
    """
    if not calls:
        raise BadInput("quantize: the sampling made no model evaluation")
    steps = min(steps, len(calls))
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[Tensor]] = {}
    xs: list[Tensor] = []
    ts: list[float] = []
    groups: list[int] = []
    shared: dict[str, Any] = {}
    for k in range(steps):
        number = k * len(calls) // steps
        x, t, cond = calls[number]
        xs.append(x)
        ts += [float(t)] * len(x)
        groups += [bisect_left(bounds, clock[number])] * len(x)
        for key, value in cond.items():
            if isinstance(value, Tensor) and value.ndim and len(value) == len(x):
                rows.setdefault(key, []).append(value)
            else:
                shared[key] = value
    order = torch.randperm(len(ts), generator=generator)
    on_device = order.to(xs[0].device)
    cond = {**shared, **{key: torch.cat(values)[on_device] for key, values in rows.items()}}
    t = torch.tensor(ts, dtype=torch.float64)[order]
    return Samples(torch.cat(xs)[on_device], t, cond, torch.tensor(groups)[order], bounds)


class RangeObserver:
    """The minimum and maximum of the tensors it observes, and a random sample of their values.

    Args:
        expected: how many tensors will be observed.
        seed: of the sample.
        room: about the maximum number of values in the sample.
    """

    def __init__(self, expected: int, seed: int, room: int = OBSERVED) -> None:
        self.per_tensor = max(1, room // max(expected, 1))
        self.low: Tensor | None = None  # on the device: to read them at every call would synchronise
        self.high: Tensor | None = None
        self.values: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(seed)

    def observe(self, x: Tensor) -> None:
        """Observe one tensor."""
        low, high = torch.aminmax(x)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        flat = x.reshape(-1)
        index = torch.randint(len(flat), (min(self.per_tensor, len(flat)),), generator=self.generator)
        self.values.append(flat[index.to(x.device)].float())

    @property
    def finite(self) -> bool:
        """Whether all observed values are finite."""
        assert self.low is not None and self.high is not None
        return bool(torch.isfinite(torch.stack([self.low, self.high])).all())  # which are NaN where any value is

    def fit(self, how: str) -> tuple[Tensor, Tensor]:
        """Scale (1,) and zero-point (1,) of the range.

        Args:
            how: "minmax" or "search".
        """
        values = torch.cat(self.values)[None]
        assert self.low is not None and self.high is not None
        low, high = (end.to(values.dtype).reshape(1) for end in (self.low, self.high))
        return fit_range(low, high, ACTS[8]) if how == "minmax" else search_range(values, ACTS[8], low, high)


@torch.no_grad()
def fit_activations(
    denoiser: nn.Module, net: nn.Module, samples: Samples, groups: int, how: str, size: int, seed: int = 0
) -> None:
    """Set the activation ranges of every fake-quantised layer to those of its inputs on the samples.

    The network runs with its weights as they are and without rounded activations. Only extremes and a sample of each
    batch are stored, so memory does not grow with the number of samples.

    Args:
        denoiser: of the network.
        net: its network, whose layers are changed in place.
        samples: for calibration.
        groups: how many groups of times have ranges of their own.
        how: "minmax" or "search".
        size: the batch size.
        seed: of the sampled activations.

    Raises:
        NonFinite: where activations are NaN or infinite.
        BadInput: for a layer that does not run.
    """
    layers = fake_quant_layers(net)
    for layer in layers.values():
        for piece in layer.slices:
            piece.act_scale = piece.act_zero = None
    batches = [-(-int((samples.group == g).sum()) // size) for g in range(groups)]
    observers = {
        (name, k, g): RangeObserver(batches[g], seed)
        for name, layer in layers.items()
        for k in range(len(layer.slices))
        for g in range(groups)
    }
    group = 0

    def hook(name: str) -> Callable[[FakeQuantLayer, tuple[Any, ...]], None]:
        def observe(layer: FakeQuantLayer, args: tuple[Any, ...]) -> None:
            slices = layer.slices
            for k, piece in enumerate(slices):
                x = args[0] if len(slices) == 1 else layer.input_slice(args[0], piece.channels)
                observers[name, k, group].observe(x)

        return observe

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        for group, batch in samples.batches(size):  # noqa: B007  read by the hooks
            raw_of_batch(denoiser, batch)
    finally:
        for handle in handles:
            handle.remove()
    for (name, _, _), observer in observers.items():
        if observer.values and not observer.finite:
            raise NonFinite(f"quantize: layer {name} has NaN or infinite inputs on the calibration samples")
    for name, layer in layers.items():
        for k, piece in enumerate(layer.slices):
            ranges = [_nearest_observer(observers, name, k, g, groups).fit(how) for g in range(groups)]
            piece.act_scale, piece.act_zero = (torch.cat(column) for column in zip(*ranges))


def _nearest_observer(
    observers: dict[tuple[str, int, int], RangeObserver], name: str, k: int, group: int, groups: int
) -> RangeObserver:
    """The observer of a group, or of the nearest group that has observed anything."""
    for other in sorted(range(groups), key=lambda other: abs(other - group)):
        if observers[name, k, other].values:
            return observers[name, k, other]
    raise BadInput(f"quantize: layer {name} does not run on the calibration samples")
