"""SingDiffusion: the closed form of what it cures, its guidance rule, and that it plugs in before any sampler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.errors import BadInput
from hasten.exact import Gaussian, GaussianMixture, m2
from hasten.guides import CFG
from hasten.nets.first_step import FirstStepNet
from hasten.pick import format_spec, pick
from hasten.plan.draw import draw
from hasten.samplers import DDIM, DPMSolver, UniPC
from hasten.sampling import Noise
from hasten.schedules import Discrete, VPCosine, VPLinear
from hasten.starts import SingDiffusion
from hasten.times import Explicit, UniformLambda

TABLE = Discrete.scaled_linear()
ONE = torch.tensor(1.0, dtype=torch.float64)


def bright(classes: int = 0) -> FirstStepNet:
    """The first step of data of mean 51.2: the orthonormal DC coefficient of a 64x64 channel of brightness .8."""
    net = FirstStepNet((1,), classes).double()
    net.mean.data.fill_(51.2)
    return net.requires_grad_(False)


def test_the_closed_form_of_average_brightness() -> None:
    """CHECK 12: class N(51.2, 5^2) from N(0, 1) at index 999 ends at 51.2 - 16.57, brightness .541; with the step at 51.2."""
    data = Gaussian(torch.tensor([51.2], dtype=torch.float64), torch.tensor([25.0]), TABLE)
    plain = data.endpoint(torch.zeros(1, 1, dtype=torch.float64), ONE)
    assert abs(float(plain) - (51.2 - 16.57)) < 0.005
    assert abs(float(plain) / 64 - 0.541) < 0.0005
    start = SingDiffusion().bind({}, {"first_step": bright()})
    noise = Noise(range(50), (1,), torch.float64)
    x = start.begin(data, noise, ONE)
    assert (x - float(TABLE.alpha(1.0)) * 51.2 - float(TABLE.sigma(1.0)) * noise.initial()).abs().max() < 1e-12
    end = data.endpoint(x, ONE)
    spread = 5 * float(TABLE.sigma(1.0)) / math.sqrt(25 * float(TABLE.alpha(1.0)) ** 2 + float(TABLE.sigma(1.0)) ** 2)
    assert (end - 51.2 - spread * noise.initial()).abs().max() < 1e-11  # bias 0 for every noise


def test_the_spread_does_not_come_back() -> None:
    """CHECK 12: unconditional DC ~ N(0, 19.2^2): .607 of the spread with and without the step."""
    data = Gaussian(torch.zeros(1), torch.tensor([19.2**2], dtype=torch.float64), TABLE)
    unit = torch.ones(1, 1, dtype=torch.float64)
    assert abs(float(data.endpoint(unit, ONE) - data.endpoint(0 * unit, ONE)) / 19.2 - 0.607) < 5e-4
    start = SingDiffusion(net=FirstStepNet((1,)).double())
    noise = Noise([1], (1,), torch.float64)
    gain = float(data.endpoint(start.begin(data, noise, ONE), ONE) / noise.initial()) / 19.2
    q = float(TABLE.q(1.0))
    assert abs(gain - 0.607) < 2e-3 and abs(gain - q / math.sqrt(19.2**2 + q**2)) < 1e-12


@pytest.mark.parametrize("sampler", [DDIM(), DPMSolver(), UniPC(3)], ids=lambda s: type(s).__name__)
def test_before_any_sampler(sampler: Any) -> None:
    """On the grid's own first time, whatever it is; the mean of the samples is the data's."""
    data = Gaussian(torch.tensor([51.2], dtype=torch.float64), torch.tensor([25.0]), TABLE)
    start = SingDiffusion(net=bright())
    for times in (UniformLambda(), UniformLambda(start=0.9)):
        grid = times(TABLE, 16)
        noise = Noise(range(400), (1,), torch.float64)
        end = draw(data, sampler, grid, noise, x=start.begin(data, noise, grid[0]))
        shift = float(TABLE.sigma(grid[0])) / math.sqrt(25 * TABLE.alpha(grid[0]) ** 2 + TABLE.sigma(grid[0]) ** 2) * 5
        exact = 51.2 + shift * noise.initial()
        assert float((end - exact).mean().abs()) < 0.05 * shift


class Two(nn.Module):
    """x1 = label + 1 at labels 0, 1, and .25 at the null label; remembers the rows of its calls."""

    classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.rows: list[int] = []

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        self.rows.append(len(z))
        value = torch.tensor([1.0, 2.0, 0.25], dtype=z.dtype)
        return value[label][:, None].expand_as(z)


def classes() -> GaussianMixture:
    return m2(TABLE, labels=[0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guidance(scale: float) -> None:
    """x1 = (u + w (c - u)) / w for w > 1; no division for w <= 1, one branch for w = 1."""
    net = Two()
    start, label = SingDiffusion(net=net), torch.tensor([0, 1, 1])
    noise = Noise([0, 1, 2], (2,), torch.float64)
    alpha, sigma = float(TABLE.alpha(1.0)), float(TABLE.sigma(1.0))
    x = start.begin(CFG(scale=scale).wrap(classes()), noise, ONE, label=label)
    c, u = label[:, None].double() + 1.0, 0.25
    wanted = (u + scale * (c - u)) / max(scale, 1.0)
    assert ((x - sigma * noise.initial()) / alpha - wanted).abs().max() < 1e-12
    assert net.rows == [3 if scale == 1 else 6]
    undivided = SingDiffusion(divide=False, net=net).begin(CFG(scale=scale).wrap(classes()), noise, ONE, label=label)
    assert ((undivided - sigma * noise.initial()) / alpha - (u + scale * (c - u))).abs().max() < 1e-12


def test_guidance_is_found_under_other_wrappers_and_only_where_it_acts() -> None:
    from hasten.denoiser import Wrapper

    noise, label = Noise([0, 1], (2,), torch.float64), torch.tensor([0, 1])
    plain = SingDiffusion(net=Two()).begin(classes(), noise, ONE, label=label)
    guided = SingDiffusion(net=Two()).begin(CFG(scale=3.0).wrap(classes()), noise, ONE, label=label)
    assert not torch.equal(plain, guided)
    under = SingDiffusion(net=Two()).begin(Wrapper(CFG(scale=3.0).wrap(classes())), noise, ONE, label=label)
    assert torch.equal(under, guided)
    q = float(TABLE.q(1.0))
    for interval, same in (((0.2, q - 1), plain), ((0.2, math.inf), guided)):
        x = SingDiffusion(net=Two()).begin(CFG(3.0, interval).wrap(classes()), noise, ONE, label=label)
        assert torch.equal(x, same)


def test_an_image_depends_on_its_seed_alone() -> None:
    torch.manual_seed(0)
    net = FirstStepNet((1, 8, 8), 2, widths=(8, 16), patch=1)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    start, label = SingDiffusion(net=net.eval()), torch.arange(6) % 2
    model = Gaussian(torch.zeros(1, 8, 8), torch.ones(1, 8, 8), TABLE)
    whole = start.begin(model, Noise(range(6), (1, 8, 8)), ONE, label=label)
    part = start.begin(model, Noise(range(2, 4), (1, 8, 8)), ONE, label=label[2:4])
    assert (whole[2:4] - part).abs().max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):  # the step is done in float32 all the same
        assert torch.equal(start.begin(model, Noise(range(6), (1, 8, 8)), ONE, label=label), whole)


def test_what_it_refuses() -> None:
    with pytest.raises(BadInput, match="hasten tune MODEL --method first_step --data"):
        SingDiffusion().bind({}, {})
    with pytest.raises(BadInput, match="starts at pure noise by itself"):
        model = Gaussian(torch.zeros(1), torch.ones(1), VPCosine(offset=0.0))
        SingDiffusion(net=bright()).begin(model, Noise([0], (1,)), ONE)
    assert format_spec(SingDiffusion(net=bright())) == "singdiffusion"
    assert pick("starts", "singdiffusion:divide=false") == SingDiffusion(divide=False)
    with pytest.raises(BadInput, match="no option 'net'"):
        pick("starts", "singdiffusion:net=3")


def test_a_continuous_schedule_too() -> None:
    """VPLinear ends at alpha = .0066: the same rule at its own first time."""
    schedule = VPLinear()
    data = Gaussian(torch.tensor([51.2], dtype=torch.float64), torch.tensor([25.0]), schedule)
    grid = Explicit((0.8, 0.0))(schedule)
    noise = Noise(range(5), (1,), torch.float64)
    x = SingDiffusion(net=bright()).begin(data, noise, grid[0])
    a, s = float(schedule.alpha(0.8)), float(schedule.sigma(0.8))
    assert (x - a * 51.2 - s * noise.initial()).abs().max() < 1e-12
