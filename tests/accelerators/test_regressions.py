"""Faults that no other test sees: overwritten outputs of a graph, small integer products, main directions, groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.accelerators import SamplingContext
from hasten.accelerators._caching.search import main_directions, reuse_costs
from hasten.accelerators._compile import CompiledNet, CompiledPart
from hasten.accelerators.compile import Compile
from hasten.denoiser import Denoiser
from hasten.nets import _int8, time_groups
from hasten.nets.time_groups import TimeGroups
from hasten.pick import pick
from hasten.schedules import VPCosine

from ._tiny import unet


def as_graphs_do(plain: Any) -> Any:
    """A compiler whose answers lie in one place, as those of CUDA graphs: the next call overwrites them."""
    place: dict[Any, Tensor] = {}

    def run(*given: Any, **named: Any) -> Any:
        built = plain(*given, **named)
        buffer = place.setdefault(tuple(built.shape), torch.empty_like(built))
        return buffer.copy_(built)

    return run


def test_outputs_of_a_graph_are_not_overwritten() -> None:
    """Accelerators cache outputs from one evaluation to the next, which the next call must not overwrite."""
    part = CompiledPart("forward", lambda x: 2 * x, as_graphs_do, [], 4, False, True)
    first = part(torch.ones(2))  # which builds the graph
    second = part(torch.full((2,), 3.0))
    third = part(torch.full((2,), 5.0))
    assert [float(x[0]) for x in (first, second, third)] == [2.0, 6.0, 10.0]
    for mode, copied in (("default", False), ("reduce-overhead", True), ("max-autotune", True)):
        built: Any = Compile(mode=mode).apply(Denoiser(Plain(), VPCosine(), "v").eval(), SamplingContext())
        assert isinstance(built.net, CompiledNet) and built.net.parts["forward"].copies is copied, mode


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("rows", [1, 5, 17, 40])
def test_integer_products_of_few_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """cuBLAS wants more than 16 rows: fewer are padded, and the answers are those of the rows that are there."""
    real, recorded = torch._int_mm, []

    def strict(a: Tensor, b: Tensor) -> Tensor:
        recorded.append(len(a))
        if len(a) <= 16:
            raise RuntimeError("self.size(0) needs to be greater than 16")
        return real(a, b)

    monkeypatch.setattr(torch, "_int_mm", strict)
    generator = torch.Generator().manual_seed(0)
    v = torch.randint(-127, 128, (8, 16), dtype=torch.int8, generator=generator)
    x = torch.randn(rows, 16, generator=generator)
    kernel = _int8.IntMmKernel(v, torch.full((8,), 0.01), None, None, (4.0 / 255,), (128,))
    built = kernel(x, 0, torch.zeros(1, dtype=torch.long), torch.float32)
    s, z = 4.0 / 255, 128
    u = torch.clamp(torch.round(x / s) + z, 0, 255)
    want = ((u - z) @ v.float().T) * s * 0.01
    assert built.shape == (rows, 8) and torch.allclose(built, want, atol=1e-4)
    assert recorded == [max(rows, 32)]


def test_reuse_costs_weigh_the_main_directions() -> None:
    """For Gaussian data that vary along one direction, an error in one answer costs what it does to DDIM's last sample:
    along that direction the network follows it, elsewhere it is taken back."""
    schedule, times = VPCosine(), [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    D, where, delta = 6, 4, 0.1
    base = torch.zeros(8, D)
    base[:, 0] = torch.tensor([1.0, -1.0] * 4) * 2.0  # variance 4 along the first axis, .01 along three others
    for axis, signs in ((1, [1.0, 1.0, -1.0, -1.0] * 2), (2, [1.0] * 4 + [-1.0] * 4), (3, [1.0, -1.0, -1.0, 1.0] * 2)):
        base[:, axis] = 0.1 * torch.tensor(signs)
    directions, variance, left = main_directions(base)
    assert float(variance[0]) == pytest.approx(4.0) and float(directions[0, 0].abs()) == pytest.approx(1.0)

    def end(axis: int, errors: float, v: float) -> float:
        """How far the last sample moves when x0 of evaluation `where` is off by `errors`, by running DDIM twice."""
        ends = []
        for extra in (0.0, errors):
            x = torch.tensor(0.7, dtype=torch.float64)
            for k, r in enumerate([*times]):
                s = times[k + 1] if k + 1 < len(times) else 0.0
                a_r, s_r = float(schedule.alpha(r)), float(schedule.sigma(r))
                a_s, s_s = float(schedule.alpha(s)), float(schedule.sigma(s))
                x0 = a_r * v / (a_r**2 * v + s_r**2) * x + (extra if k == where else 0.0)
                x = (s_s / s_r) * x + (a_s - a_r * s_s / s_r) * x0
            ends.append(float(x))
        return abs(ends[1] - ends[0])

    for axis, v in ((0, 4.0), (5, left)):
        error = torch.zeros(8, D)
        error[:, axis] = delta
        cost = reuse_costs(
            3, times, schedule, lambda i: (i, base), lambda saved, j, error=error: base + (error if j == where else 0.0)
        )
        want = end(axis, delta, v) ** 2 / D
        assert float(cost[where - 1, where + 1]) == pytest.approx(want, rel=1e-3), axis
    assert end(0, delta, 4.0) > 3 * end(0, delta, left)  # the two differ, so that the test can


class Echo(nn.Module):
    """A network that answers with the group of its scales."""

    group, config = 0, {}  # type: ignore[var-annotated]

    def embed(self, x: Tensor | None = None, time: Tensor | None = None) -> int:
        return self.group

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return torch.full_like(x, float(self.group))


def test_split_points_use_the_group_of_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """`embed` sets the scales for what `encode` and `decode` run next, as `forward` does."""
    monkeypatch.setattr(time_groups, "set_group", lambda net, group: setattr(net, "group", group))
    net = TimeGroups(Echo(), (10.0, 20.0))
    x = torch.zeros(2, 1)
    for at, group in ((5.0, 0), (10.0, 0), (15.0, 1), (99.0, 2)):
        time = torch.full((2,), at)
        assert net.embed(None, time) == group and net.embed(x=None, time=time) == group
        assert net(x, time).unique().tolist() == [float(group)]
    assert net(x, torch.tensor([5.0, 30.0])).flatten().tolist() == [0.0, 2.0]


@pytest.mark.parametrize("name", ["quantize", "encoder_propagation:keys=found", "deep_cache:keys=found"])
def test_calibration_seeds_are_not_the_users(name: str) -> None:
    """Calibration images have seeds beyond those of 100,000 images from any of the usual first seeds."""
    requested = []

    class Stop(Exception):
        pass

    def calls(n: int, seed: int) -> Any:
        requested.extend(range(seed, seed + n))
        raise Stop

    denoiser = Denoiser(unet(), VPCosine(), "v").eval()
    with pytest.raises(Stop):
        pick("accelerators", name).apply(denoiser, SamplingContext(tuple(k / 20 for k in range(20, 0, -1)), calls))
    assert requested and not set(requested) & {
        first + k for first in (0, 1, 42, 1234, 1_000_000) for k in range(100_000)
    }
