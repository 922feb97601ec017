from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hasten.errors import BadInput
from hasten.performance.cost import (
    Cost,
    interleave,
    macs,
    parameters,
    peak_memory,
    process_peak,
    ratio,
    resident_bytes,
    size_in_bytes,
    wall_time,
)


def test_macs_are_those_of_the_textbook() -> None:
    assert macs(nn.Linear(30, 7), torch.zeros(5, 30)) == 5 * 30 * 7
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    assert macs(conv, torch.zeros(2, 4, 8, 8)) == 2 * 6 * 8 * 8 * 9 * (4 // 2)
    q = torch.zeros(2, 3, 16, 8)
    assert macs(F.scaled_dot_product_attention, q, q, q) == 2 * (2 * 3 * 16 * 16 * 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert macs(nn.Linear(30, 7), torch.zeros(5, 30)) == 5 * 30 * 7


def test_parameters_and_bytes_count_shared_weights_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    net[1].weight = net[0].weight
    assert parameters(net) == 16 + 4 + 4 + 8
    assert size_in_bytes(net) == (16 + 4 + 4 + 8 + 8) * 4 + 8  # running statistics, and an int64 counter
    assert size_in_bytes(net.half()) == (16 + 4 + 4 + 8 + 8) * 2 + 8


def test_calls_are_timed_in_turns() -> None:
    order: list[str] = []
    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warmup=1)
    assert "".join(order) == "ab" + "abbaab"
    assert {k: len(v) for k, v in times.items()} == {"a": 3, "b": 3}
    assert min(wall_time(lambda: time.sleep(0.01), repeats=2, warmup=0)) >= 0.01
    with pytest.raises(BadInput, match="0 calls"):
        interleave({})


def test_a_ratio_has_a_spread() -> None:
    result = ratio([2.0, 3.0, 8.0], [1.0, 1.0, 2.0])
    assert (result.low, result.median, result.high) == (2, 3, 4)
    assert str(result) == "3.00x (2.00 to 4.00)"
    with pytest.raises(BadInput, match="not of the same"):
        ratio([1.0], [1.0, 2.0])


@pytest.mark.skipif(resident_bytes() is None, reason="no /proc here")
def test_peak_memory_sees_a_burst() -> None:
    with peak_memory() as quiet:
        time.sleep(0.01)
    with peak_memory() as burst:
        block = torch.ones(40_000_000)  # 160 MB
        time.sleep(1.0)  # a busy machine samples seldom
        del block
    assert burst.above > 120e6 > quiet.above
    assert burst.peak <= process_peak() * 1.01
    assert burst.method == "sampled resident size"


def test_cost_reports_the_median() -> None:
    cost = Cost(nfe=8, macs=1e6, parameters=10, bytes=40, seconds=(1.0, 9.0, 2.0), images=4)
    assert cost.seconds_per_image == 0.5 and cost.images_per_second == 2
