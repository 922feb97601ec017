"""Prior noise injection as a change of the plan: it changes the sampler's state, not the network."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import BadInput
from ...predictions import Prediction
from ...schedules.base import Schedule

if TYPE_CHECKING:
    from ...plan.table import Plan

__all__ = ["inject_noise"]


def inject_noise(plan: Plan, schedule: Schedule, prediction: Prediction, amount: float, until: float) -> Plan:
    """The plan that does, after each model evaluation with t_k < until and before the update,

        x_k <- x_k + amount x_0

    with x_0 the state of the first evaluation. The network's own output stays what it was, so its x0 becomes
    x0_k + c_skip(t_k) amount x_0, and every row gets, exactly,

        x_{k+1} += amount sum_{j <= k, t_j < until} (X[k, j] + B[k, j] c_skip(t_j)) x_0,   X = A with a on its diagonal.

    With several evaluations a step (Heun) it is done at each; a row is taken as the plan writes it.

    Args:
        plan: without a basis.
        schedule: what its times mean.
        prediction: what the network's raw output means.
        amount: .003 in the paper.
        until: in [0, 1]; in the paper .5 (Stable Diffusion), .15 to .3 for others.

    Raises:
        BadInput: for a plan in the coordinates of a basis.

    References:
        Li et al. 2023, arXiv:2312.09608.
    """
    if plan.basis is not None:
        raise BadInput(f"prior noise injection works on plans without a basis, found {plan.sampler or 'one with'}")
    times = plan.times[:-1]
    late = (times < until).to(times)
    c_skip = prediction.coefficients(schedule.alpha(times), schedule.sigma(times))[1]
    c_skip = c_skip.where(late.bool(), c_skip.new_zeros(()))  # it may be infinite at pure noise
    states = plan.A + plan.a.diag()
    added = amount * ((states + plan.B * c_skip) * late).sum(1)
    a, A = plan.a.clone(), plan.A.clone()
    a[0] += added[0]
    A[1:, 0] += added[1:]
    return replace(plan, a=a, A=A)
