"""The seam in the middle of a network: what `Denoiser.features` gives, and what wrappers make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser, Wrapper
from hasten.errors import BadInput, HastenError
from hasten.guides import CFG, DynamicThreshold
from hasten.nets.unet import UNet
from hasten.sampling import Count
from hasten.schedules import VPCosine


def unet(classes: int = 3) -> UNet:
    """A small U-Net whose every weight is random, so that the middle matters."""
    torch.manual_seed(0)
    net = UNet(channels=1, widths=(8, 16), classes=classes, embedding=16)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) / max(p[0].numel(), 1) ** 0.5)
    return net.eval().requires_grad_(False)


def setting(prediction: str = "v", B: int = 4) -> tuple[Denoiser, Tensor, Tensor]:
    denoiser = Denoiser(unet(), VPCosine(offset=0.0), prediction)
    return denoiser, torch.randn(B, 1, 8, 8), torch.arange(B) % 3


TIMES = [0.3, torch.tensor(0.6), torch.tensor([0.1, 0.4, 0.7, 0.95])]


@pytest.mark.parametrize("t", TIMES, ids=["float", "scalar", "each"])
@pytest.mark.parametrize("name", ["eps", "x0", "v", "edm"])
def test_finish_is_forward_bit_by_bit(name: str, t: Any) -> None:
    denoiser, x, label = setting(name)
    middle, finish = denoiser.features(x, t, label=label)
    assert middle.shape == (4, 16, 4, 4)
    assert torch.equal(finish(middle), denoiser(x, t, label=label))
    assert torch.equal(finish(middle), finish(middle))  # it may be asked again
    assert (finish(middle + 1) - finish(middle)).abs().max() > 1e-3
    assert torch.equal(denoiser.features(x, t)[1](denoiser.features(x, t)[0]), denoiser(x, t))


def test_in_other_precisions() -> None:
    denoiser, x, label = setting()
    with torch.autocast("cpu", torch.bfloat16):
        middle, finish = denoiser.features(x, 0.5, label=label)
        assert torch.equal(finish(middle), denoiser(x, 0.5, label=label))
        assert finish(middle.float() + 0.1).dtype == torch.float32
    double = setting()[0].double()
    middle, finish = double.features(x, 0.5, label=label)
    assert middle.dtype == torch.float64 and finish(middle).dtype == torch.float32


def test_a_network_without_the_seam_is_refused() -> None:
    denoiser = Denoiser(nn.Conv2d(1, 1, 3), VPCosine(), "eps")
    with pytest.raises(HastenError, match="Conv2d has no middle features.*hasten's UNet"):
        denoiser.features(torch.randn(1, 1, 4, 4), 0.5)


def test_wrappers_pass_it_through_unless_they_would_be_left_out() -> None:
    class Halved(Wrapper):
        def forward(self, x_t: Tensor, t: Any, **cond: Any) -> Tensor:
            return self.denoiser(x_t, t, **cond) / 2

    denoiser, x, label = setting()
    expected = denoiser(x, 0.5, label=label)
    middle, finish = Wrapper(denoiser).features(x, 0.5, label=label)
    assert torch.equal(finish(middle), expected)
    with pytest.raises(HastenError, match="Halved cannot be steered.*before it"):
        Halved(denoiser).features(x, 0.5, label=label)
    counted = Count(denoiser)
    middle, finish = counted.features(x, 0.5, label=label)
    assert torch.equal(finish(middle), expected) and (counted.calls, counted.rows) == (1, 4)


@pytest.mark.parametrize("t", TIMES, ids=["float", "scalar", "each"])
@pytest.mark.parametrize("guide", [CFG(2.5), CFG(2.5, interval=(0.5, 1.5)), CFG(3.0, rescale=0.7)])
def test_under_guidance(guide: CFG, t: Any) -> None:
    denoiser, x, label = setting()
    guided = guide.wrap(denoiser)
    middle, finish = guided.features(x, t, label=label)
    of_cond = denoiser.features(x, t, label=label)[0]
    assert (middle - of_cond).abs().max() < 1e-5 * of_cond.abs().max()
    assert torch.equal(finish(middle), guided(x, t, label=label))
    with pytest.raises(BadInput, match="needs label="):
        guided.features(x, t)


def test_guidance_moves_both_branches_by_the_same() -> None:
    denoiser, x, label = setting()
    guided, shift = CFG(2.5).wrap(denoiser), torch.randn(4, 16, 4, 4)
    middle, finish = guided.features(x, 0.4, label=label)
    branches = []
    for which in (label, torch.full((4,), 3)):
        own, finish_own = denoiser.features(x, 0.4, label=which)
        branches.append(finish_own(own + shift))
    expected = branches[1] + 2.5 * (branches[0] - branches[1])
    assert (finish(middle + shift) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_under_dynamic_threshold() -> None:
    denoiser, x, label = setting()
    guided = DynamicThreshold(quantile=0.8, least=0.1).wrap(denoiser)
    middle, finish = guided.features(x, 0.4, label=label)
    assert torch.equal(finish(middle), guided(x, 0.4, label=label))
    assert finish(middle * 10).abs().max() <= 0.1 * (1 + 1e-6)
