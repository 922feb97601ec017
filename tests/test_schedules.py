"""Schedules: the published table values, exact ends, inverses and gradients."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from hasten.errors import BadInput
from hasten.schedules import (
    EDM,
    VE,
    Discrete,
    Flow,
    Schedule,
    SubVP,
    VPCosine,
    VPLinear,
    rescale_zero_snr,
    schedule_from_dict,
)

FAMILIES: dict[str, Schedule] = {
    "vp_linear": VPLinear(),
    "vp_constant": VPLinear(beta_min=0.5, beta_max=0.5),
    "vp_cosine": VPCosine(),
    "vp_cosine_0": VPCosine(offset=0.0),
    "sub_vp": SubVP(),
    "ve": VE(),
    "edm": EDM(),
    "flow": Flow(),
    "flow_3": Flow(shift=3.0),
    "linear": Discrete.linear(),
    "linear_q": Discrete.linear(convention="log_q"),
    "scaled_linear": Discrete.scaled_linear(),
    "cosine": Discrete.cosine(),
    "zero_snr": rescale_zero_snr(Discrete.scaled_linear()),
    "zero_snr_q": rescale_zero_snr(Discrete.scaled_linear(convention="log_q")),
}
each = pytest.mark.parametrize("schedule", FAMILIES.values(), ids=FAMILIES)
PURE = {"vp_cosine", "vp_cosine_0", "flow", "flow_3", "zero_snr", "zero_snr_q"}


def grid() -> torch.Tensor:
    t = torch.cat([torch.linspace(0, 1, 4001), torch.logspace(-7, -2, 200), 1 - torch.logspace(-7, -2, 200)])
    return t.double().unique()


@pytest.mark.parametrize(
    "table, abar, q, lam",
    [
        (Discrete.linear(), (0.99990000, 0.07858724, 4.035830e-05), (0.010001, 157.4073), (4.6051, -5.0588)),
        (Discrete.scaled_linear(), (0.99915000, 0.27766965, 4.660099e-03), (0.029167, 14.6146), (3.5347, -2.6820)),
        (Discrete.cosine(), (0.99995872, 0.49384359, 2.428767e-09), (0.006425, 20291.1696), (5.0475, -9.9179)),
    ],
)
def test_published_tables(table: Discrete, abar: tuple, q: tuple, lam: tuple) -> None:
    places = [0, 499, 999]
    t = torch.tensor([(i + 1) / 1000 for i in places], dtype=torch.float64)
    printed = {"rel": 2e-7}  # seven or eight figures were printed
    assert [table.alphas_cumprod[i] for i in places] == pytest.approx(abar, **printed)
    assert (table.alpha(t) ** 2).tolist() == pytest.approx(abar, **printed)
    assert table.q(t)[::2].tolist() == pytest.approx(q, rel=1e-4)
    assert table.lam(t)[::2].tolist() == pytest.approx(lam, abs=5e-5)
    assert table.index(t).tolist() == pytest.approx(places, abs=1e-9)


@each
def test_curves_agree_with_one_another(schedule: Schedule) -> None:
    t = grid()[1:-1]
    alpha, sigma, lam = schedule.alpha(t), schedule.sigma(t), schedule.lam(t)
    assert alpha.dtype == sigma.dtype == lam.dtype == torch.float64
    assert (lam - torch.log(alpha / sigma)).abs().max() < 1e-10
    assert bool((lam[1:] < lam[:-1]).all()), "lam must strictly decrease"
    if isinstance(schedule, (VPLinear, VPCosine, Discrete)):
        assert (alpha**2 + sigma**2 - 1).abs().max() < 1e-14


@each
def test_there_and_back(schedule: Schedule) -> None:
    t = grid()
    assert (schedule.time(schedule.lam(t)) - t).abs().max() < 1e-9
    lam = torch.linspace(-4.0, 4.0, 101, dtype=torch.float64)
    low, high = schedule.lam(1.0), schedule.lam(1e-6)
    lam = lam[(lam > low) & (lam < high)]
    assert (schedule.lam(schedule.time(lam)) - lam).abs().max() < 1e-9


@pytest.mark.parametrize("name", FAMILIES)
def test_ends_are_exact(name: str) -> None:
    schedule = FAMILIES[name]
    assert schedule.alpha(0.0) == 1 and schedule.sigma(0.0) == 0 and schedule.lam(0.0) == math.inf
    assert schedule.time(math.inf) == 0 and schedule.time(-math.inf) == 1
    assert schedule.zero_snr == (name in PURE)
    if name in PURE:
        assert schedule.alpha(1.0) == 0 and schedule.sigma(1.0) == 1 and schedule.lam(1.0) == -math.inf
    else:
        assert schedule.alpha(1.0) > 0 and torch.isfinite(schedule.lam(1.0))
    assert 0 < schedule.t_min < 0.05 and 0.99 < schedule.t_max <= 1
    assert 0.001 < schedule.q(schedule.t_min) < 0.03, "the last level worth an evaluation"


@each
def test_gradients(schedule: Schedule) -> None:
    t = torch.tensor([0.0132, 0.2003, 0.5004, 0.7705, 0.9916], dtype=torch.float64, requires_grad=True)
    curves = [schedule.sigma, schedule.lam, lambda t: schedule.time(schedule.lam(t))]
    if not isinstance(schedule, (EDM, VE)):
        curves.append(schedule.alpha)
    for curve in curves:
        assert torch.autograd.gradcheck(curve, (t,), eps=1e-7, atol=1e-4, rtol=1e-4)


@each
def test_the_ends_have_no_gradient_and_no_nan(schedule: Schedule) -> None:
    t = torch.tensor([0.0, 0.4004, 1.0], dtype=torch.float64, requires_grad=True)
    for curve in (schedule.sigma, lambda t: schedule.time(schedule.lam(t)), lambda t: torch.exp(-schedule.lam(t))):
        (gradient,) = torch.autograd.grad(curve(t)[:2].sum(), t)
        assert bool(torch.isfinite(gradient).all()) and gradient[0] == 0 and gradient[1] != 0


def test_closed_forms() -> None:
    t = torch.linspace(0.0, 1.0, 11, dtype=torch.float64)
    half_pi = math.pi / 2
    assert VPCosine(offset=0.0).alpha(t).tolist() == pytest.approx(torch.cos(half_pi * t).tolist(), abs=1e-15)
    assert VPCosine(offset=0.0).sigma(t).tolist() == pytest.approx(torch.sin(half_pi * t).tolist(), abs=1e-15)
    assert VPCosine().q(0.9946) == pytest.approx(118.8, rel=1e-3)
    assert Flow().sigma(t).tolist() == t.tolist()
    assert (Flow(shift=3.0).q(t[1:-1]) / Flow().q(t[1:-1])).tolist() == pytest.approx([3.0] * 9)
    assert VPLinear().lam(1.0) == pytest.approx(-5.0250, abs=1e-4)
    assert SubVP().sigma(t).tolist() == pytest.approx((1 - VPLinear().alpha(t) ** 2).tolist(), abs=1e-15)
    i = torch.arange(18, dtype=torch.float64) / 17  # the nodes of EDM's equation 5
    nodes = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert EDM().sigma(1 - i * (1 - EDM().t_min)).tolist() == pytest.approx(nodes.tolist(), rel=1e-12)
    assert VE().sigma(torch.tensor([VE().t_min, 1.0])).tolist() == pytest.approx([0.01, 50.0], rel=1e-6)


def test_tables_differ_from_the_closed_form() -> None:
    """A network trained on the table must get the table: log alpha differs by 3.0e-3 and 3.4e-2."""
    t = torch.tensor([0.5, 1.0], dtype=torch.float64)
    off = (torch.log(VPLinear().alpha(t)) - torch.log(Discrete.linear().alpha(t))).abs()
    assert off.tolist() == pytest.approx([3.0e-3, 3.4e-2], rel=0.05)


@pytest.mark.parametrize("convention", ["log_alpha", "log_q"])
def test_between_the_entries_the_named_curve_is_linear(convention: str) -> None:
    table = Discrete.linear(convention=convention)
    t = torch.tensor([300.0, 300.25, 301.0], dtype=torch.float64) / 1000
    y = torch.log(table.alpha(t)) if convention == "log_alpha" else table.lam(t)
    assert y[1] == pytest.approx(float(0.75 * y[0] + 0.25 * y[2]), rel=1e-12)
    other = Discrete.linear(convention="log_q" if convention == "log_alpha" else "log_alpha")
    assert table.lam(t[0]) == pytest.approx(float(other.lam(t[0])), rel=1e-12)
    assert abs(table.lam(t[1]) - other.lam(t[1])) > 1e-9


def test_zero_terminal_snr_keeps_the_first_entry_and_ends_at_zero() -> None:
    before, after = Discrete.scaled_linear(), rescale_zero_snr(Discrete.scaled_linear())
    assert after.alphas_cumprod[0] - before.alphas_cumprod[0] == 0 and after.alphas_cumprod[-1] == 0
    alpha = torch.tensor(before.alphas_cumprod, dtype=torch.float64).sqrt()
    expected = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    assert torch.tensor(after.alphas_cumprod).double().sqrt().tolist() == pytest.approx(expected.tolist(), abs=1e-7)
    t = torch.tensor([0.999, 0.99925, 0.9999, 1.0], dtype=torch.float64)
    alpha = after.alpha(t)  # linear to 0 after the last entry that is not
    assert (alpha / alpha[0]).tolist() == pytest.approx([1.0, 0.75, 0.1, 0.0], abs=1e-9)


@each
def test_json_round_trip(schedule: Schedule) -> None:
    again = schedule_from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule and hash(again) == hash(schedule)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: VPLinear(beta_min=2, beta_max=1), "beta_min <= beta_max"),
        (lambda: VE(sigma_min=0.0), "sigma_min"),
        (lambda: Flow(shift=0), "shift > 0"),
        (lambda: Discrete((0.9, 0.95)), "entry 1 is 0.95"),
        (lambda: Discrete((0.9,)), "at least 2"),
        (lambda: Discrete((0.9, float("nan"))), "entry 1 is nan"),
        (lambda: Discrete((0.9, 0.5), "log_alfa"), "log_alpha"),
        (lambda: schedule_from_dict({"name": "VPCosin"}), "VPCosine"),
        (lambda: schedule_from_dict({"name": "Flow", "shfit": 2}), "shift"),
    ],
)
def test_bad_input(make: object, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        make()  # type: ignore[operator]


def test_the_table_may_be_imported_first() -> None:
    """`discrete` and `schedules` need one another; `schedules` first is what every other test does."""
    code = "import hasten.schedules.discrete; from hasten.schedules import Discrete; Discrete.linear()"
    subprocess.run([sys.executable, "-c", code], check=True)
