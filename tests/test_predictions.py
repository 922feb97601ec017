"""Predictions and the Denoiser: every raw output means the same clean sample."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser, Wrapper
from hasten.errors import BadInput, HastenError
from hasten.predictions import Prediction, prediction_from, spread
from hasten.schedules import EDM, VE, Discrete, Flow, Schedule, VPCosine, VPLinear, rescale_zero_snr

from .test_schedules import each

NAMES = ["eps", "x0", "v", "flow", "edm"]
kinds = pytest.mark.parametrize("prediction", [prediction_from(name) for name in NAMES], ids=NAMES)


def pair(B: int = 64, D: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, D, generator=g, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


@kinds
def test_the_target_gives_back_x0(prediction: Prediction) -> None:
    """For any alpha and sigma, variance-preserving or not."""
    x0, eps = pair()
    g = torch.Generator().manual_seed(1)
    alpha, sigma = torch.rand(2, 64, generator=g, dtype=torch.float64) * 2 + 0.1
    x_t = spread(alpha, x0) * x0 + spread(sigma, x0) * eps
    _, c_skip, c_out = prediction.coefficients(alpha, sigma)
    raw = prediction.target(x0, eps, alpha, sigma)
    assert (spread(c_skip, x0) * x_t + spread(c_out, x0) * raw - x0).abs().max() < 1e-12


def test_round_trip_of_all_conversions() -> None:
    """x -> eps -> v -> score -> x on random alpha, sigma."""
    x0, eps = pair()
    alpha, sigma = torch.rand(2, 64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.1
    x_t = alpha * x0 + sigma * eps
    eps_back = (x_t - alpha * x0) / sigma
    v = prediction_from("v").target(x0, eps_back, alpha, sigma)
    _, skip, out = prediction_from("v").coefficients(alpha, sigma)
    score = (alpha * (skip * x_t + out * v) - x_t) / sigma**2
    _, skip, out = prediction_from("eps").coefficients(alpha, sigma)
    assert (skip * x_t + out * (-sigma * score) - x0).abs().max() < 1e-12


@kinds
def test_finite_wherever_the_parameterisation_is(prediction: Prediction) -> None:
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    clean = [float(c) for c in prediction.coefficients(one, zero)]
    assert all(math.isfinite(c) for c in clean)
    if prediction.name != "x0":
        assert clean[1:] == [1, 0], "at sigma = 0 the state is the answer"
    noise = [float(c) for c in prediction.coefficients(zero, one)]
    assert all(math.isfinite(c) for c in noise) == (prediction.name != "eps")


def test_edm_preconditioning_is_the_papers() -> None:
    q, data = torch.tensor([0.002, 0.4, 80.0], dtype=torch.float64), 0.5
    c_in, c_skip, c_out = prediction_from({"name": "edm", "sigma_data": data}).coefficients(torch.ones_like(q), q)
    assert c_skip.tolist() == pytest.approx((data**2 / (q**2 + data**2)).tolist())
    assert c_out.tolist() == pytest.approx((q * data / torch.sqrt(q**2 + data**2)).tolist())
    assert c_in.tolist() == pytest.approx((1 / torch.sqrt(q**2 + data**2)).tolist())
    # unit variance of input and target, whatever alpha
    alpha, sigma = torch.tensor(0.3), torch.tensor(0.7)
    g = torch.Generator().manual_seed(0)
    x0, eps = data * torch.randn(200_000, generator=g), torch.randn(200_000, generator=g)
    p = prediction_from("edm")
    assert p.target(x0, eps, alpha, sigma).std() == pytest.approx(1, abs=0.01)
    assert (p.coefficients(alpha, sigma)[0] * (alpha * x0 + sigma * eps)).std() == pytest.approx(1, abs=0.01)


def test_prediction_from() -> None:
    for name in NAMES:
        p = prediction_from(name)
        assert prediction_from(json.loads(json.dumps(p.to_dict()))) == p and p.name == name
    assert prediction_from({"name": "edm", "sigma_data": 1.0}).sigma_data == 1.0  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match="did you mean 'flow'"):
        prediction_from("flwo")
    with pytest.raises(BadInput, match="no field 'sigma'"):
        prediction_from({"name": "edm", "sigma": 1.0})


class Perfect(nn.Module):
    """The raw output of a perfect network for one known pair, whatever it is shown; keeps what it was shown."""

    def __init__(self, prediction: Prediction, schedule: Schedule, x0: Tensor, eps: Tensor, t: Any) -> None:
        super().__init__()
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        self.raw = prediction.target(x0, eps, alpha, sigma)
        self.seen: list[tuple[Tensor, Tensor, dict]] = []

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        self.seen.append((x, time, cond))
        return self.raw


@each
@kinds
def test_denoiser_recovers_x0(schedule: Schedule, prediction: Prediction) -> None:
    x0, eps = pair(3)
    per_sample = torch.tensor([0.05, 0.5, 0.9])
    for t in (0.3, torch.tensor(0.3, dtype=torch.float64), per_sample):
        alpha, sigma = (spread(f(t), x0) for f in (schedule.alpha, schedule.sigma))
        denoiser = Denoiser(Perfect(prediction, schedule, x0, eps, t), schedule, prediction)
        x_t = alpha * x0 + sigma * eps
        tolerance = 1e-10 * (1 + float((sigma / alpha).max()) ** 2)
        assert (denoiser(x_t, t) - x0).abs().max() < tolerance
        assert (denoiser.raw(x_t, t) - denoiser.net.raw).abs().max() == 0
        half = denoiser.replace()(x_t.float(), t)
        assert half.dtype == torch.float32
        assert (half - x0).abs().max() < 1e-4 * (1 + float((sigma / alpha).max()))


@pytest.mark.parametrize("name", ["x0", "v", "flow", "edm"])
@pytest.mark.parametrize("schedule", [Flow(), VPCosine(offset=0.0), rescale_zero_snr(Discrete.linear())])
def test_both_ends_are_defined(name: str, schedule: Schedule) -> None:
    x0, eps = pair(3)
    for t, x_t in ((1.0, eps), (0.0, x0), (torch.tensor([1.0, 0.0, 1.0]), torch.stack([eps[0], x0[1], eps[2]]))):
        prediction = prediction_from(name)
        denoiser = Denoiser(Perfect(prediction, schedule, x0, eps, t), schedule, prediction)
        assert (denoiser(x_t, t) - x0).abs().max() < 1e-12


def test_eps_says_nothing_at_pure_noise() -> None:
    denoiser = Denoiser(nn.Identity(), Flow(), "eps")
    denoiser.net.forward = lambda x, t: x  # type: ignore[method-assign, assignment]
    x = torch.randn(2, 3)
    for t in (1.0, torch.tensor([0.5, 1.0])):
        with pytest.raises(HastenError, match="alpha = 0"):
            denoiser(x, t)
        assert torch.equal(denoiser.raw(x, t), x)
    assert torch.equal(denoiser(x, 0.0), x)


@pytest.mark.parametrize(
    "clock, schedule, expected",
    [
        ("t", VPLinear(), 0.25),
        ("t1000", VPLinear(), 250.0),
        ("t999", VPLinear(), 249.75),
        ("index", Discrete.linear(), 249.0),
        ("log_sigma4", VE(), math.log(float(VE().sigma(0.25))) / 4),
        ("log_sigma4", EDM(), math.log(float(EDM().sigma(0.25))) / 4),
        ("lam", VPCosine(), float(VPCosine().lam(0.25))),
    ],
)
def test_clocks(clock: str, schedule: Schedule, expected: float) -> None:
    x0, eps = pair(3)
    denoiser = Denoiser(Perfect(prediction_from("x0"), schedule, x0, eps, 0.25), schedule, "x0", clock=clock)
    for t in (0.25, torch.tensor([0.25] * 3)):
        denoiser(x0, t, label=torch.tensor([1, 2, 3]))
        _, time, cond = denoiser.net.seen[-1]
        assert time.shape == (3,) and time.dtype == torch.float32 and cond["label"].tolist() == [1, 2, 3]
        assert time.tolist() == pytest.approx([expected] * 3, rel=1e-6)


def test_the_network_gets_its_own_dtype() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(5, 5)

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return self.line(x)

    x, t = pair(4)[0], torch.tensor(0.4, dtype=torch.float64)
    denoiser = Denoiser(Net(), VPLinear(), "v")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert denoiser(x.to(dtype), t).dtype == dtype
    exact = denoiser(x, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = denoiser(x.float(), t)
    assert cast.dtype == torch.float32 and 0 < (cast - exact).abs().max() < 0.05
    low = Denoiser(Net().bfloat16(), VPLinear(), "v")(x.float(), t)
    assert low.dtype == torch.float32


def test_gradient_in_t() -> None:
    x0, eps = pair(2)
    denoiser = Denoiser(Perfect(prediction_from("v"), VPLinear(), x0, eps, 0.3), VPLinear(), "v")
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: denoiser(x0, t), (t,))


def test_bad_denoisers() -> None:
    with pytest.raises(BadInput, match="did you mean 't1000'"):
        Denoiser(nn.Identity(), VPLinear(), "v", clock="t1000s")
    with pytest.raises(BadInput, match="needs a Discrete"):
        Denoiser(nn.Identity(), VPLinear(), "v", clock="index")
    with pytest.raises(BadInput, match="needs a Schedule"):
        Denoiser(nn.Identity(), "vp", "v")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="one time or one a sample"):
        Denoiser(nn.Identity(), VPLinear(), "v")(torch.randn(4, 2), torch.rand(3))
    with pytest.raises(BadInput, match="no argument 'nett'"):
        Denoiser(nn.Identity(), VPLinear(), "v").replace(nett=1)


def test_replace_and_wrapper_share_the_rest() -> None:
    net = nn.Linear(2, 2)
    denoiser = Denoiser(net, VPLinear(), "v", null_label=10).eval()
    other = denoiser.replace(schedule=Flow(), prediction="flow")
    assert other.net is net and other.null_label == 10 and other.schedule == Flow() and not other.training
    wrapped = Wrapper(Wrapper(denoiser))
    assert wrapped.schedule == VPLinear() and wrapped.null_label == 10 and wrapped.net is net
    with pytest.raises(AttributeError, match="nonsense"):
        _ = wrapped.nonsense
