"""CCDF: the contraction of each step, the smallest time, and the consistency that is an exact projection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.denoiser import Wrapper
from hasten.errors import BadInput, HastenError
from hasten.exact import Gaussian, g8
from hasten.pick import pick
from hasten.plan.draw import draw
from hasten.samplers import DDIM, DDPM, UniPC
from hasten.sampling import Noise, walk
from hasten.schedules import EDM, Flow, Schedule, VPCosine, VPLinear
from hasten.starts import CCDF
from hasten.starts.ccdf import Consistent, contraction, down, remaining, smallest_time, up
from hasten.times import Trailing, UniformLambda

SCHEDULES: list[Schedule] = [VPCosine(offset=0.0), VPLinear(), Flow(), EDM()]


class Seen(Wrapper):
    """Keeps the states that it was asked about."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__(denoiser)
        self.states: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        self.states.append(x_t.clone())
        return self.denoiser(x_t, t, **cond)


def states(denoiser: Any, sampler: Any, x: Tensor, times: Tensor, noise: Noise) -> Tensor:
    seen = Seen(denoiser)
    end = walk(sampler, seen, x, times, noise)
    return torch.stack([*seen.states, end])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name,sampler", [("ddpm", DDPM()), ("ddim", DDIM())])
def test_contraction(schedule: Schedule, name: str, sampler: Any) -> None:
    """CHECK 14: identity consistency; the ratio of successive errors is the contraction factor, to 1e-9."""
    data, start = g8(schedule), CCDF(time=0.6, task="restoration")
    times = UniformLambda(start=0.6, low=0.05)(schedule, 12)
    generator = torch.Generator().manual_seed(0)
    truth = data.sample(4, generator)
    wrong = truth + 0.5 * torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    paths = []
    for images in (truth, wrong):
        noise = Noise(range(4), (8,), torch.float64)
        alpha, sigma = schedule.alpha(times[0]), schedule.sigma(times[0])
        x = alpha * images + sigma * noise.initial()
        begun = start.begin(data, noise, times[0], images)
        assert (begun - x).abs().max() < 1e-6 * float(sigma)  # the start itself works in float32
        paths.append(states(start.wrap(data, images), sampler, x, times, noise))
    error = paths[1] - paths[0]
    ratio = error[1:] / error[:-1]
    factor = contraction(schedule, times, data.variance, name)
    assert factor.shape == (12, 8)
    assert (ratio / factor[:, None] - 1).abs().max() < 1e-9


def test_the_product_of_many_steps_is_what_remains() -> None:
    schedule = VPCosine(offset=0.0)
    v = torch.tensor([0.01, 0.1, 1.0, 3.0], dtype=torch.float64)
    for name in ("ddpm", "ddim"):
        times = UniformLambda(start=0.7, low=1e-4)(schedule, 4000)
        product = schedule.alpha(0.7) * contraction(schedule, times, v, name).prod(0)
        assert (product / remaining(schedule, 0.7, v, name) - 1).abs().max() < 0.01
    assert torch.allclose(remaining(schedule, 0.7, v, "ddim") ** 2, remaining(schedule, 0.7, v))


def test_unit_variance_contracts_by_alpha() -> None:
    """N(0, I) data on a variance-preserving path: DDPM's factor is a_{r|s}, as the paper has it for its bound."""
    schedule, times = VPLinear(), Trailing(start=0.8)(VPLinear(), 10)
    a = schedule.alpha(times)
    assert torch.allclose(contraction(schedule, times, 1.0), a[:-1] / a[1:], rtol=1e-12)
    assert bool((contraction(schedule, times, 1.0) < 1).all())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_smallest_time(schedule: Schedule) -> None:
    """It leaves exactly the share; one direction has a closed form; a smaller share needs a later time."""
    v = torch.tensor([0.3, 0.1, 0.02], dtype=torch.float64)
    e = torch.tensor([0.1, 0.05, 0.02], dtype=torch.float64)
    before = 0.0
    for share in (0.5, 0.2, 0.05):
        t = smallest_time(schedule, v, e, share)
        left = float((remaining(schedule, t, v) ** 2 * e).sum() / e.sum())
        assert abs(left - share) < 1e-6 and t > before
        before = t
    t = smallest_time(schedule, 0.3, 1.0, 0.04, "ddim")  # v / (v + q^2) = .04
    assert abs(float(schedule.q(t)) - (0.3 * (1 / 0.04 - 1)) ** 0.5) < 1e-6


def test_smallest_time_predicts_the_error_of_a_run() -> None:
    """DDPM from t0 on Gaussian data forgets all but the share of what x_init was wrong by; half of t0 does not."""
    schedule = VPCosine(offset=0.0)
    data = Gaussian(torch.zeros(3), torch.tensor([0.3, 0.1, 0.02]), schedule)
    offset = torch.tensor([[0.4, -0.3, 0.2]], dtype=torch.float64)
    t0 = smallest_time(schedule, data.variance, offset[0] ** 2, 0.1)

    def left(t: float) -> float:
        times = UniformLambda(start=t, low=1e-3)(schedule, 300)
        ends = []
        for x_init in (torch.zeros(1, 3, dtype=torch.float64), offset):
            noise = Noise([0], (3,), torch.float64)
            x = schedule.alpha(t) * x_init + schedule.sigma(t) * noise.initial()
            ends.append(draw(data, DDPM(), times, noise, x=x))
        return float((ends[1] - ends[0]).square().sum() / offset.square().sum())

    assert abs(left(t0) - 0.1) < 0.01
    assert left(t0 / 2) > 0.3


def test_smallest_time_that_is_never_enough() -> None:
    schedule = VPLinear(beta_max=1.0)  # ends at q = .86
    assert smallest_time(schedule, 10.0, 1.0, 0.1) == schedule.t_max
    for v, e, share in ((0.0, 1.0, 0.1), (1.0, 0.0, 0.1), (1.0, 1.0, 1.0)):
        with pytest.raises(BadInput):
            smallest_time(schedule, v, e, share)


def test_projection() -> None:
    """up(down) is an orthogonal projection, so consistency moves no two images apart; it is exact."""
    x, w, y = (torch.randn(n, dtype=torch.float64) for n in ((3, 1, 8, 8), (3, 1, 8, 8), (3, 1, 2, 2)))
    assert (down(up(y, 4), 4) - y).abs().max() < 1e-15

    def consistent(x: Tensor) -> Tensor:
        return x + up(y - down(x, 4), 4)

    assert (down(consistent(x), 4) - y).abs().max() < 1e-14
    assert (consistent(consistent(x)) - consistent(x)).abs().max() < 1e-14
    moved, apart = consistent(x) - consistent(w), x - w
    assert bool((moved.flatten(1).norm(dim=1) <= apart.flatten(1).norm(dim=1)).all())
    assert ((apart - moved) * moved).sum().abs() < 1e-12  # orthogonal


@pytest.mark.parametrize("sampler", [DDIM(), UniPC(3)], ids=lambda s: type(s).__name__)
def test_the_known_part_follows_the_noised_measurement(sampler: Any) -> None:
    """x0 consistent at every query: the known part of every state is alpha y + sigma e, as if x_t had been corrected."""
    schedule = VPCosine(offset=0.0)
    data = Gaussian(torch.randn(1, 8, 8), torch.rand(1, 8, 8) + 0.1, schedule)
    y, start = torch.randn(3, 1, 4, 4), CCDF(time=0.6, factor=2)
    times = UniformLambda(start=0.6, low=0.03)(schedule, 8)
    noise = Noise(range(3), (1, 8, 8), torch.float64)
    x = start.begin(data, noise, times[0], y)
    path = states(start.wrap(data, y), sampler, x, times, noise)
    assert (down(path[-1], 2) - y).abs().max() < 1e-5
    for z, t in zip(path, times):
        wanted = schedule.alpha(t) * y + schedule.sigma(t) * down(noise.initial(), 2)
        assert (down(z, 2) - wanted).abs().max() < 1e-5


def test_inpainting() -> None:
    schedule = VPLinear()
    data = Gaussian(torch.zeros(1, 4, 4), torch.ones(1, 4, 4), schedule)
    images = torch.full((2, 1, 4, 4), float("nan"))
    images[0, 0, :2], images[1, 0, :, 0] = 0.5, torch.tensor([-1.0, 0.0, 1.0, 0.4])
    start, times = CCDF(time=0.5, task="inpainting"), Trailing(start=0.5)(schedule, 6)
    assert torch.allclose(start.initial(images, (2, 1, 4, 4))[1, 0, :, 1], torch.tensor(0.1))
    noise = Noise(range(2), (1, 4, 4))
    x = draw(start.wrap(data, images), UniPC(2), times, noise, x=start.begin(data, noise, times[0], images))
    known = ~images.isnan()
    assert (x - images)[known].abs().max() < 1e-5 and bool(torch.isfinite(x).all())
    assert float(x[~known].std()) > 0.1


def test_several_states_of_each_sample() -> None:
    """A sampler that asks about W B rows, window-major, gets each row's own y; a part of the batch is refused."""
    data = Gaussian(torch.zeros(1, 4, 4), torch.ones(1, 4, 4), VPLinear())
    y = torch.arange(2.0).reshape(2, 1, 1, 1)
    wrapped = Consistent(data, y, 4)
    x = torch.randn(6, 1, 4, 4)
    assert torch.allclose(wrapped(x, 0.5).mean((1, 2, 3)), torch.tensor([0.0, 1, 0, 1, 0, 1]), atol=1e-6)
    with pytest.raises(HastenError, match="evaluates 1 of 2 samples"):
        wrapped(x[:1], 0.5)


def test_what_it_refuses() -> None:
    data = Gaussian(torch.zeros(1, 8, 8), torch.ones(1, 8, 8), VPLinear())
    noise, t = Noise([0, 1], (1, 8, 8)), torch.tensor(0.5, dtype=torch.float64)
    for start in (CCDF(), CCDF(task="restoration")):
        with pytest.raises(BadInput, match="begins from images"):
            start.begin(data, noise, t)
        with pytest.raises(BadInput, match="begins from images"):
            start.wrap(data, None)
    with pytest.raises(BadInput, match=r"shape \(2, 1, 2, 2\)"):
        CCDF().begin(data, noise, t, torch.zeros(2, 1, 8, 8))
    with pytest.raises(BadInput, match="3 divides"):
        CCDF(factor=3).begin(data, noise, t, torch.zeros(2, 1, 2, 2))
    with pytest.raises(BadInput, match="finite"):
        CCDF().begin(data, noise, t, torch.full((2, 1, 2, 2), float("nan")))
    with pytest.raises(BadInput, match="one known pixel"):
        CCDF(task="inpainting").begin(data, noise, t, torch.full((2, 1, 8, 8), float("nan")))
    for wrong in ({"time": 0.0}, {"time": 1.0}, {"factor": 1}, {"task": "colour"}):
        with pytest.raises(BadInput):
            CCDF(**wrong)
    assert pick("starts", "ccdf:time=0.3,factor=2") == CCDF(0.3, 2)
    with pytest.raises(BadInput, match="did you mean 'inpainting'"):
        pick("starts", "ccdf:task=inpaint")
