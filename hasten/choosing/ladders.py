"""The first round of a search: candidates that differ in their number of steps alone need not all be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..compare.variants import Variant

__all__ = ["climb", "ladders"]


def ladders(pool: Sequence[Variant], cost: Callable[[Variant], float]) -> list[list[Variant]]:
    """Candidates that differ in their steps alone, each list from the fewest steps on.

    Args:
        pool: The candidates.
        cost: Of each.
    """
    found: dict[Any, list[Variant]] = {}
    for variant in pool:
        key = replace(variant, name="", steps=0)
        if variant.plan is not None:
            key = replace(key, plan=variant.plan.rpartition("-")[0])  # fitted_plan-6
        found.setdefault(key, []).append(variant)
    place = {id(variant): number for number, variant in enumerate(pool)}
    made = [sorted(variants, key=cost) for variants in found.values()]
    return sorted(made, key=lambda variants: place[id(variants[-1])])  # the model's own sampler first


def climb(
    ladder: Sequence[Variant],
    passes: Callable[[Variant], bool | None],
    skip: Callable[[Variant, str, bool], None],
    reserve: int = 1,
    beaten: bool = False,
) -> None:
    """Find the fewest steps that are enough by bisection: a candidate with fewer steps than one that is not enough is
    taken to be none either.

    Args:
        ladder: From the fewest steps on.
        passes: Measures a candidate: whether it is good enough; None where it failed, which says nothing of others.
        skip: Is called with a candidate that need not be measured, why, and whether it is nothing but slower.
        reserve: Candidates above the fewest steps that are measured too.
        beaten: Whether all of them are faster than a good candidate of another list: then the one with the most steps
            is measured first, since most lists end there.
    """
    tried: dict[int, bool | None] = {}
    low, high = 0, len(ladder)
    while low < high:
        middle = high - 1 if beaten and not tried else (low + high) // 2
        tried[middle] = passes(ladder[middle])
        if tried[middle]:
            high = middle
        else:
            low = middle + 1
    for number in range(high + 1, min(high + 1 + reserve, len(ladder))):
        if number not in tried:
            tried[number] = passes(ladder[number])
    for number, variant in enumerate(ladder):
        if number in tried:
            continue
        if number < high:
            other = min(k for k in tried if k > number and not tried[k])
            skip(
                variant, f"not measured: it has fewer steps than {ladder[other].name}, which is not good enough", False
            )
        else:
            skip(
                variant, f"not measured: it is slower than {ladder[high].name}, which is good enough on few seeds", True
            )
