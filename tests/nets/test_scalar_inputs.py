"""Further scalar inputs of any network: nothing changes at first, and they can be learnt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.nets.scalar_inputs import EmbeddedInputs, FixedGuidance, ScalarInputs, with_scalars
from hasten.nets.unet import UNet


class Line(nn.Module):
    """x, whatever the time, times a weight that begins at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        return x * self.weight


def filled(net: nn.Module) -> nn.Module:
    """Without the zeros that it begins with, which would hide mistakes."""
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return net


SHAPES = [(2,), (3, 5), (3, 8, 8), (2, 3, 4, 4), (2, 2, 2, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_at_first_it_is_the_plain_network(shape: tuple[int, ...]) -> None:
    net, x, time = Line(), torch.randn(3, *shape), torch.rand(3)
    output = with_scalars(net, shape, guidance=(1, 5), steps=(4, 2))
    assert type(output) is ScalarInputs
    for steps in (4, 2):
        description = output(x, time, guidance=torch.tensor([1.0, 2.0, 5.0]), steps=torch.full((3,), steps))
        assert torch.equal(description, net(x, time))


def test_of_a_network_with_an_embedding_too() -> None:
    net = filled(UNet(1, widths=(8, 16), classes=2, embedding=16)).eval()
    output = with_scalars(net, (1, 8, 8), guidance=(1, 5)).eval()
    x, time, label, scale = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 2]), torch.tensor([1.0, 4.0])
    assert type(output) is EmbeddedInputs and output.null_label == 2 and output.guidance_range == (1.0, 5.0)
    assert torch.equal(output(x, time, guidance=scale, label=label), net(x, time, label=label))
    filled(output.guidance)
    changed = output(x, time, guidance=scale, label=label)
    assert not torch.allclose(changed, net(x, time, label=label), atol=1e-3)
    # the parts are those of the network that the scale is added to, as in a U-Net that was built with the input
    built = UNet(**{**net.config, "guidance": (1, 5)}).eval()
    built.load_state_dict({**net.state_dict(), **{f"guidance.{k}": v for k, v in output.guidance.state_dict().items()}})
    torch.testing.assert_close(changed, built(x, time, guidance=scale, label=label))


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_the_scale_can_be_learnt(shape: tuple[int, ...]) -> None:
    """To answer s x, s in [1, 3]: what is blind to s is off by std(s) |x| = .58 |x| at the best."""
    torch.manual_seed(0)
    net = with_scalars(Line(), shape, guidance=(1, 3))
    optimiser = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(300):
        x, s = torch.randn(64, *shape), 1 + 2 * torch.rand(64)
        loss = (net(x, torch.rand(64), guidance=s) - s.reshape(-1, *[1] * len(shape)) * x).square().mean()
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    assert float(loss.detach()) ** 0.5 < 0.3 * 0.58


def test_one_scale_is_the_same_network_without_the_input() -> None:
    net = filled(with_scalars(Line(), (3, 5), guidance=(1, 3)))
    x, time = torch.randn(2, 3, 5), torch.rand(2)
    fixed = net.fixed(2.5)
    assert isinstance(fixed, FixedGuidance) and getattr(fixed, "guidance_range", None) is None
    assert torch.equal(fixed(x, time), net(x, time, guidance=torch.full((2,), 2.5)))


def test_a_missing_scalar_is_an_error() -> None:
    net = with_scalars(Line(), (2,), guidance=(1, 3), steps=(2, 1))
    with pytest.raises(ValueError, match="needs guidance="):
        net(torch.zeros(1, 2), torch.zeros(1))
    with pytest.raises(ValueError, match="needs steps="):
        net(torch.zeros(1, 2), torch.zeros(1), guidance=torch.ones(1))
