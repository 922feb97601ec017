"""Biases that take back what rounding adds to a layer's answers on average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Samples
from .simulated import Simulated, simulated
from .units import ask

__all__ = ["correct_biases"]


@torch.no_grad()
def correct_biases(denoiser: nn.Module, net: nn.Module, samples: Samples, size: int) -> None:
    """Add to the bias of every simulated layer of `net` (the network of `denoiser`), per output channel,

        E[layer(x) - simulated(x)]   over the samples and places, x what the layer is given in the rounded network,

    so that errors of rounding, which are noise to an image, move no statistic of many. A layer without a bias stays
    without. Reference: Nagel, van Baalen, Blankevoort, Welling 2019, arXiv:1906.04721.
    """
    layers = {name: layer for name, layer in simulated(net).items() if layer.layer.bias is not None}
    total: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def hook(name: str) -> Any:
        def look(layer: Simulated, args: tuple[Tensor, ...], answer: Tensor) -> None:
            left = layer.exact(args[0]) - answer
            places = [0, 2, 3] if layer.conv else list(range(left.ndim - 1))
            mean = left.float().mean(places).cpu().double() * len(left)  # not every device has float64
            total[name] = total[name] + mean if name in total else mean
            rows[name] = rows.get(name, 0) + len(left)

        return look

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        for group, batch in samples.batches(size):
            for layer in simulated(net).values():
                layer.group = group
            ask(denoiser, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, sums in total.items():
        layer = layers[name]
        layer.shift = (sums / rows[name]).to(layer.layer.weight.dtype).to(layer.layer.weight.device)
