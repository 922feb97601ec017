"""DEIS: its weights, and its order near the clean end."""

from __future__ import annotations

import pytest
import torch

from hasten.plan import plan
from hasten.samplers import DEIS
from hasten.samplers._exponential import Known, make_node
from hasten.schedules import VPLinear
from hasten.times import UniformTime
from tests.samplers.problems import F64


@pytest.mark.parametrize("variable", ["t", "rho"])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_deis_weights_integrate_polynomials_exactly(order: int, variable: str) -> None:
    """sum_j w_j p(node j) = int p dq for polynomials p of degree < order in the variable, over wide steps."""
    import numpy as np

    schedule, times = VPLinear(), torch.tensor([0.9, 0.85, 0.7, 0.6, 0.35], dtype=F64)
    past = [Known(make_node(schedule, t), None, None) for t in times[4 - order : 4].flip(0)]
    weights = DEIS(order, variable)._weights(schedule, past, make_node(schedule, times[-1]))
    points, gauss = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(100))
    if variable == "t":
        low, high = times[3], times[4]
        at = (low + (high - low) * (points + 1) / 2).requires_grad_()
        (rate,) = torch.autograd.grad((schedule.sigma(at) / schedule.alpha(at)).sum(), at)  # dq/dt
        place = [k.node.t for k in past]
    else:
        low, high = schedule.q(times[3]), schedule.q(times[4])
        at, rate, place = low + (high - low) * (points + 1) / 2, torch.ones_like(points), [k.node.q for k in past]
    for degree in range(order):
        exact = (gauss * rate * at.detach() ** degree).sum() * (high - low) / 2
        found = sum(w * p**degree for w, p in zip(weights, place))
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("variable", ["t", "rho", "log_rho"])
def test_the_order_of_deis_falls_at_the_end(variable: str) -> None:
    """lower_order_final: at most as many answers as steps are left; without it always three."""
    times = UniformTime(end=0.1)(VPLinear(), 8)
    for lowered, last in ((True, [3, 2, 1]), (False, [3, 3, 3])):
        made = plan(DEIS(3, variable, lowered), VPLinear(), times)
        assert (made.B[-3:] != 0).sum(1).tolist() == last
