"""Which layers get more bits: those whose few bits cost the network's answer most, for their size."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["most_sensitive"]


def most_sensitive(sizes: Mapping[str, int], budget: float, error: Callable[[str], float]) -> list[str]:
    """The layers of greatest squared error a weight, whole layers of no more than `budget` weights in all.

    sizes: weights of each layer. error: of the network's answer when this layer alone is rounded, relative. Errors of
    layers are taken to add up in squares, as those of independent roundings do; what is chosen is then the greedy
    answer to the knapsack, which leaves out a layer that no longer fits and goes on with the next.
    """
    gain = {name: error(name) ** 2 / size for name, size in sizes.items()}
    chosen: list[str] = []
    for name in sorted(sizes, key=lambda name: -gain[name]):
        if sizes[name] <= budget and gain[name] > 0:
            chosen.append(name)
            budget -= sizes[name]
    return chosen
