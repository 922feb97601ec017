"""UniPC: its variants."""

from __future__ import annotations

import torch

from hasten.plan import Plan, plan
from hasten.samplers import UniPC
from hasten.schedules import VPLinear
from tests.samplers.problems import between


def same(one: Plan, two: Plan, first: int = 0) -> None:
    """Row by row, from row `first` on."""
    for name in ("a", "A", "B", "C"):
        torch.testing.assert_close(getattr(one, name)[first:], getattr(two, name)[first:], rtol=1e-12, atol=1e-12)


def test_bh1_and_bh2_differ_only_where_one_difference_is_used() -> None:
    """So, from order 3 on, in the first three rows only (warm-up, and the corrections that look back at it)."""
    times = between(VPLinear(), 20.0, 0.05, 9)
    for order in (3, 4):
        one, two = (plan(UniPC(order, v, lower_order_final=False), VPLinear(), times) for v in ("bh1", "bh2"))
        same(one, two, first=3)
        assert (one.B - two.B)[:3].abs().max() > 1e-3
