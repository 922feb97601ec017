"""A measured value with its provenance."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput


@dataclass(frozen=True)
class Measure:
    """One quality metric.

    Args:
        name: of the metric, such as "frechet".
        value: of the metric.
        features, reference: feature network and reference split; values that differ in either are not comparable.
        count, reference_count: samples on each side.
        floor: the real-data baseline, the same metric for real training images of the same count; None: unknown. It is
            what a perfect generator would get, not 0 (or 1).
        seeds: noise seeds of the samples, as ranges ("0-1999"), or "not given".
        interval: 95 % interval (low, high) at this count, or None.
        spread: standard deviation over subsets or splits, or None.
        better: "lower" or "higher".
    """

    name: str
    value: float
    features: str
    reference: str
    count: int
    reference_count: int
    floor: float | None = None
    seeds: str = "not given"
    interval: tuple[float, float] | None = None
    spread: float | None = None
    better: str = "lower"

    @property
    def floors(self) -> float | None:
        """The value as a multiple of its real-data baseline; None without a positive one."""
        return self.value / self.floor if self.floor is not None and self.floor > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """JSON values, the input of `Measure.from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measure:
        """The measure that `to_dict` wrote; raises BadInput for other fields."""
        fields = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - fields):
            raise BadInput(f"a measure has no field {', '.join(unknown)}")
        try:
            return cls(**{**data, "interval": tuple(data["interval"]) if data.get("interval") else None})
        except TypeError as error:
            raise BadInput(f"this is not a measure: {error}") from None

    def __str__(self) -> str:
        interval = f" [{self.interval[0]:.4g}, {self.interval[1]:.4g}]" if self.interval else ""
        spread = f" +- {self.spread:.2g}" if self.spread is not None else ""
        floor = f", floor {self.floor:.4g}" if self.floor is not None else ""
        return (
            f"{self.name} {self.value:.4g}{interval}{spread} ({self.features} features, {self.count} samples "
            f"against {self.reference_count} of {self.reference}{floor}, seeds {self.seeds})"
        )


def check_finite_rows(what: str, *values: Tensor) -> None:
    """Raise BadInput if a row of `values`, each (N, ...), contains NaN or infinity; `what` names the rows."""
    for value in values:
        bad = int((~torch.isfinite(value)).reshape(len(value), -1).any(1).sum())
        if bad:
            raise BadInput(f"{bad} of {len(value)} {what} hold NaN or infinity: they cannot be measured")


def spell_seeds(seeds: Iterable[int] | str | None) -> str:
    """Seeds as sorted ranges: `[0, 1, 2, 7]` -> "0-2,7"; None -> "not given"."""
    if seeds is None:
        return "not given"
    if isinstance(seeds, str):
        return seeds
    ranges: list[list[int]] = []
    for seed in sorted({int(s) for s in seeds}):
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


def weights_digest(net: nn.Module) -> str:
    """8 hexadecimal digits of the sha256 of a network's weights."""
    digest = hashlib.sha256()
    for key, value in sorted(net.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]
