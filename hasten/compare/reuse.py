"""How much of a network's work a sampling leaves out because cached features take its place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

UNUSED = 0.01  # more reuse than the reference below which a cache was never hit


class LayerCounts:
    """The rows that went through each layer of a network."""

    def __init__(self) -> None:
        self.rows: dict[nn.Module, int] = {}

    @property
    def reuse(self) -> float | None:
        """`1 - sum_l w_l c_l / (max_l c_l sum_l w_l)` over the layers l that ran, with w_l weights and c_l rows.

        0 where every layer ran in every evaluation. None where no layer was seen, such as in a compiled network.
        """
        if not self.rows:
            return None
        weights = {layer: sum(p.numel() for p in (*layer.parameters(), *layer.buffers())) or 1 for layer in self.rows}
        most = max(self.rows.values())
        return 1 - sum(weights[layer] * rows for layer, rows in self.rows.items()) / (most * sum(weights.values()))


@contextlib.contextmanager
def count_layers(denoiser: nn.Module, wanted: bool = True) -> Iterator[LayerCounts]:
    """Count the rows that go through each layer within the block.

    Args:
        denoiser: The denoiser; hooks are on its modules without children.
        wanted: False: nothing is counted.
    """
    counts = LayerCounts()

    def hook(layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        first = next((x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor)), None)
        counts.rows[layer] = counts.rows.get(layer, 0) + (len(first) if first is not None and first.ndim else 1)

    layers = [m for m in denoiser.modules() if not any(True for _ in m.children())] if wanted else []
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
