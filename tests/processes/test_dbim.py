"""DBIM: the marginals of the bridge for every eta, its special cases, its second order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten.errors import BadInput
from hasten.plan import plan
from hasten.processes._pinned import bridge_coefficients
from hasten.processes.ddbm import DDBM
from hasten.processes.i2sb import I2SB
from hasten.samplers.dbim import DBIM
from hasten.samplers.ddbm import DDBMSampler
from hasten.samplers.i2sb import I2SBSampler
from hasten.sampling import Noise, walk
from hasten.times import Karras, Trailing

from .bridge_runs import F64, NormalTarget, even, moments

PROCESSES = {"vp": DDBM(), "ve": DDBM(base="ve", sigma_max=2.0), "i2sb": I2SB()}
over = pytest.mark.parametrize("process", PROCESSES.values(), ids=list(PROCESSES))


@over
@pytest.mark.parametrize("eta", (0.0, 0.3, 1.0))
def test_marginals_are_those_of_the_bridge_for_any_eta(process: Any, eta: float) -> None:
    """For a single x_0 the state at every time has the mean and the variance of q(z_s | x_0, y)."""
    for end in (0.7, 0.05):
        a, b, c = bridge_coefficients(process, end)
        mean, std = moments(DBIM(eta), NormalTarget(process, mean=0.6, variance=0.0), even(3, end))
        assert mean == pytest.approx(float(a * -0.4 + b * 0.6), abs=1e-10)
        assert std == pytest.approx(float(c), abs=1e-10)


def test_eta_1_is_the_sampler_of_i2sb() -> None:
    process, x, times = I2SB(), torch.full((2, 3), -0.4, dtype=F64), even(6)
    results = [
        walk(sampler, NormalTarget(process), x, times, Noise([1, 2], (3,), dtype=F64))
        for sampler in (DBIM(1.0), I2SBSampler())
    ]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@over
def test_it_converges_and_second_order_is_faster(process: Any) -> None:
    target = NormalTarget(process)
    errors = {order: [abs(moments(DBIM(order=order), target, even(n))[1] - 0.3) for n in (20, 80)] for order in (1, 2)}
    assert errors[1][1] < errors[1][0] / 2 and errors[2][1] < errors[2][0] / 3
    assert errors[2][0] < errors[1][0] / 2
    assert moments(DBIM(), target, even(20))[0] == pytest.approx(0.6, abs=1e-9)


def test_second_order_on_a_path_after_the_first_step() -> None:
    """The same start below t = 1: the error of the deterministic path falls with the square of the step."""
    process = DDBM()
    target = NormalTarget(process)

    def result(order: int, steps: int) -> float:
        times = torch.cat([torch.ones(1, dtype=F64), torch.linspace(0.9, 0.2, steps + 1, dtype=F64)])
        return moments(DBIM(order=order), target, times)[1]

    exact = result(2, 400)
    for order, low, high in ((1, 1.6, 2.4), (2, 3.0, 5.5)):
        ratio = abs(result(order, 20) - exact) / abs(result(order, 40) - exact)
        assert low < ratio < high, (order, ratio)


def test_few_evaluations_against_the_hybrid_sampler() -> None:
    """10 evaluations are nearer to the mean .6 and the deviation .3 than the hybrid sampler with 50, on any grid."""
    process, target = DDBM(), NormalTarget(DDBM())
    mean, std = moments(DBIM(order=2), target, Karras()(process, 10))
    assert DDBMSampler().nfe(17) == 50
    for grid in (Trailing(), Karras()):
        other_mean, other_std = moments(DDBMSampler(), target, grid(process, 17))
        assert abs(std - 0.3) < abs(other_std - 0.3) / 2 and abs(mean - 0.6) < abs(other_mean - 0.6) / 2


@pytest.mark.parametrize("sampler", (DBIM(), DBIM(0.5), DBIM(order=2)), ids=str)
def test_plan_equals_the_walk(sampler: DBIM) -> None:
    process, x, times = DDBM(), torch.full((1, 3), -0.4, dtype=F64), even(5)
    compiled = plan(sampler, process, times)
    assert compiled.nfe == 5
    noises = [Noise([3], (3,), dtype=F64) for _ in range(2)]
    walked = walk(sampler, NormalTarget(process), x, times, noises[0])
    torch.testing.assert_close(compiled(NormalTarget(process), x, noises[1]), walked, rtol=0, atol=1e-12)


def test_times_have_gradients() -> None:
    times = even(4).requires_grad_()
    compiled = plan(DBIM(order=2), DDBM(), times)
    compiled.B.sum().backward()
    assert torch.isfinite(times.grad).all() and float(times.grad.abs().sum()) > 0


def test_refusals() -> None:
    for make in (lambda: DBIM(eta=1.5), lambda: DBIM(order=3), lambda: DBIM(eta=0.5, order=2)):
        with pytest.raises(BadInput):
            make()
    x = torch.zeros(1, 3, dtype=F64)
    with pytest.raises(BadInput, match="noise=False: use i2sb"):
        walk(DBIM(), NormalTarget(I2SB()), x, even(3), schedule=I2SB(noise=False))
    with pytest.raises(BadInput, match="begins at the source"):
        walk(DBIM(), NormalTarget(DDBM()), x, even(3) * 0.9)
