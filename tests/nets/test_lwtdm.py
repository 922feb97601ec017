"""LWTDM: the paper's size and cost, and what its output depends on."""

from __future__ import annotations

import pytest
import torch

from hasten.nets.lwtdm import LWTDM
from hasten.performance.cost import macs, parameters


def small(**options: int) -> LWTDM:
    torch.manual_seed(0)
    return LWTDM(**{"width": 128, "inner": 8, "factor": 4, **options}).eval()


def test_the_papers_network() -> None:
    with torch.device("meta"):
        net = LWTDM().eval()
        assert parameters(net) == 11_590_587
        x, time, source = torch.empty(1, 3, 224, 224), torch.empty(1), torch.empty(1, 3, 28, 28)
        assert macs(net, x, time, source=source) == pytest.approx(42.5e9, rel=0.01)
        assert net(x, time, source=source).shape == x.shape


@pytest.mark.parametrize(("factor", "channels", "size"), [(2, 1, (8, 16)), (4, 3, (16, 32)), (8, 4, (32, 32))])
def test_factors_and_channels(factor: int, channels: int, size: tuple[int, int]) -> None:
    net = small(factor=factor, channels=channels, out_channels=2 * channels)
    x, source = torch.randn(1, channels, *size), torch.randn(1, channels, *(side // factor for side in size))
    assert net(x, torch.rand(1), source=source).shape == (1, 2 * channels, *size)
    assert LWTDM(**net.config).config == net.config


def test_the_small_image_is_read_and_passes_the_shared_encoder() -> None:
    net = small()
    x, time, source = torch.randn(2, 3, 16, 16), torch.rand(2), torch.randn(2, 3, 4, 4, requires_grad=True)
    out = net(x, time, source=source)
    seen = out.detach()
    changed = net(x, time, source=source.flip(-1))
    assert float((seen - changed.detach()).abs().max()) > 1e-3
    assert float((seen - net(x, time + 0.5, source=source).detach()).abs().max()) > 1e-4
    out.square().sum().backward()
    assert source.grad is not None and float(source.grad.abs().min()) > 0
    # images of a batch do not see one another
    torch.testing.assert_close(net(x[1:], time[1:], source=source[1:]), out[1:])
    # both images pass the same weights
    calls = []
    net.down[0].register_forward_hook(lambda module, args, out: calls.append(tuple(out.shape[2:])))
    net(x, time, source=source.detach())
    assert sorted(calls) == [(4, 4), (16, 16)]


def test_the_time_does_not_reach_the_small_image() -> None:
    """Its features are the same at every step of a trajectory."""
    net, source = small(), torch.randn(1, 3, 4, 4)
    seen = []
    net.middle[0].register_forward_hook(lambda module, args, out: seen.append(out) if args[1] is None else None)
    for t in (0.1, 0.9):
        net(torch.randn(1, 3, 16, 16), torch.tensor([t]), source=source)
    assert torch.equal(*seen)


def test_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="128 divides"):
        LWTDM(width=200)
    net = small()
    with pytest.raises(ValueError, match=r"source= of shape \(3, 4, 4\), got \(3, 8, 8\)"):
        net(torch.randn(1, 3, 16, 16), torch.rand(1), source=torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match="got none"):
        net(torch.randn(1, 3, 16, 16), torch.rand(1))
    with pytest.raises(ValueError, match="multiples of 16"):
        net(torch.randn(1, 3, 24, 24), torch.rand(1), source=torch.randn(1, 3, 6, 6))
