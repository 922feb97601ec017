"""The probability-flow equation to a tolerance, against closed forms; and threads that never hang."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.denoiser import Wrapper
from hasten.errors import BadInput, HastenError
from hasten.exact import g8, m2
from hasten.pick import format_spec
from hasten.plan import plan
from hasten.plan.draw import draw
from hasten.samplers.probability_flow import ProbabilityFlow, run_in_lockstep
from hasten.sampling import Count, Noise, walk
from hasten.schedules import VPLinear
from tests.samplers.problems import ALL, F64, ends, mixture

over_schedules = pytest.mark.parametrize("schedule", ALL.values(), ids=list(ALL))


def settled() -> bool:
    """Whether the solvers' threads are gone, given a moment."""
    for _ in range(200):
        if threading.active_count() <= BEFORE:
            return True
        time.sleep(0.02)
    return False


BEFORE = 0


@pytest.fixture(autouse=True)
def threads_before() -> None:
    """Other tests of the process may have left threads of their own."""
    global BEFORE
    BEFORE = threading.active_count()


@over_schedules
def test_the_closed_form_on_every_schedule(schedule: Any) -> None:
    """RK45 at the paper's tolerance ends within 1e-4 of the exact end of the Gaussian's path, from the noisy end of
    every schedule (alpha = 0 included); the same cost on all of them."""
    model, noise = g8(schedule), Noise(range(8), (8,), dtype=F64)
    times = torch.tensor([schedule.t_max, schedule.t_min, 0.0], dtype=F64)
    x = noise.initial() * schedule.prior_std(times[0])
    counted = Count(model)
    z = walk(ProbabilityFlow(), counted, x, times)
    exact = model(model.endpoint(x, times[0], times[1]), times[1])
    assert (z - exact).abs().max() < 1e-4  # 3e-6
    assert 45 < counted.rows / 8 < 65
    above = walk(ProbabilityFlow(), model, x, times[:2])
    scale = float(torch.hypot(schedule.alpha(times[1]), schedule.sigma(times[1])))
    assert (above - model.endpoint(x, times[0], times[1])).abs().max() < 1e-4 * scale


def errors(method: str, tolerances: list[float]) -> list[tuple[float, float]]:
    """Root mean square error at t = .01 on M2, and NFE, of each tolerance."""
    schedule = ALL["VPCosine0"]
    model, noise = mixture("M2", schedule), Noise(range(12), (2,), dtype=F64)
    x, times = noise.initial(), torch.tensor([1.0, 0.01], dtype=F64)
    exact, found = model.ode(x, times[0], times[1]), []
    for tolerance in tolerances:
        counted = Count(model)
        z = walk(ProbabilityFlow(tolerance, tolerance, method), counted, x, times)
        found.append(((z - exact).square().mean().sqrt().item(), counted.rows / len(x)))
    return found


@pytest.mark.parametrize("method", ["RK45", "RK23", "DOP853"])
def test_the_error_falls_with_the_tolerance(method: str) -> None:
    tolerances = [1e-2, 1e-3, 1e-4] if method == "RK23" else [1e-2, 1e-4, 1e-6]
    found = errors(method, tolerances)
    assert all(a[0] > 5 * b[0] and a[1] < b[1] for a, b in zip(found, found[1:])), found
    assert all(error < 5 * tolerance for (error, _), tolerance in zip(found, tolerances)), found


def test_a_sample_is_solved_alone() -> None:
    """Each sample's steps are its own: the same image and the same cost among others as alone, one call for all that
    still go on."""
    schedule, labels = ALL["Flow"], torch.tensor([0, 3, 5, 1])
    seen: list[tuple[int, ...]] = []

    class Watched(Wrapper):
        def forward(self, x_t: Tensor, t: Any, label: Tensor | None = None, **cond: Any) -> Tensor:
            assert label is not None and len(label) == len(x_t) and len(x_t) in (len(torch.atleast_1d(t)), len(labels))
            seen.append(tuple(label.tolist()))
            return self.denoiser(x_t, t, label=label)

    model = Watched(m2(schedule, labels=range(6)))
    times = torch.tensor([1.0, 0.01, 0.0], dtype=F64)
    batch = draw(model, ProbabilityFlow(1e-4, 1e-6), times, Noise(range(4), (2,), dtype=F64), label=labels)
    asked = {k: sum(k in rows for rows in seen) for k in labels.tolist()}
    assert len(set(asked.values())) > 1 and len(seen) == max(asked.values())
    for k, label in enumerate(labels.tolist()):
        seen.clear()
        alone = draw(model, ProbabilityFlow(1e-4, 1e-6), times, Noise([k], (2,), dtype=F64), label=labels[k : k + 1])
        torch.testing.assert_close(batch[k], alone[0], rtol=1e-10, atol=1e-10)
        assert len(seen) == asked[label]
    assert settled()


def test_images_keep_their_dtype_and_shape() -> None:
    schedule, dtypes = ALL["EDM"], set()

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        dtypes.add((z.dtype, t.dtype, z.shape[1:]))
        return 0.5 * z / (1 + schedule.sigma(t).float().reshape(-1, 1, 1, 1) ** 2)

    x = 80 * Noise([1, 2], (3, 4, 4)).initial()
    z = walk(ProbabilityFlow(1e-2, 1e-2), denoise, x, ends(schedule, 5), schedule=schedule)
    assert z.shape == x.shape and z.dtype == torch.float32
    assert dtypes == {(torch.float32, F64, (3, 4, 4))}


class Failing(Wrapper):
    """Raises, or answers NaN, at the n-th call."""

    def __init__(self, inner: Any, error: BaseException | None, n: int = 9) -> None:
        super().__init__(inner)
        self.error, self.left = error, n

    def forward(self, x_t: Tensor, t: Any, **cond: Any) -> Tensor:
        self.left -= 1
        if self.left == 0 and self.error is not None:
            raise self.error
        return self.denoiser(x_t, t) * (math.nan if self.left == 0 else 1.0)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("full"), RuntimeError("network"), None])
def test_what_goes_wrong_comes_out_and_nothing_hangs(error: Any) -> None:
    model = Failing(g8(VPLinear()), error)
    with pytest.raises(type(error) if error else HastenError, match=None if error else "not finite"):
        draw(model, ProbabilityFlow(), ends(VPLinear(), 3), Noise(range(20), (8,)))
    assert settled()


@pytest.mark.timeout(60)
def test_together() -> None:
    """Answers come to those who asked, in one round for all that go on; a path's own error ends the others."""
    rounds = []

    def answer(which: list[int], asked: list[tuple[int]]) -> list[int]:
        rounds.append(which)
        return [value * 10 for (value,) in asked]

    def path(k: int, ask: Any) -> list[int]:
        return [ask(k + turn) for turn in range(k)]

    assert run_in_lockstep(path, 4, answer) == [[], [10], [20, 30], [30, 40, 50]]
    assert rounds == [[1, 2, 3], [2, 3], [3]]

    def breaks(k: int, ask: Any) -> None:
        while ask(k) < 20 or k != 2:
            pass
        raise ValueError("path 2")

    with pytest.raises(ValueError, match="path 2"):
        run_in_lockstep(breaks, 4, answer)
    assert settled()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("size", "word"), [(1.0, "limit=200"), (1e25, "step size")])
def test_rough_answers_are_given_up(size: float, word: str) -> None:
    """Where the answers are another at every look, steps get ever smaller: that ends, and says where."""
    noise = torch.Generator().manual_seed(0)

    def rough(x: Tensor, t: Tensor) -> Tensor:
        return size * torch.randn(x.shape, generator=noise, dtype=F64)

    x, times = torch.ones(3, 2, dtype=F64), torch.tensor([1.0, 0.01], dtype=F64)
    with pytest.raises(HastenError, match=rf"stopped at t = .*{word}.*larger tolerances"):
        walk(ProbabilityFlow(1e-9, 1e-9, limit=200), rough, x, times, schedule=VPLinear())
    assert settled()


def test_it_says_why_it_is_not_a_table() -> None:
    with pytest.raises(HastenError, match="probability_flow cannot be compiled to a plan: the length of its next step"):
        plan(ProbabilityFlow(), VPLinear(), ends(VPLinear(), 4))
    assert ProbabilityFlow().nfe(10) is None
    assert format_spec(ProbabilityFlow(1e-3, 1e-3, "DOP853")) == "probability_flow:rtol=0.001,atol=0.001,method=DOP853"
    assert [ProbabilityFlow(method=m).order for m in ("RK23", "RK45", "DOP853")] == [3, 5, 8]


@pytest.mark.parametrize(
    ("options", "word"),
    [({"method": "rk45"}, "did you mean 'RK45'"), ({"rtol": 0.0}, "rtol"), ({"atol": 2.0}, "atol")],
)
def test_bad_options(options: Any, word: str) -> None:
    with pytest.raises(BadInput, match=word):
        ProbabilityFlow(**options)
