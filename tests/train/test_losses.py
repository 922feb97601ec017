"""The losses against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.schedules import EDM, Flow, Schedule, VPCosine, VPLinear
from hasten.train import losses
from hasten.train.losses import DenoisingLoss, LogitNormal, LogNormal, Uniform


class Affine(nn.Module):
    """A network with a known error, `a x_t + b t`, that records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.7))
        self.null_label = 10
        self.inputs: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        self.inputs.append((x.detach(), time, label))
        return self.a * x + self.b * time.view(-1, 1, 1, 1)


SCHEDULES = {"cosine": VPCosine(offset=0.0), "linear": VPLinear(), "flow": Flow()}


def losses_at(denoiser: Denoiser, loss: DenoisingLoss, n: int = 64) -> tuple[float, float]:
    """The loss, and the same expectation written out in x0 with the weight itself."""
    torch.manual_seed(3)
    batch = {"x": torch.randn(n, 1, 2, 2)}
    torch.manual_seed(4)
    value = float(loss(denoiser, batch).detach())
    torch.manual_seed(4)
    t = loss.times(denoiser.schedule, losses.stratified(n))
    eps = torch.randn_like(batch["x"])
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    x_t = (alpha.view(-1, 1, 1, 1) * batch["x"] + sigma.view(-1, 1, 1, 1) * eps).double()
    with torch.no_grad():
        error = (denoiser(x_t, t) - batch["x"]).square().mean((1, 2, 3))
    assert loss.weight is not None
    return value, float((loss.weight(alpha, sigma) * error).mean())


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow", "edm"])
@pytest.mark.parametrize("weight", ["x0_weight", "v_weight", "MinSNR"])
def test_a_weight_multiplies_the_squared_error_of_x(schedule: Schedule, prediction: str, weight: str) -> None:
    function = getattr(losses, weight)
    loss = DenoisingLoss(times=LogitNormal(std=0.7), weight=function() if isinstance(function, type) else function)
    ours, direct = losses_at(Denoiser(Affine(), schedule, prediction), loss)
    assert ours == pytest.approx(direct, rel=1e-4)


@pytest.mark.parametrize(
    ("prediction", "weight", "schedule"),
    [
        ("v", losses.v_weight, VPCosine(offset=0.0)),  # v-MSE = (1 + SNR) x0-MSE
        ("v", losses.v_weight, VPLinear()),
        ("eps", losses.snr_weight, VPCosine(offset=0.0)),  # eps-MSE = SNR x0-MSE
        ("eps", losses.snr_weight, Flow()),
        ("x0", losses.x0_weight, Flow()),
        ("edm", losses.EDMWeight(0.5), EDM()),  # EDM's lambda(sigma) c_out(sigma)^2 = 1
    ],
)
def test_the_prediction_s_own_weight_is_the_plain_raw_error(prediction: str, weight: Any, schedule: Schedule) -> None:
    denoiser = Denoiser(Affine(), schedule, prediction)
    loss = DenoisingLoss(weight=weight)
    t = torch.linspace(schedule.t_min, schedule.t_max, 101, dtype=torch.float64)
    assert torch.allclose(loss.factor(denoiser, t), torch.ones(101, dtype=torch.float64), rtol=1e-9)
    batch = {"x": torch.randn(16, 1, 2, 2)}
    torch.manual_seed(0)
    weighted = loss(denoiser, batch)
    torch.manual_seed(0)
    assert torch.allclose(weighted, DenoisingLoss()(denoiser, batch), rtol=1e-5)


def test_weights_in_numbers() -> None:
    alpha, sigma = torch.tensor([0.8, 0.6, 0.1]).double(), torch.tensor([0.6, 0.8, 1.0]).double()
    snr = [16 / 9, 9 / 16, 0.01]
    assert losses.snr_weight(alpha, sigma).tolist() == pytest.approx(snr)
    assert losses.truncated_snr_weight(alpha, sigma).tolist() == pytest.approx([16 / 9, 1, 1])
    assert losses.MinSNR(1.0)(alpha, sigma).tolist() == pytest.approx([1, 9 / 16, 0.01])
    assert losses.EDMWeight(0.5)(alpha, sigma).tolist() == pytest.approx([4 + s for s in snr])  # 1/s^2 + 1/q^2


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow", "edm"])
def test_a_perfect_network_has_no_loss(prediction: str) -> None:
    """On data that is one point, x0 is known: the raw output that gives it makes every loss vanish."""

    class Perfect(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            t = time.double()
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            c_in, c_skip, c_out = (c.view(-1, 1, 1, 1) for c in denoiser.prediction.coefficients(alpha, sigma))
            return ((0.25 - c_skip * (x.double() / c_in)) / c_out).float()

    schedule = VPCosine()
    denoiser = Denoiser(Perfect(), schedule, prediction)
    batch = {"x": torch.full((32, 1, 2, 2), 0.25)}
    # Times away from the ends, where float32 input divided by a tiny c_out or alpha is only round-off.
    middle = LogitNormal(std=0.5)
    for weight in (None, losses.x0_weight, losses.MinSNR()):
        assert float(DenoisingLoss(times=middle, weight=weight)(denoiser, batch)) < 1e-8


def test_every_time_has_a_finite_factor() -> None:
    for schedule in (*SCHEDULES.values(), EDM(), VPCosine()):
        for prediction in ("x0", "v", "flow", "edm"):
            for weight in (losses.x0_weight, losses.snr_weight, losses.v_weight, losses.MinSNR(), losses.EDMWeight()):
                denoiser = Denoiser(Affine(), schedule, prediction)
                t = torch.tensor([schedule.t_min, 0.5, schedule.t_max], dtype=torch.float64)
                assert DenoisingLoss(weight=weight).factor(denoiser, t).isfinite().all(), (schedule, prediction, weight)


# ---- times ----


def test_stratified_has_one_in_each_stratum_in_random_order() -> None:
    torch.manual_seed(0)
    u = losses.stratified(50)
    assert sorted((u * 50).floor().int().tolist()) == list(range(50))
    assert not torch.equal(u, u.sort().values)
    means = torch.stack([losses.stratified(8).mean() for _ in range(500)])
    # The mean moves by offset / n only: variance 1 / (12 n^2). Independent times would have 1 / (12 n).
    assert float(means.var()) == pytest.approx(1 / (12 * 64), rel=0.2)


def test_uniform_covers_the_schedule_s_range() -> None:
    u = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    s = EDM()
    assert Uniform()(s, u).tolist() == pytest.approx([s.t_min, (s.t_min + s.t_max) / 2, s.t_max])


def test_logit_normal_and_log_normal_have_their_moments() -> None:
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    logits = torch.logit(LogitNormal(0.4, 0.8)(Flow(), u))
    assert float(logits.mean()) == pytest.approx(0.4, abs=1e-3) and float(logits.std()) == pytest.approx(0.8, rel=1e-3)
    for schedule in (EDM(), VPCosine(offset=0.0)):
        logs = -schedule.lam(LogNormal(-1.2, 1.2)(schedule, u))
        assert float(logs.mean()) == pytest.approx(-1.2, abs=1e-3)
        assert float(logs.std()) == pytest.approx(1.2, rel=2e-3)
    assert LogNormal()(VPCosine(), torch.zeros(1).double()).isfinite().all()


# ---- labels ----


def test_labels_are_dropped_at_the_stated_rate() -> None:
    net = Affine()
    denoiser = Denoiser(net, VPCosine(), "v")
    torch.manual_seed(0)
    label = torch.arange(4000) % 10
    batch = {"x": torch.zeros(4000, 1, 1, 1), "label": label}
    DenoisingLoss(label_drop=0.1)(denoiser, batch)
    seen = net.inputs[-1][2]
    assert seen is not None
    dropped = seen == 10
    assert abs(float(dropped.float().mean()) - 0.1) < 4 * math.sqrt(0.09 / 4000)
    assert torch.equal(seen[~dropped], label[~dropped]) and torch.equal(batch["label"], label)
    DenoisingLoss(label_drop=0.0)(denoiser, batch)
    assert torch.equal(net.inputs[-1][2], label)  # type: ignore[arg-type]
    DenoisingLoss()(denoiser, {"x": batch["x"]})
    assert net.inputs[-1][2] is None


def test_bad_arguments() -> None:
    with pytest.raises(BadInput, match="fraction in"):
        DenoisingLoss(label_drop=1.5)
    net = Affine()
    del net.null_label
    with pytest.raises(BadInput, match="null label"):
        DenoisingLoss()(Denoiser(net, VPCosine(), "v"), {"x": torch.zeros(2, 1, 1, 1), "label": torch.zeros(2).long()})


def test_the_loss_learns_the_exact_denoiser_of_a_gaussian() -> None:
    """For x ~ N(m, s^2), VP, the best v is linear in x_t at each t; the loss's minimum is there and nowhere else."""
    schedule, t = VPCosine(offset=0.0), 0.4
    mean, std = 0.3, 0.5
    net = nn.Module()
    net.a, net.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))  # type: ignore[assignment]
    net.forward = lambda x, time: net.a * x + net.b  # type: ignore[assignment,method-assign,operator]
    denoiser = Denoiser(net, schedule, "v")
    torch.manual_seed(0)
    batch = {"x": mean + std * torch.randn(50_000, 1, 1, 1)}
    loss = DenoisingLoss(times=lambda schedule, u: torch.full_like(u, t))
    optimiser = torch.optim.LBFGS(net.parameters(), max_iter=20)

    def closure() -> Tensor:
        torch.manual_seed(1)
        optimiser.zero_grad()
        value = loss(denoiser, batch)
        value.backward()
        return value

    optimiser.step(closure)
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    variance = alpha**2 * std**2 + sigma**2
    slope = alpha * sigma * (1 - std**2) / variance  # Cov(v, x_t) / Var(x_t)
    assert float(net.a.detach()) == pytest.approx(slope, abs=0.02)  # type: ignore[union-attr,operator]
    assert float(net.b.detach()) == pytest.approx(-sigma * mean - slope * alpha * mean, abs=0.02)  # type: ignore[union-attr,operator]
