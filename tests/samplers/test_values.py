"""Errors against the exact end of the probability-flow equation, to the digits that independent float64 code printed.

Nodes: N values of q log-uniform over the 1000-entry linear table, then 0; 256 samples; RMS over all entries.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch

from hasten.plan import plan
from hasten.samplers import DPMSolver, UniPC
from hasten.schedules import Discrete
from tests.samplers.problems import F64, mixture, mixture_ode, rms

COUNTS = (5, 6, 8, 10, 15, 20, 30, 40)
VALUES: dict[str, tuple[Any, str, str]] = {
    "UniPC-2 B2": (
        UniPC(2),
        ".1170 .0958 .0577 .0358 .0082 .0033 .0010 .0004",
        ".0499 .0432 .0278 .0164 .0081 .0068 .0061 .0059",
    ),
    "UniPC-2 B1": (
        UniPC(2, "bh1"),
        ".3657 .4354 .2191 .1047 .0180 .0068 .0020 .0009",
        ".1807 .1790 .0987 .0475 .0119 .0070 .0015 .0009",
    ),
    "UniPC-3": (
        UniPC(3),
        ".1264 .2619 .1212 .0352 .0122 .0032 .0006 .0003",
        ".0794 .1097 .0558 .0224 .0085 .0029 .0013 .0009",
    ),
    "UniPC-4": (
        UniPC(4),
        ".1264 .2619 .1573 .0716 .0261 .0041 .0005 .0004",
        ".0794 .1097 .0756 .0442 .0146 .0038 .0011 .0008",
    ),
    "3M, half term": (
        DPMSolver(3, third="compat"),
        ".1115 .2286 .1230 .0505 .0062 .0032 .0010 .0005",
        ".0693 .0952 .0540 .0234 .0089 .0066 .0059 .0056",
    ),
    "3M": (
        DPMSolver(3),
        ".1243 .2627 .1387 .0517 .0113 .0048 .0014 .0006",
        ".0778 .1096 .0617 .0252 .0097 .0064 .0015 .0010",
    ),
    "2M": (DPMSolver(2), ".1244 .0891 .0560 .0419 .0171 .0088", ".0517 .0420 .0273 .0189 .0094 .0076"),
}


@cache
def table() -> tuple[Discrete, float, float]:
    schedule = Discrete.linear(convention="log_q")
    first, last = schedule.lam(torch.tensor([1.0, 1e-3], dtype=F64)).neg().exp().tolist()
    return schedule, first, last


@pytest.mark.parametrize("name", ["M2", "M64"])
@pytest.mark.parametrize("row", VALUES.values(), ids=list(VALUES))
def test_regression_values(row: tuple[Any, str, str], name: str) -> None:
    schedule, first, last = table()
    start, exact = mixture_ode(name, 256, first, 0.0)
    model = mixture(name, schedule)
    for steps, printed in zip(COUNTS, row[1 if name == "M2" else 2].split()):
        lam = torch.linspace(-math.log(first), -math.log(last), steps, dtype=F64)
        times = torch.cat([schedule.time(lam), torch.zeros(1, dtype=F64)])
        times[0] = 1.0
        end = plan(row[0], schedule, times)(model, start * schedule.alpha(times[0]), None)
        assert rms(end, exact) == pytest.approx(float(printed), abs=1.01e-4), f"{steps} evaluations"
