"""Output-level caches as plans: where a cache reuses the network's last output, the sampler is another linear one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from ..errors import BadInput, check_choice
from ..predictions import Prediction, prediction_from
from ..sampling import Query
from ..schedules.base import Schedule
from ..schedules.serialize import schedule_from_dict
from .table import Plan
from .tracing import trace

__all__ = ["REUSE", "cached_plan"]

REUSE = ("output", "difference")


def cached_plan(
    plan: Plan, computed: Collection[int], prediction: Prediction | str, reuse: str = "output", *, name: str = ""
) -> Plan:
    """The plan of a sampling in which the network runs at some of the evaluations and its last output is reused at
    the others. With `raw_j` the network's output at the last computed evaluation j, at another one, k,

        x0_k = c_skip_k x_k + c_out_k raw_j                               "output"
        x0_k = c_skip_k x_k + c_out_k (raw_j + c_in_k x_k - c_in_j x_j)   "difference"

    which is linear in x_k, x_j and x0_j: a linear multistep method with as many evaluations as are computed.

    Args:
        plan: of the sampler, for all evaluations; without a basis.
        computed: numbers of the evaluations at which the network runs, from 0, which must be one.
        prediction: what the network's output means, or its name: "eps", "v", "flow", ...
        reuse: the output itself (TeaCache), or its difference from the input (EasyCache).
        name: of the result, for `Plan.sampler`; by default made from the plan's.

    Raises:
        BadInput: for a plan in the coordinates of a basis or with branches, numbers that are no evaluations, and where
            the first one is not computed.

    References:
        Liu, Zhang, Wang, Wei, Qiu, Zhao, Zhang, Ye, Wan 2024, arXiv:2411.19108 (TeaCache); Zhou, Liang, Chen, Feng,
        Chen, Lin, Ding, Tan, Zhao, Bai 2025, arXiv:2507.02860 (EasyCache). That the result is a plan is hasten's.
    """
    check_choice("reuse", reuse, REUSE)
    steps = sorted(set(computed))
    if plan.basis is not None:
        raise BadInput(f"a cached plan is made from one without a basis, found {plan.sampler or 'one with'}")
    if plan.branches is not None:
        raise BadInput("a cached plan is made from one whose evaluations are guided, not of one branch each")
    if not steps or steps[0] != 0 or steps[-1] >= plan.nfe:
        raise BadInput(
            f"the computed evaluations are numbers from 0, which must be one, to {plan.nfe - 1}, found {steps}"
        )
    schedule = schedule_from_dict(plan.schedule)
    replay: Any = _Replay(plan, frozenset(steps), prediction_from(prediction), reuse)
    tables = trace(replay, schedule, plan.times)
    text = name or f"cached:{plan.sampler}"
    return replace(plan, **tables._asdict(), sampler=text, begin=plan.begin)


class _Replay:
    """The rows of a plan as a sampler, with the outputs of the last computed evaluation at the others."""

    linear: ClassVar[bool] = True

    def __init__(self, plan: Plan, computed: frozenset[int], prediction: Prediction, reuse: str) -> None:
        self.plan, self.computed, self.prediction, self.reuse = plan, computed, prediction, reuse

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Any:
        """The rows, as a coroutine."""
        plan = self.plan
        coefficients: Any = self.prediction.coefficients(schedule.alpha(times[:-1]), schedule.sigma(times[:-1]))
        c_in, c_skip, c_out = coefficients
        draws = [noise() for _ in range(plan.C.shape[1])]
        state = _terms([(plan.start[0], x), *zip(plan.start[1:], draws)])
        states, outputs = [], []
        raw: Any = None
        for k in range(plan.nfe):
            if k in self.computed:
                x0 = yield Query(state, times[k])
                raw = (x0 - c_skip[k] * state) / c_out[k]
                if self.reuse == "difference":
                    raw = raw - c_in[k] * state
            else:
                reused = raw if self.reuse == "output" else raw + c_in[k] * state
                x0 = c_skip[k] * state + c_out[k] * reused
            states.append(state)
            outputs.append(x0)
            state = _terms(
                [
                    (plan.a[k], state),
                    *zip(plan.A[k, :k], states),
                    *zip(plan.B[k, : k + 1], outputs),
                    *zip(plan.C[k], draws),
                ]
            )
        return state


def _terms(terms: Any) -> Any:
    """The sum of these (coefficient, value), without those whose coefficient is 0."""
    return sum(c * value for c, value in terms if c.requires_grad or float(c) != 0.0)
