"""Plans over both branches of classifier-free guidance, from the plan of a sampler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BadInput, check_number
from .table import Plan

__all__ = ["guided_plan"]


def guided_plan(
    table: Plan,
    guidance_scale: float,
    uncond: Sequence[int] | None = None,
    *,
    reuse: bool = True,
    scales: Sequence[float] | None = None,
) -> Plan:
    """The plan of a guided sampler as one over both branches, which evaluates the unconditional one in some steps only.

        x0_k = c_k + (w_k - 1) (c_p - u_p)        p <= k the last step in which the unconditional branch was evaluated

    for the answers c and u of the two branches. In all steps (`uncond=None`) that is classifier-free guidance itself,
    of 2 K evaluations; in some, guidance by the last difference (`reuse`), or only in those steps, as in an interval.

    Args:
        table: of K evaluations, for the guided denoiser.
        guidance_scale: w, as in `CFG`.
        uncond: the steps, from 0, in which both branches are evaluated at the same state, the unconditional one first.
            Default: all.
        reuse: the other steps use the last difference; without, they are those of the conditional model. So are steps
            before the first difference.
        scales: w_k of each step. Default: `guidance_scale` in all.

    Returns:
        A plan of K + len(uncond) evaluations.

    Raises:
        BadInput: for a plan that has branches already, for steps or scales that do not fit it.

    References:
        Ho, Salimans 2022, arXiv:2207.12598; interval: Kynkaanniemi et al. 2024, arXiv:2404.07724.
    """
    if table.branches is not None:
        raise BadInput("guided_plan needs the plan of a sampler: this one has branches already")
    K, w = table.nfe, check_number("guidance_scale", guidance_scale)
    evaluated = list(range(K)) if uncond is None else sorted(set(uncond))
    if evaluated and not 0 <= evaluated[0] <= evaluated[-1] < K:
        raise BadInput(f"guided_plan: uncond must be steps of 0 to {K - 1}, found {list(uncond or [])}")
    each = [w] * K if scales is None else [check_number("scales", scale) for scale in scales]
    if len(each) != K:
        raise BadInput(f"guided_plan: a plan of {K} steps needs as many scales, found {len(each)}")
    branches: list[str] = []
    at = []  # the evaluation of the conditional branch in each step
    for k in range(K):
        branches += ["uncond", "cond"] if k in evaluated else ["cond"]
        at.append(len(branches) - 1)
    N, groups = len(branches), table.B.shape[2:]
    outputs = torch.zeros(K, N, dtype=torch.float64)  # x0_k as a sum over the answers
    last = None
    for k in range(K):
        last = k if k in evaluated else last
        outputs[k, at[k]] = 1.0
        if last is not None and (reuse or last == k):
            outputs[k, at[last]] += each[k] - 1
            outputs[k, at[last] - 1] -= each[k] - 1
    rows = torch.tensor(at)
    a = torch.ones(N, *groups, dtype=torch.float64)  # row by row the same state, where both branches are evaluated
    a[rows] = table.a.detach()
    A, B = (torch.zeros(N, N, *groups, dtype=torch.float64) for _ in range(2))
    A[rows[:, None], rows] = table.A.detach()
    B[rows] = torch.einsum("kj...,jn->kn...", table.B.detach(), outputs)
    C = torch.zeros(N, *table.C.shape[1:], dtype=torch.float64)
    C[rows] = table.C.detach()
    return Plan(
        times=torch.cat([_times_of_branches(table.times.detach()[:-1], evaluated), table.times.detach()[-1:]]),
        start=table.start.detach(),
        a=a,
        A=A,
        B=B,
        C=C,
        sampler=table.sampler,
        schedule=table.schedule,
        basis=table.basis,
        begin=table.begin,
        branches=tuple(branches),
        guidance_scale=w,
    )


def _times_of_branches(times: Tensor, evaluated: list[int]) -> Tensor:
    """The times with those of these steps twice."""
    counts = torch.tensor([2 if k in evaluated else 1 for k in range(len(times))])
    return torch.repeat_interleave(times, counts)
