"""Which layers get more bits: those whose few bits change the network's output most, for their size."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["most_sensitive"]


def most_sensitive(sizes: Mapping[str, int], budget: float, error: Callable[[str], float]) -> list[str]:
    """The layers of largest squared error per weight, within a budget of weights.

    Errors of layers are assumed to add up in squares, as those of independent roundings do; the result is then the
    greedy solution of the knapsack problem, which skips a layer that no longer fits and continues with the next.

    Args:
        sizes: the number of weights of each layer.
        budget: the maximum number of weights in all.
        error: of the network's output when this layer alone is rounded, relative.

    Returns:
        Names of layers, the most sensitive first.
    """
    gain = {name: error(name) ** 2 / size for name, size in sizes.items()}
    layers: list[str] = []
    for name in sorted(sizes, key=lambda name: -gain[name]):
        if sizes[name] <= budget and gain[name] > 0:
            layers.append(name)
            budget -= sizes[name]
    return layers
