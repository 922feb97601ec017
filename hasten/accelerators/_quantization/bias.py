"""Bias correction: biases that compensate the mean error that rounding adds to a layer's output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .calibration import Samples
from .fake_quant import FakeQuantLayer, fake_quant_layers
from .units import raw_of_batch

__all__ = ["correct_biases"]


@torch.no_grad()
def correct_biases(denoiser: nn.Module, net: nn.Module, samples: Samples, size: int) -> None:
    """Add to the bias of every fake-quantised layer, per output channel,

        E[layer(x) - fake_quantized(x)]   over samples and positions, x the layer's input in the rounded network,

    so that rounding errors, which are noise to one image, change no mean over many. A layer without a bias stays
    without.

    Args:
        denoiser: of the rounded network.
        net: its network, whose layers are changed in place.
        samples: for calibration.
        size: the batch size.

    References:
        Nagel, van Baalen, Blankevoort, Welling 2019, arXiv:1906.04721.
    """
    layers = {name: layer for name, layer in fake_quant_layers(net).items() if layer.layer.bias is not None}
    total: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def hook(name: str) -> Callable[[FakeQuantLayer, tuple[Tensor, ...], Tensor], None]:
        def add_error(layer: FakeQuantLayer, args: tuple[Tensor, ...], output: Tensor) -> None:
            error = layer.exact(args[0]) - output
            positions = [0, 2, 3] if layer.conv else list(range(error.ndim - 1))
            mean = error.float().mean(positions).cpu().double() * len(error)  # not every device has float64
            total[name] = total[name] + mean if name in total else mean
            rows[name] = rows.get(name, 0) + len(error)

        return add_error

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        for group, batch in samples.batches(size):
            for layer in fake_quant_layers(net).values():
                layer.group = group
            raw_of_batch(denoiser, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, sums in total.items():
        layer = layers[name]
        layer.shift = (sums / rows[name]).to(layer.layer.weight.dtype).to(layer.layer.weight.device)
