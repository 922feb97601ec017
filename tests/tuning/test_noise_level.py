"""The noise estimator: its loss, that it learns the level from the image alone, and that sampling gains by it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.exact import Gaussian
from hasten.nets.noise_level import NoiseLevelNet
from hasten.pick import pick
from hasten.samplers.noise_level import NoiseLevel as Sampler
from hasten.sampling import Noise, walk
from hasten.schedules import Flow
from hasten.storage.weights import build_network
from hasten.tuning import Tuned, TuningTask
from hasten.tuning.noise_level import HIGHEST, LOWEST, NoiseLevel, errors, log_sigma2, noisy

F64 = torch.float64
SHAPE, V = (1, 12, 12), 0.25


def gaussian() -> Gaussian:
    return Gaussian(torch.zeros(SHAPE), torch.full(SHAPE, V), Flow())


def task(n: int = 2000) -> TuningTask:
    """Images of independent pixels N(0, .25): what the level is can be read off the mean square alone."""

    def images(count: int) -> tuple[Tensor, None]:
        return gaussian().sample(count, torch.Generator().manual_seed(0)).float(), None

    times = torch.linspace(1, 0, 11, dtype=F64)
    return TuningTask(denoiser=gaussian(), sampler=Sampler(updates=()), times=times, shape=SHAPE, images=images, n=n)


QUICK = NoiseLevel(minutes=10, steps=400, batch_size=64, lr=3e-3, width=4)


@cache
def tuned() -> Tuned:
    return QUICK.tune(task())


def test_levels_are_uniform_in_lam_and_states_have_variance_one_of_unit_data() -> None:
    x = torch.randn(20_000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    z, lam = noisy(x, torch.Generator().manual_seed(1))
    assert float(lam.min()) >= LOWEST and float(lam.max()) <= HIGHEST
    assert float(lam.mean()) == pytest.approx(0, abs=0.1)
    assert float(lam.var()) == pytest.approx((HIGHEST - LOWEST) ** 2 / 12, rel=0.03)
    assert float(z.square().mean()) == pytest.approx(1, abs=0.01)
    # and z holds sqrt(abar) of x
    fraction = (z * x).mean((1, 2, 3)) / x.square().mean((1, 2, 3))
    assert float((fraction - torch.sigmoid(2 * lam).sqrt()).mean()) == pytest.approx(0, abs=0.01)


def test_the_network_and_its_loss() -> None:
    torch.manual_seed(0)
    net = NoiseLevelNet(3, 4)
    z = torch.randn(5, 3, 9, 7)
    result = net(z)
    assert result.shape == (5,) and bool(((result > 0) & (result < 1)).all())
    torch.testing.assert_close(log_sigma2(net, z), torch.log1p(-result))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(z), result, rtol=0, atol=0)  # in full precision all the same
    assert sum(p.numel() for p in NoiseLevelNet().parameters()) <= 100_000
    again = build_network("NoiseLevelNet", net.config)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(z), result)


def test_it_learns_the_level() -> None:
    """A constant is .44 off in abar; the oracle of these 144 pixels, from the mean square, .083."""
    result = tuned()
    assert sorted(result.parts) == ["noise_level"] and result.plan is None
    assert result.figures["steps"] == 400 and result.figures["images"] == 1800
    lam = torch.linspace(LOWEST, HIGHEST, 1000, dtype=F64)
    assert float(torch.sigmoid(2 * lam).std()) == pytest.approx(0.443, abs=0.002)
    assert result.figures["error_abar"] < 0.12
    held = task().images(2000)[0][-200:]  # type: ignore[misc]
    net = result.parts["noise_level"]
    assert isinstance(net, NoiseLevelNet) and not any(p.requires_grad for p in net.parameters())
    measured = errors(net, held, task().seed)
    assert measured["error_abar"] == pytest.approx(result.figures["error_abar"], rel=1e-3)
    assert measured["loss"] == pytest.approx(result.figures["loss"], rel=1e-3)


def test_its_error_is_within_twice_the_bound_of_information_and_not_below_it() -> None:
    """The state has the variance m = abar V + 1 - abar in each of D pixels, which m tells with a relative error of
    sqrt(2 / D) at best: log(1 - abar) with that times m / ((1 - V)(1 - abar)). An error below it would be a leak."""
    net, D = tuned().parts["noise_level"], math.prod(SHAPE)
    assert isinstance(net, NoiseLevelNet)
    generator = torch.Generator().manual_seed(5)
    x = gaussian().sample(3000, generator).float()
    abar = 0.3  # nearer to 0 the logarithm's own limit helps; nearer to 1 so short a training is not enough
    z = math.sqrt(abar) * x + math.sqrt(1 - abar) * torch.randn(x.shape, generator=generator)
    with torch.no_grad():
        error = (log_sigma2(net, z) - math.log(1 - abar)).square().mean().sqrt().item()
    bound = math.sqrt(2 / D) * (abar * V + 1 - abar) / ((1 - V) * (1 - abar))
    assert 0.9 * bound < error < 2 * bound, (error, bound)


def test_the_trained_network_improves_sampling() -> None:
    """Variance of 1000 samples by 10 steps on linear betas: the truth is .25, the unadjusted list falls short of it."""
    sampler = Sampler().bind({}, tuned().parts)
    x = Noise(range(1000), SHAPE).initial()
    times = task().times
    adjusted, plain = (walk(s, gaussian(), x, times).var().item() for s in (sampler, replace(sampler, updates=())))
    assert plain < 0.16 and abs(adjusted - V) < 0.6 * abs(plain - V), (plain, adjusted)


def test_the_seed_decides() -> None:
    short = replace(QUICK, steps=5)
    one, two = (short.tune(task(50)).parts["noise_level"].state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = task(50)
    other.seed = 1
    third = short.tune(other).parts["noise_level"].state_dict()
    assert not all(torch.equal(one[key], third[key]) for key in one)


def test_progress_and_time_limit() -> None:
    recorded = []
    inputs = task(50)
    inputs.tick = lambda what, done, total, value: recorded.append((what, done, total, value))
    result = NoiseLevel(minutes=0.01, steps=10**6, width=2).tune(inputs)
    assert result.figures["steps"] < 10**5
    what, done, total, value = recorded[-1]
    assert what == "noise level" and done == total == 10**6 and math.isfinite(value)


def test_refusals_and_spelling() -> None:
    assert pick("tuning", "noise_level:steps=100,width=8") == NoiseLevel(steps=100, width=8)
    blind = task()
    blind.images = None
    with pytest.raises(BadInput, match="--data"):
        NoiseLevel().tune(blind)
    flat = task()
    flat.shape = (144,)
    with pytest.raises(BadInput, match=r"\(C, H, W\)"):
        NoiseLevel().tune(flat)
    with pytest.raises(BadInput, match="at least 10"):
        NoiseLevel().tune(task(5))
    with pytest.raises(BadInput, match="above 0"):
        NoiseLevel(minutes=0)
