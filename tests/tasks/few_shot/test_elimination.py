"""Elimination: the paired test keeps its promise on simulated errors, stages and orders are what they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.tasks.few_shot import AllTimes, PairedStop, Stages, eliminate


def simulated(images: int, classes: int, times: int, gap: float, seed: int, skew: bool = False) -> Tensor:
    """Errors (N, K, T): a part that all classes share, much larger than the paired noise, and class means."""
    g = torch.Generator().manual_seed(seed)
    common = 20 * torch.randn(images, 1, times, generator=g).exp()
    noise = torch.randn(images, classes, times, generator=g)
    noise = noise.exp() if skew else noise
    scale = torch.linspace(0.2, 2, times) ** 2  # the errors' spread depends on the time
    means = gap * torch.randn(images, classes, 1, generator=g)
    return (common + noise * scale + means).double()


def lookup(errors: Tensor) -> object:
    def evaluate(some: Tensor, classes: Tensor, times: Tensor) -> Tensor:
        return errors[some[:, None, None], classes[None, :, None], times[None, None]].permute(1, 0, 2)

    return evaluate


@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize("error", [0.05, 0.2])
def test_the_paired_test_keeps_its_promise(skew: bool, error: float) -> None:
    """Where the classes are all but equal, the answer differs from the exhaustive one no more often than promised."""
    wrong, total = 0, 0
    for seed in range(4):
        errors = simulated(200, 4, 128, 0.02, seed, skew)
        found = eliminate(lookup(errors), 200, 4, 128, PairedStop(error), seed)  # type: ignore[arg-type]
        wrong += int((found.winner != errors.mean(2).argmin(1)).sum())
        total += 200
    assert wrong / total <= error, (wrong, total)
    if error == 0.2:
        assert wrong > 0  # it does eliminate before the end


def test_clear_classes_need_few_evaluations() -> None:
    """At least 95 % agreement at a tenth of the evaluations where classes differ; unpaired noise would not allow it."""
    errors = simulated(200, 20, 256, 4.0, 5)
    found = eliminate(lookup(errors), 200, 20, 256, PairedStop(0.05))  # type: ignore[arg-type]
    everything = eliminate(lookup(errors), 200, 20, 256, AllTimes())  # type: ignore[arg-type]
    assert float((found.winner == everything.winner).double().mean()) >= 0.95
    assert float(found.evaluations.double().mean()) < 20 * 256 / 10
    assert everything.evaluations.tolist() == [20 * 256] * 200
    torch.testing.assert_close(everything.errors, errors)


def test_every_time_is_evaluated_once_and_early_ones_are_spread() -> None:
    for times in (2, 7, 64, 100):
        for rule in (PairedStop(), Stages((5, 20), (3, 1)), AllTimes()):
            assert sorted(rule.order(times, 3).tolist()) == list(range(times)), rule
            looks = rule.looks(times)
            assert looks == sorted(looks) and looks[-1] <= times
    assert sorted((PairedStop().order(64, 0)[:8] // 8).tolist()) == list(range(8))
    assert sorted(Stages().order(64, 0)[:8].tolist()) == list(range(0, 64, 8))
    assert not torch.equal(PairedStop().order(64, 0), PairedStop().order(64, 1))


def test_stages_keep_so_many_classes_after_so_many_times() -> None:
    errors = simulated(10, 12, 100, 1.0, 0)
    found = eliminate(lookup(errors), 10, 12, 100, Stages((4, 20, 50), (6, 3, 1)))  # type: ignore[arg-type]
    assert found.evaluations.tolist() == [12 * 4 + 6 * 16 + 3 * 30] * 10
    for bad in (((4, 4), (2, 1)), ((4, 8), (2, 2)), ((4, 8), (4, 2)), ((4,), (2, 1))):
        with pytest.raises(BadInput):
            Stages(*bad)


def test_equal_classes_are_a_tie_until_the_end() -> None:
    errors = torch.randn(5, 1, 64, dtype=torch.float64).expand(5, 3, 64)
    found = eliminate(lookup(errors), 5, 3, 64)  # type: ignore[arg-type]
    assert found.winner.tolist() == [0] * 5 and found.evaluations.tolist() == [3 * 64] * 5


def test_other_numbers_are_refused() -> None:
    for bad in ({"error": 0.0}, {"error": 1.0}, {"growth": 1.0}, {"first": 1}):
        with pytest.raises(BadInput):
            PairedStop(**bad)  # type: ignore[arg-type]
