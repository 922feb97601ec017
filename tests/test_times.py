"""Time grids: each law, exact ends, every schedule."""

from __future__ import annotations

import math

import pytest
import torch

from hasten.errors import BadInput
from hasten.schedules import EDM, Discrete, Flow, Schedule, VPCosine, VPLinear
from hasten.times import (
    CosineAngle,
    Explicit,
    Karras,
    Quadratic,
    TimeGrid,
    Trailing,
    UniformLambda,
    UniformTime,
    check_times,
)

from .test_schedules import each

GRIDS = [UniformTime(), UniformLambda(), Quadratic(), Karras(), Trailing(), CosineAngle()]


@each
@pytest.mark.parametrize("law", GRIDS, ids=lambda law: law.name)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_shape_and_ends(schedule: Schedule, law: TimeGrid, steps: int) -> None:
    times = law(schedule, steps)
    assert times.shape == (steps + 1,) and times.dtype == torch.float64
    assert times[0] == schedule.t_max and times[-1] == 0
    assert bool((times[1:] < times[:-1]).all())
    if steps > 1 and not law.reaches_zero:
        assert times[-2] == pytest.approx(schedule.t_min, rel=1e-9)
    elsewhere = type(law)(start=0.8, end=0.1)(schedule, steps)
    assert len(elsewhere) == steps + 1 and elsewhere[0] == 0.8 and elsewhere[-1] == 0.1


def differences(y: torch.Tensor) -> torch.Tensor:
    step = y[1:] - y[:-1]
    return (step / step.mean() - 1).abs().max()


@each
def test_each_law_is_uniform_in_its_own_coordinate(schedule: Schedule) -> None:
    span = {"start": 0.9, "end": 0.05}
    q = schedule.q
    assert differences(UniformTime(**span)(schedule, 9)) < 1e-9
    assert differences(schedule.lam(UniformLambda(**span)(schedule, 9))) < 1e-9
    assert differences(Quadratic(**span)(schedule, 9).sqrt()) < 1e-9
    assert differences(q(Karras(rho=5.0, **span)(schedule, 9)) ** 0.2) < 1e-9
    assert differences(Trailing(**span)(schedule, 9)) < 1e-9
    assert differences(torch.atan(q(CosineAngle(scale=0.5, **span)(schedule, 9)) / 0.5)) < 1e-9


def test_known_grids() -> None:
    edm = EDM()
    paper = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    for law in (Karras(), UniformTime()):
        assert edm.sigma(law(edm, 18)).tolist() == pytest.approx([*paper, 0.0], rel=1e-9)
    # trailing spacing of a 1000-entry table: round(1000, 800, ...) - 1
    assert Discrete.linear().index(Trailing()(Discrete.linear(), 5)[:-1]).tolist() == pytest.approx(
        [999, 799, 599, 399, 199]
    )
    # on the cosine the angle is time itself
    assert CosineAngle()(VPCosine(offset=0.0), 4).tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_pure_noise_counts_as_a_finite_level() -> None:
    times = UniformLambda()(Flow(), 6)
    lam = Flow().lam(times[1:-1])
    step = (lam[-1] - lam[0]) / 4
    assert times[0] == 1 and lam[0] - step == pytest.approx(-math.log(150))


def test_explicit() -> None:
    law = Explicit((1.0, 0.5, 0.0))
    assert law(VPLinear()).tolist() == law(VPLinear(), 2).tolist() == [1.0, 0.5, 0.0]
    with pytest.raises(BadInput, match="holds 2 steps, asked for 3"):
        law(VPLinear(), 3)
    with pytest.raises(BadInput, match=r"strictly decrease, found 0.2 before 0.5"):
        Explicit((1.0, 0.2, 0.5))


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "4"])
def test_steps_must_be_a_positive_whole_number(steps: object) -> None:
    with pytest.raises(BadInput, match="steps must be"):
        UniformTime()(VPLinear(), steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{"start": 1.5}, {"start": 0.2, "end": 0.3}, {"end": -0.1}, {"start": 1e-4}])
def test_impossible_spans(bad: dict) -> None:
    with pytest.raises(BadInput, match="start|end must be"):
        UniformTime(**bad)(VPLinear(), 4)


@pytest.mark.parametrize("values", [[1.0], [[1.0, 0.5]], [1.2, 0.0], [0.5, 0.5], [float("nan"), 0.0]])
def test_check_times(values: list) -> None:
    with pytest.raises(BadInput, match="times must"):
        check_times(torch.tensor(values, dtype=torch.float64))


def test_low_is_the_last_time_before_the_clean_end():
    for grid in (UniformTime(low=0.05), UniformLambda(low=0.05), Karras(low=0.05), Quadratic(low=0.05)):
        times = grid(VPLinear(), 6)
        assert len(times) == 7 and times[-1] == 0
        assert float(times[-2]) == pytest.approx(0.05, rel=1e-9)
    lam = VPLinear().lam(UniformLambda(low=0.05)(VPLinear(), 6)[:-1])
    torch.testing.assert_close(lam.diff(), lam.diff()[:1].expand(5), rtol=1e-9, atol=0)  # the law holds down to low


def test_low_is_refused_where_it_means_nothing():
    with pytest.raises(BadInput, match="low"):
        CosineAngle(low=0.05)(VPLinear(), 6)
    with pytest.raises(BadInput, match="low"):
        UniformTime(low=0.0)(VPLinear(), 6)
    with pytest.raises(BadInput, match="low"):
        UniformTime(end=0.01, low=0.05)(VPLinear(), 6)
