"""Progressive distillation: oracle students, the stages, and that it beats its teacher at equal cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hasten.distillers import Student
from hasten.distillers import _targets as targets
from hasten.distillers.progressive import Progressive
from hasten.errors import BadInput
from hasten.exact import GaussianMixture
from hasten.times import Trailing
from tests.distillers._toy import energy, mixture, sample, task, toy, truth


class Oracle:
    """A perfect student of n steps: at a node, the x* of the two steps of the oracle below it."""

    def __init__(self, exact: GaussianMixture, n: int, finest: int) -> None:
        self.exact, self.n, self.finest = exact, n, finest
        self.evaluated: set[float] = set()

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        self.evaluated |= set(t.tolist())
        if self.n == self.finest:
            return self.exact(z, t)
        nodes = targets.time_nodes(Trailing(), self.exact.schedule, 2 * self.n)
        i = (t * 2 * self.n).round().long()
        times = [nodes[i - k] for k in range(3)]
        return targets.ddim_path(Oracle(self.exact, 2 * self.n, self.finest), self.exact.schedule, z, times)[1]


def walk(denoiser: object, schedule: object, z: Tensor, n: int) -> Tensor:
    nodes = targets.time_nodes(Trailing(), schedule, n)  # type: ignore[arg-type]
    times = [nodes[k].expand(len(z)) for k in range(n, -1, -1)]
    return targets.ddim_path(denoiser, schedule, z, times)[0]  # type: ignore[arg-type]


def test_oracle_students_reproduce_the_teacher_through_all_halvings() -> None:
    exact = mixture()
    z = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    teacher = walk(exact, exact.schedule, z, 32)
    for n in (16, 8, 4, 2, 1):
        assert (walk(Oracle(exact, n, 32), exact.schedule, z, n) - teacher).abs().max() < 1e-12
    true = exact.ode(z, 1.0)
    error = (teacher - true).norm(dim=1).median().item()
    assert error == pytest.approx(0.0254, rel=0.35)  # and nothing is lost or won on the way to one step


def test_students_are_evaluated_on_their_grid_only(tmp_path: Path) -> None:
    evaluated: set[float] = set()
    exact = mixture()

    def teacher(z: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        evaluated.update(t.tolist())
        return exact(z, t, **cond)

    job = task(tmp_path)
    loss_fn = Progressive(steps=(4,)).loss_fn(job, teacher, job.student(), 4, 2)  # type: ignore[arg-type]
    torch.manual_seed(0)
    loss_fn(job.batches[0])
    assert sorted(evaluated) == [k / 8 for k in range(1, 9)]


def test_a_small_student_beats_its_teacher_at_equal_steps(tmp_path: Path) -> None:
    students: dict[str, Student] = {}
    job = task(tmp_path, steps=60, save_student=students.__setitem__)
    last = Progressive(steps=(8, 2, 1), start=32).distill(job)
    reference = truth()
    assert job.completed_stages == ["steps8", "steps2", "steps1"] and last.steps == 1
    for name, factor in (("steps2", 10), ("steps1", 15)):
        n = students[name].steps
        plain = energy(sample(Student(toy(), "ddim", "trailing", n)), reference)
        assert factor * energy(sample(students[name]), reference) < plain


def test_a_finished_stage_is_loaded_and_an_interrupted_run_ends_the_same(tmp_path: Path) -> None:
    method = Progressive(steps=(4, 2))
    full = method.distill(task(tmp_path / "a", steps=30))

    class Stop(Exception):
        pass

    def interrupt(name: str, student: Student) -> None:
        raise Stop

    with pytest.raises(Stop):
        method.distill(task(tmp_path / "b", steps=30, save_student=interrupt))
    again = method.distill(task(tmp_path / "b", steps=30))
    for mine, other in zip(full.denoiser.parameters(), again.denoiser.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("steps, start", [((8, 3), 0), ((4, 8), 0), ((8, 4), 12), ((), 0), ((2, 2), 0)])
def test_steps_that_do_not_nest_are_refused(steps: tuple[int, ...], start: int) -> None:
    with pytest.raises(BadInput, match="progressive"):
        Progressive(steps=steps, start=start)
