"""Preconditioned: exact where the data are Gaussian, of the declared order where they are not what it thinks they are."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.errors import BadInput
from hasten.exact import GaussianMixture, g8, m2, m64
from hasten.pick import format_spec
from hasten.plan import Plan, plan
from hasten.plan.basis import Basis
from hasten.plan.draw import draw
from hasten.samplers import UniPC
from hasten.samplers.preconditioned import LocalVariance, Preconditioned, local_variance
from hasten.sampling import Noise, walk
from hasten.schedules import Schedule, VPCosine, VPLinear
from hasten.times import UniformLambda, UniformTime
from tests.samplers.problems import ALL, FOUR, VE_WIDE, between, drive, ends, mixture, mixture_ode, normals, rms

F64 = torch.float64


def turned(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=torch.Generator().manual_seed(seed)))[0]


def moments(model: GaussianMixture) -> dict[str, Tensor]:
    w, mu = model.weights, model.means
    mean = w @ mu
    covariance = torch.diag(w @ model.variances) + torch.einsum("k,ki,kj->ij", w, mu - mean, mu - mean)
    return {"mean": mean, "covariance": covariance}


# ---- exact on Gaussian data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ALL.values(), ids=list(ALL))
def test_exact_on_a_gaussian(schedule: Schedule) -> None:
    """G8 with its covariance: any number of steps gives the endpoint of the flow, with the default options and others."""
    model = g8(schedule)
    basis = Basis(model.mean, model.variance)
    local = LocalVariance(torch.tensor([0.01, 10.0], dtype=F64), basis.values.expand(2, -1))
    x = schedule.prior_std(schedule.t_max) * Noise(range(6), (8,), F64).initial()
    for steps in (1, 2, 4):
        times = ends(schedule, steps)
        wanted = model.endpoint(x, times[0])
        for change in (
            {},
            {"form": "angle"},
            {"nodes": "given"},
            {"kappa": math.inf},
            {"first": "conditional"},
            {"local": local, "variable": "log_q"},
            {"nodes": "given", "first": "conditional", "order": 1},
        ):
            sampler = replace(Preconditioned(basis=basis), **change)
            found, asked = drive(sampler, schedule, model, x, times)
            assert (found - wanted).abs().max() < 1e-10, change
            assert len(asked) == steps == sampler.nfe(steps)
            assert bool((torch.stack(asked)[1:] < torch.stack(asked)[:-1]).all())
    above = UniformTime(end=0.3)(schedule, 3)
    found, asked = drive(Preconditioned(basis=basis), schedule, model, x, above)
    assert (found - model.endpoint(x, above[0], above[-1])).abs().max() < 1e-10 and len(asked) == 3


def test_exact_on_a_gaussian_in_cosine_coordinates() -> None:
    """Data of a power spectrum that falls with frequency, bound through the statistics; all groups kept."""
    schedule, shape = VPCosine(offset=0.0), (2, 6, 5)
    v = 0.01 + 3 / (1 + torch.arange(60, dtype=F64).reshape(shape))
    mean = torch.linspace(-0.4, 0.5, 60, dtype=F64).reshape(shape)
    basis = Basis(mean, v, "dct")

    def denoise(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        a, s = schedule.alpha(t), schedule.sigma(t)
        return basis.pixels(a * v / (a**2 * v + s**2) * basis.coordinates(x, a))

    sampler = Preconditioned().bind({"mean": mean, "spectrum": v}, {})
    assert sampler.basis == basis and sampler == Preconditioned().bind({"mean": mean, "spectrum": v}, {})
    x = Noise(range(3), shape, F64).initial()
    compiled = plan(sampler, schedule, ends(schedule, 4))
    wanted = basis.pixels(v.sqrt() * basis.coordinates(x, 0.0))
    assert (compiled(denoise, x) - wanted).abs().max() < 1e-10
    few = replace(sampler, groups=6).bind({"mean": mean, "spectrum": v}, {})
    assert few.basis.groups == 6 and 1e-10 < rms(plan(few, schedule, ends(schedule, 4))(denoise, x), wanted) < 0.02


# ---- order --------------------------------------------------------------------------------------------------------

Q0, Q1 = 6.0, 0.1


def slopes(sampler: Preconditioned, schedule: Schedule, counts: tuple[int, int] = (40, 120)) -> list[float]:
    """Of the error from q = 6 to q = 0.1, without teleport, on G8 and M2; twice their covariance is taken for it."""
    gaussian, modes = g8(schedule), mixture("M2", schedule)
    start = gaussian.mean + normals(16, 8) * torch.sqrt(gaussian.variance + Q0**2)
    exact = gaussian.mean + (start - gaussian.mean) * torch.sqrt(
        (gaussian.variance + Q1**2) / (gaussian.variance + Q0**2)
    )
    wrong = Basis(gaussian.mean, 2 * gaussian.variance), Basis(torch.zeros(2), torch.tensor([0.7, 0.6]))
    found = []
    for model, (y0, y1), basis in zip((gaussian, modes), ((start, exact), mixture_ode("M2", 16, Q0, Q1)), wrong):
        bound = replace(sampler, basis=basis, kappa=math.inf, nodes="given")
        if sampler.local is not None:
            bound = replace(bound, local=replace(sampler.local, values=sampler.local.values * basis.values))
        errors = []
        for count in counts:
            times = between(schedule, Q0, Q1, count, warm=12)
            z, _ = drive(bound, schedule, model, y0 * schedule.alpha(times[0]), times)
            errors.append(rms(z / schedule.alpha(times[-1]), y1))
        found.append(math.log(errors[0] / errors[1]) / math.log(counts[1] / counts[0]))
    return found


@pytest.mark.parametrize(
    "form, variable, order, correct",
    [
        *[
            ("mean", "asinh", order, correct)
            for order in (1, 2, 3)
            for correct in (False, True)
            if order > 1 or not correct
        ],
        ("angle", "asinh", 2, False),
        ("angle", "asinh", 2, True),
        ("angle", "atan", 3, False),
        ("mean", "log_q", 2, True),
        ("angle", "log_q", 3, True),
        ("mean", "atan", 2, False),
    ],
)
def test_order_of_convergence(form: str, variable: str, order: int, correct: bool) -> None:
    sampler = Preconditioned(order, variable=variable, correct=correct, form=form)
    assert sampler.convergence == order + correct
    gaussian, modes = slopes(sampler, VPLinear())
    assert sampler.convergence - 0.3 < gaussian < sampler.convergence + 0.8
    assert sampler.convergence - 0.3 < modes


@pytest.mark.parametrize("schedule", [FOUR["VPCosine"], FOUR["EDM"]], ids=["VPCosine", "EDM"])
def test_order_on_every_schedule(schedule: Schedule) -> None:
    assert min(slopes(Preconditioned(2), schedule, (30, 90))) > 2.7


# ---- identities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1.0, 0.4])
def test_one_variance_without_teleport_is_adams_on_v_prediction(c: float) -> None:
    """With v = c^2, m = 0: Adams-Bashforth 2 in phi on dY/dphi = -F, Y = y/sqrt(q^2 + c^2), from pure noise to q = 0."""
    schedule, model, steps = VPCosine(offset=0.0), m2(VPCosine(offset=0.0)), 9
    phi = torch.linspace(math.pi / 2, 0, steps + 1, dtype=F64)
    times = torch.cat([torch.ones(1), schedule.time(-torch.log(c * torch.tan(phi[1:-1]))), torch.zeros(1)]).double()
    Y = x = Noise(range(5), (2,), F64).initial()
    before, h = None, float(phi[0] - phi[1])
    for k, t in enumerate(times[:-1]):
        # the state alpha y, of radius sqrt(sigma^2 + alpha^2 c^2)
        alpha, R = schedule.alpha(t), torch.hypot(schedule.sigma(t), c * schedule.alpha(t))
        x0 = model(R * Y, t)
        F = (x0 * R - alpha * c**2 * Y) / (c * schedule.sigma(t))
        if c == 1:
            assert (F + (alpha * (R * Y - alpha * x0) / schedule.sigma(t) - schedule.sigma(t) * x0)).abs().max() < 1e-12
        Y = Y + h * (F if k < 2 and before is None else 1.5 * F - 0.5 * before if k > 1 else F)
        before = F if k else None
    sampler = Preconditioned(
        2,
        math.inf,
        "atan",
        correct=False,
        form="angle",
        nodes="given",
        basis=Basis(torch.zeros((), dtype=F64), torch.tensor(c**2)),
    )
    # the times are rounded, and near t = 1 the angle moves far for that
    assert (walk(sampler, model, x, times) - c * Y).abs().max() < 1e-9


def test_tiny_variances_are_the_data_form() -> None:
    """v -> 0 is UniPC in data form, whatever the mean, where both interpolate in log q."""
    schedule, model = VPLinear(), m2(VPLinear())
    times = UniformLambda(end=0.05)(schedule, 12)
    x = Noise(range(5), (2,), F64).initial()
    for order in (1, 3):
        basis = Basis(torch.tensor([0.3, -2.0]), torch.tensor(1e-13))
        ours = Preconditioned(order, math.inf, "log_q", nodes="given", basis=basis)
        peer = UniPC(order, "bh1", lower_order_final=False)
        # a single difference has a weight by rule of thumb in UniPC: none in order 1, one step in order 3
        ours, peer = replace(ours, correct=order > 1), replace(peer, corrector=order > 1)
        difference = walk(ours, model, x, times) - walk(peer, model, x, times)
        assert difference.abs().max() < (1e-9 if order == 1 else 2e-3)


# ---- plans --------------------------------------------------------------------------------------------------------


def bound(model: GaussianMixture, **options: Any) -> Preconditioned:
    sampler = Preconditioned(moments="full", **options)
    told = moments(model)
    v, U = torch.linalg.eigh(told["covariance"])
    levels = torch.logspace(-2, 1, 10, dtype=F64)
    x = model.sample(200, torch.Generator().manual_seed(0))
    told |= {
        "local_levels": levels,
        "local_variance": local_variance(model, x, levels, Basis(told["mean"], v, "matrix", U)),
    }
    return sampler.bind(told, {})


PLANNED = ("VPLinear", "EDM", "Flow", "ZeroSNR")


@pytest.mark.parametrize("schedule", [ALL[name] for name in PLANNED], ids=PLANNED)
@pytest.mark.parametrize("first", ["teleport", "conditional"])
@pytest.mark.parametrize("form, variable", [("mean", "asinh"), ("angle", "atan")])
def test_plan_is_the_coroutine(schedule: Schedule, first: str, form: str, variable: str) -> None:
    model = m2(schedule)
    x = schedule.prior_std(schedule.t_max) * Noise([3, 4, 5], (2,), F64).initial()
    for kappa, nodes in ((4.0, "own"), (3.0, "given"), (math.inf, "own")):
        sampler = bound(model, first=first, kappa=kappa, nodes=nodes, form=form, variable=variable)
        for steps in (1, 2, 5):
            times = ends(schedule, steps)
            direct, asked = drive(sampler, schedule, model, x, times)
            compiled = plan(sampler, schedule, times)
            assert torch.isfinite(direct).all()
            again = Plan.from_json(compiled.to_json())
            torch.testing.assert_close(again(model, x), direct, rtol=1e-11, atol=1e-11)
            assert len(asked) == compiled.nfe == steps
            # no more history than the order needs
            assert int((compiled.B != 0).any(-1).sum(1).max()) <= 4 and int((compiled.A != 0).any(-1).sum(1).max()) <= 3


def test_sampling_with_it() -> None:
    """`draw` gives the same from the sampler, from its plan and from the plan's file; single precision is enough."""
    schedule = VPLinear()
    model = m64(schedule)
    sampler = bound(model)
    noise, times = Noise(range(4), (64,)), UniformTime()(schedule, 6)
    told = Plan.from_json(plan(sampler, schedule, times).to_json())
    found = draw(model, sampler, times, noise)
    assert torch.equal(found, draw(model, None, times, noise, plan=told))
    assert (
        found.dtype == torch.float32
        and (found - walk(sampler, model, noise.initial().double(), times)).abs().max() < 1e-4
    )
    assert told.begin == 1.0 and format_spec(sampler) == told.sampler == "preconditioned:moments=full"
    assert hasten.pick("samplers", told.sampler) == Preconditioned(moments="full")


def test_times_with_gradients_are_refused() -> None:
    """Its nodes and the variances of its steps follow the times in ways that a gradient would miss."""
    schedule = VPLinear()
    times = torch.tensor([1.0, 0.6, 0.2, 0.0], dtype=F64, requires_grad=True)
    with pytest.raises(BadInput, match="cannot be differentiated"):
        plan(bound(m2(schedule), nodes="given"), schedule, times)


# ---- quality ------------------------------------------------------------------------------------------------------

# RMS over 256 samples, by the least of about 60 settings of the common samplers on the linear schedule
BARS = {("M2", 5): 0.1115, ("M2", 10): 0.0223, ("M64", 5): 0.0499, ("M64", 10): 0.0132}


@pytest.mark.parametrize("name", ["M2", "M64"])
def test_closer_to_the_exact_flow_than_others(name: str) -> None:
    """64 samples from q = 157; with local variances and without, 5 and 10 steps."""
    schedule = ALL["Discrete"]
    model, q0 = mixture(name, schedule), float(schedule.q(1.0))
    y0, y1 = mixture_ode(name, 64, q0, 0.0)
    x = y0 * schedule.alpha(1.0)
    for sampler in (bound(model), replace(bound(model), local=None)):
        for steps in (5, 10):
            found = plan(sampler, schedule, UniformTime()(schedule, steps))(model, x)
            assert rms(found, y1) < BARS[name, steps] / 1.8
            rivals = [
                rms(plan(UniPC(order), schedule, grid(schedule, steps))(model, x), y1)
                for grid in (UniformLambda(), UniformTime())
                for order in (2, 3)
            ]
            assert rms(found, y1) < min(rivals) / 1.8


# ---- what it is bound to ------------------------------------------------------------------------------------------


def test_local_variance() -> None:
    """Of Gaussian data their variance, at every level; of modes far apart that of a mode below their distance."""
    schedule = VE_WIDE
    gaussian = g8(schedule)
    basis = Basis(gaussian.mean, gaussian.variance)
    levels = torch.tensor([1e-3, 0.1, 1.0, 30.0], dtype=F64)
    x = gaussian.sample(4000, torch.Generator().manual_seed(0))
    found = local_variance(gaussian, x, levels, basis, batch=500)
    assert found.shape == (4, 8) and ((found / gaussian.variance).log().abs() < 0.12).all()
    modes = GaussianMixture(
        torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.full((2, 1), 0.0025), schedule, labels=[0, 1]
    )
    x, line = modes.sample(2000, torch.Generator().manual_seed(5)), Basis(torch.zeros(1), torch.ones(1))
    found = local_variance(modes, x, torch.tensor([0.01, 0.1, 30.0], dtype=F64), line)[:, 0]
    assert found[0].item() == pytest.approx(0.0025, rel=0.15) and found[1].item() == pytest.approx(0.0025, rel=0.15)
    assert found[2].item() == pytest.approx(1.0025, rel=0.15)
    label = (x[:, 0] > 0).long()
    known = local_variance(modes, x, torch.tensor([30.0], dtype=F64), line, label=label)
    assert known.item() == pytest.approx(0.0025, rel=0.15)


def test_local_variances_between_levels() -> None:
    local = LocalVariance(torch.tensor([0.1, 1.0, 10.0]).double(), torch.tensor([[0.01], [0.1], [0.4]]).double())
    for q, v in ((0.01, 0.01), (0.1, 0.01), (math.sqrt(0.1), math.sqrt(1e-3)), (1.0, 0.1), (50.0, 0.4)):
        assert local.at(torch.tensor(q, dtype=F64)).item() == pytest.approx(v, rel=1e-6)


def test_statistics() -> None:
    mean, spectrum = torch.zeros(1, 4, 4), torch.linspace(0, 3, 16).reshape(1, 4, 4)
    told = {"mean": mean, "spectrum": spectrum}
    assert Preconditioned().bind(told, {}).basis.values[0].item() == pytest.approx(3e-6)  # a constant coefficient
    one = Preconditioned(moments="scalar").bind(told, {})
    assert one.basis.values.tolist() == pytest.approx([1.5]) and one.top == pytest.approx(math.sqrt(3))
    levels, local = torch.tensor([0.1, 10.0]).double(), torch.stack([0.1 * spectrum, 2 * spectrum]).double()
    bound_ = Preconditioned(groups=4).bind({**told, "local_levels": levels, "local_variance": local}, {})
    assert 1 < bound_.basis.groups <= 4 and bound_.local.values.shape == (2, bound_.basis.groups)
    assert (bound_.local.values[1] <= bound_.basis.values).all()
    assert json.loads(json.dumps(bound_.basis.to_dict()))["kind"] == "dct"
    assert hash(bound_) == hash(
        Preconditioned(groups=4).bind({**told, "local_levels": levels, "local_variance": local}, {})
    )


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Preconditioned(variable="logq"), "did you mean 'log_q'"),
        (lambda: Preconditioned(form="mea"), "did you mean 'mean'"),
        (lambda: Preconditioned(order=5), "1, 2, 3 or 4"),
        (lambda: Preconditioned(kappa=0.0), "positive"),
        (lambda: Preconditioned(low=-1.0), "positive"),
        (lambda: Preconditioned().bind({}, {}), "hasten tune MODEL --method moments"),
        (lambda: Preconditioned().bind({"mean": torch.zeros(1, 4, 4)}, {}), "spectrum"),
        (lambda: Preconditioned(moments="full").bind({"mean": torch.zeros(4)}, {}), "covariance"),
        (lambda: plan(Preconditioned(), VPLinear(), ends(VPLinear(), 3)), "bind"),
        (lambda: Preconditioned(local=LocalVariance(torch.ones(2), torch.ones(2, 1))), "belong to a basis"),
    ],
)
def test_what_is_refused(make: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        make()
