"""Networks that look at their layers, or compute their weights, are quantised too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from hasten.accelerators.quantize import Quantize
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.model import Model
from hasten.nets.quantized import layers
from hasten.predictions import V
from hasten.schedules import VPCosine


class Two(nn.Module):
    """Two convolutions; the first through `norm`."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = norm(nn.Conv2d(4, 8, 3, padding=1)), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.b(F.silu(self.first(x))) * 0.5

    def first(self, x: Tensor) -> Tensor:
        return self.a(x)


class ReadsDtype(Two):
    def first(self, x: Tensor) -> Tensor:
        return self.a(x.to(self.a.weight.dtype))


class ReadsAttributes(Two):
    def first(self, x: Tensor) -> Tensor:
        assert self.a.kernel_size == (3, 3) and self.a.in_channels == 4 and self.a.stride == (1, 1)
        return self.a(x.to(self.a.bias.device)) * (self.a.out_channels / 8)


class Functional(Two):
    def first(self, x: Tensor) -> Tensor:
        return self.a(x) + F.conv2d(x, self.a.weight, self.a.bias, padding=1)


def pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", amount=0.3)
    return layer


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("net", "exchanged"),
    [
        (ReadsDtype(), 2),
        (ReadsAttributes(), 2),
        (Functional(), 2),
        (Two(parametrizations.weight_norm), 1),
        (Two(parametrizations.spectral_norm), 1),
        (Two(nn.utils.weight_norm), 1),
        (Two(pruned), 1),
    ],
    ids=["dtype", "attributes", "functional", "weight_norm", "spectral_norm", "old_weight_norm", "pruned"],
)
@pytest.mark.parametrize("options", [{}, {"rounding": "adaround", "iterations": 2}], ids=["nearest", "adaround"])
def test_unusual_networks_are_quantised(net: nn.Module, exchanged: int, options: dict[str, Any]) -> None:
    denoiser = Denoiser(net, VPCosine(offset=0.0), V()).eval().requires_grad_(False)
    model = Model(denoiser, "x", (4, 8, 8), None, sampler="ddim", times="uniform", steps=3)
    plain, method = model.sample(2), Quantize(images=2, steps=2, **options)
    built = method.apply(model.denoiser, context_of(model))
    assert len(list(layers(built.net))) == exchanged
    samples = model.sample(2, accelerators=[method])
    assert 0 < float((samples - plain).norm() / plain.norm()) < 0.05


def context_of(model: Model) -> Any:
    from hasten.accelerators import SamplingContext

    return SamplingContext(None, lambda n, seed: model.calls(n, seed))


def test_a_network_of_computed_weights_alone_is_a_one_line_error() -> None:
    net = Two(parametrizations.weight_norm)
    net.b = parametrizations.weight_norm(net.b)
    model = Model(Denoiser(net.eval(), VPCosine(offset=0.0), V()), "x", (4, 8, 8), None, sampler="ddim", steps=2)
    with pytest.raises(BadInput, match="no Conv2d or Linear to quantize"):
        model.sample(1, accelerators=[Quantize(images=1, steps=1)])
