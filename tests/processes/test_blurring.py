"""Blurring diffusion: the blur, the posterior of every frequency, and the chain."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten import plan
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.plan import Plan
from hasten.plan.draw import draw
from hasten.processes.blurring import Blurring
from hasten.samplers.blurring import BlurringSampler
from hasten.samplers.ddpm import DDPM
from hasten.sampling import Noise, walk
from hasten.schedules import Schedule, schedule_from_dict

F64 = torch.float64
PAPER = BlurringSampler(shrink=0.0)
SHAPE = (2, 6, 10)
EARLY = 1e-12  # just above t = 0, where the noise is not yet exactly 0


def grid(steps: int, end: float = EARLY) -> Tensor:
    times = torch.linspace(1, 0, steps + 1, dtype=F64)
    times[-1] = end
    return times


def images(n: int = 2, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, dtype=F64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@dataclass(frozen=True)
class Plain(Schedule):
    """The scalar path of a Blurring process, as an ordinary schedule."""

    def _alpha(self, t: Tensor) -> Tensor:
        return Blurring(SHAPE)._alpha(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return Blurring(SHAPE)._sigma(t)


class Tiny(nn.Module):
    """A network that mixes neighbours and depends on the time."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1).double()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return torch.tanh(self.conv(x) + time.to(x.dtype).view(-1, 1, 1, 1))


def test_the_path_has_the_log_snr_of_the_paper() -> None:
    process = Blurring(SHAPE)
    t = torch.linspace(EARLY, 1, 33, dtype=F64)
    first, last = math.atan(math.exp(-5)), math.atan(math.exp(5))
    assert torch.allclose(2 * process.lam(t), -2 * torch.log(torch.tan(first + (last - first) * t)), atol=1e-10)
    assert torch.allclose(process.alpha(t) ** 2, torch.sigmoid(2 * process.lam(t)), atol=1e-14)
    assert (process.time(process.lam(t)) - t).abs().max() < 1e-12
    assert process.time(process.lam(torch.zeros(()))) == 0 and float(process.time(40.0)) == 0


def test_the_blur_is_gaussian_of_this_standard_deviation() -> None:
    """The impulse response has the variance s^2 along each axis, also for H != W; the mean is conserved exactly, and two
    blurs are one of the summed variances."""
    process = Blurring((1, 61, 75), sigma_max=4.0, d_min=1e-12)
    x = torch.zeros(1, 1, 61, 75, dtype=F64)
    x[0, 0, 30, 37] = 1.0
    t = torch.tensor([0.7], dtype=F64)
    s = 4.0 * math.sin(0.35 * math.pi) ** 2
    response = process.apply(x, t)[0, 0]
    for axis, n in ((1, 61), (0, 75)):
        offset = torch.arange(n, dtype=F64) - n // 2
        assert math.isclose(math.sqrt(float((response.sum(axis) * offset**2).sum())), s, rel_tol=1e-6)
    assert math.isclose(float(response.sum()), 1.0, abs_tol=1e-12)
    twice = process.dissipation(torch.tensor(3.0), process.keys) * process.dissipation(torch.tensor(4.0), process.keys)
    assert torch.allclose(twice, process.dissipation(torch.tensor(5.0), process.keys), atol=1e-15)


@pytest.mark.parametrize("steps", [3, 17])
def test_without_blur_every_coefficient_is_that_of_ddpm(steps: int) -> None:
    for end in (EARLY, 0.0):
        own = plan(BlurringSampler(), Blurring(SHAPE, sigma_max=0.0), grid(steps, end))
        theirs = plan(DDPM(), Plain(), grid(steps, end))
        for name in ("a", "A", "B", "C"):
            assert (getattr(own, name) - getattr(theirs, name)[..., None]).abs().max() < 1e-15, name


@pytest.mark.parametrize("sigma_max", [0.0, 7.0, 100.0])
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.5, 0.1), (0.3, 0.299)])
def test_a_step_is_the_gaussian_posterior_of_every_frequency(sigma_max: float, t: float, s: float) -> None:
    """Mean and variance of u_s given u_t and x, by conditioning their joint Gaussian, for x = w / d_t."""
    process = Blurring(SHAPE, sigma_max)
    keys = process.keys.unique()
    at = torch.tensor([t, s], dtype=F64)
    d = process.factor(at[:, None], keys)
    (a_t, a_s), (n_t, n_s) = process.alpha(at)[:, None] * d, process.sigma(at)
    step = a_t / a_s
    cov = step * n_s**2  # of u_s and u_t, given x
    gain = cov / n_t**2
    rows = plan(PAPER, process, at)
    assert (rows.a[0] - gain).abs().max() < 1e-14
    assert (rows.B[0, 0] * d[0] - (a_s - gain * a_t)).abs().max() < 1e-14
    assert (rows.C[0, 0] ** 2 - (n_s**2 - cov**2 / n_t**2)).abs().max() < 1e-14


@pytest.mark.parametrize(("steps", "least"), [(10, 0.469), (100, 0.0604), (1000, 0.00621)])
def test_every_variance_is_positive_and_least_without_blur(steps: int, least: float) -> None:
    times = grid(steps)
    for sigma_max in (0.0, 1.0, 20.0, 100.0):
        process = Blurring((1, 28, 28), sigma_max)
        keys = process.keys.unique()
        alpha = process.alpha(times)[:, None] * process.factor(times[:, None], keys)
        sigma = process.sigma(times)[:, None]
        ratio = 1 - (alpha[:-1] / alpha[1:]) ** 2 * (sigma[1:] / sigma[:-1]) ** 2
        assert ratio.min() > 0 and abs(ratio.min() - least) < 0.006 * least
        assert int(ratio.min(0).values.argmin()) == 0, "at the mean of the image"


@pytest.mark.parametrize("eta", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("steps", [2, 7, 40])
def test_with_the_true_image_the_chain_ends_at_it(eta: float, steps: int) -> None:
    """Each z_s then has the process's own distribution given x: to t = 0+ 49.4 dB, to t = 0 exactly x."""
    process, x = Blurring((1, 28, 20), 20.0), images(1, (1, 28, 20))
    noise = Noise([3], (1, 28, 20), F64)

    def perfect(z: Tensor, t: Tensor) -> Tensor:
        return process.apply(x, t)

    z = walk(BlurringSampler(eta, 0.0), perfect, noise.initial(), grid(steps), noise, schedule=process)
    decibels = 10 * math.log10(4 / float((z - x).square().mean()))
    assert abs(decibels - 49.4) < 0.6
    z = walk(BlurringSampler(eta, 0.0), perfect, noise.initial(), grid(steps, 0.0), noise, schedule=process)
    assert (z - x).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_of_half_precision(dtype: torch.dtype) -> None:
    """The coefficients are float64 numbers whatever the state: the chain ends at the image, up to its rounding."""
    process, x = Blurring((1, 28, 20), 7.0), images(1, (1, 28, 20)).to(dtype)
    noise = Noise([3], (1, 28, 20), dtype)
    rows = plan(BlurringSampler(), process, grid(5, 0.0))
    z = rows(lambda z, t: process.clean(x, t), process.begin(noise.initial(), 1.0), noise)
    assert z.dtype == dtype and (z - x).abs().mean() < 0.3
    walked = walk(PAPER, lambda z, t: process.clean(x, t), noise.initial(), grid(200, 0.0), noise, schedule=process)
    assert (walked - x).abs().max() < 0.05


def test_eta_keeps_the_marginals() -> None:
    """For every eta the variance of a step given x is sigma_s^2: (k sigma_t)^2 + what is added."""
    process, at = Blurring(SHAPE, 7.0), torch.tensor([0.8, 0.5], dtype=F64)
    for eta in (0.0, 0.4, 1.0):
        rows = plan(BlurringSampler(eta), process, at)
        added = rows.C[0, 0] ** 2 if rows.C.shape[1] else 0.0
        variance = (rows.a[0] * process.sigma(at[0])) ** 2 + added
        assert (variance - process.sigma(at[1]) ** 2).abs().max() < 1e-14
    with pytest.raises(BadInput, match="eta must be in"):
        BlurringSampler(1.5)


def test_the_shrinkage_bounds_what_errors_are_magnified_by() -> None:
    """The gain of an error of w is that of a Wiener filter: d_s d_t / (d_t^2 + kappa), scaled to 1 without blur, as least
    squares gives it; the mean of the image is not changed, and a step of no blur at all neither."""
    process, at = Blurring((1, 28, 28), 20.0), torch.tensor([0.5, 0.05], dtype=F64)
    paper, shrunk = (plan(BlurringSampler(shrink=c), process, at) for c in (0.0, 0.01))
    d_t, d_s = process.factor(at[:, None], process.keys.unique())
    kappa = 0.01 * process.sigma(at[0]) ** 2
    a_s = process.alpha(at[1])
    wiener = a_s * d_s * (d_t * (1 + kappa) / (d_t**2 + kappa) - 1 / d_t)
    assert (shrunk.B[0, 0] - paper.B[0, 0] - wiener).abs().max() < 1e-12 * float(paper.B.abs().max())
    assert paper.B.max() > 400 and shrunk.B.max() < 8
    assert torch.equal(shrunk.a, paper.a) and torch.equal(shrunk.C, paper.C) and shrunk.B[0, 0, 0] == paper.B[0, 0, 0]


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_plan_runs_as_the_sampler_does(prediction: str) -> None:
    process = Blurring(SHAPE, 7.0)
    denoiser = Denoiser(Tiny(), process, prediction)
    for seeds in ([5], [5, 6]):  # a batch of one too
        noise = Noise(seeds, SHAPE, F64)
        times = grid(6, 0.0)
        walked = walk(BlurringSampler(), denoiser, noise.initial(), times, noise.rows(slice(None)))
        compiled = Plan.from_json(plan(BlurringSampler(), process, times).to_json())
        planned = compiled(denoiser, noise.initial(), noise.rows(slice(None)))
        assert (planned - walked).abs().max() < 1e-12 * max(1.0, float(walked.abs().max()))
    with pytest.raises(BadInput, match="the plan was made for Blurring"):
        compiled(Denoiser(Tiny(), Blurring(SHAPE, 8.0), prediction), noise.initial(), noise)
    drawn, start = draw(denoiser, "blurring:eta=0", times, noise), process.begin(noise.initial(), 1.0)
    assert (drawn - walk(BlurringSampler(0.0), denoiser, start, times)).abs().max() < 1e-10


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_loss_is_least_for_the_true_image_and_its_noise(prediction: str) -> None:
    """The raw output that gives D_t x costs nothing; another costs its squared distance."""
    process, x, eps = Blurring(SHAPE, 7.0), images(), images(seed=1)
    t = torch.tensor([0.2, 0.9], dtype=F64)
    blurred = process.apply(x, t)

    class Told(nn.Module):
        off = 0.0

        def forward(self, z: Tensor, time: Tensor) -> Tensor:
            alpha, sigma = process.alpha(t), process.sigma(t)
            return denoiser.prediction.target(blurred, eps, alpha, sigma) + self.off

    denoiser: Any = Denoiser(Told(), process, prediction)
    assert process.loss(denoiser, x, t, eps, {}).max() < 1e-12
    assert (denoiser(process.corrupt(x, t, eps), t) - blurred).abs().max() < 1e-10
    denoiser.net.off = 0.5
    assert torch.allclose(process.loss(denoiser, x, t, eps, {}), torch.full((2,), 0.25), atol=1e-6)


def test_a_process_is_saved_as_numbers() -> None:
    process = Blurring(SHAPE, 7.0, 0.01)
    assert schedule_from_dict(json.loads(json.dumps(process.to_dict()))) == process


def test_numbers_and_shapes_are_checked() -> None:
    for bad in ({"sigma_max": -1.0}, {"d_min": 0.0}, {"logsnr_max": -20.0}):
        with pytest.raises(BadInput, match="Blurring needs"):
            Blurring(SHAPE, **bad)
    with pytest.raises(BadInput, match=r"shape must be \(..., H, W\)"):
        Blurring((4,))
    with pytest.raises(BadInput, match="was made for samples of"):
        Blurring(SHAPE).apply(images(shape=(1, 6, 10)), torch.tensor(0.5))
