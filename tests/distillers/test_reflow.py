"""Rectified flow: the change of variables, straight paths after reflow, and one step on the mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.distillers import DistillTask, Student
from hasten.distillers.reflow import ReFlow, flow_loss, flow_times, path_scale, straightness
from hasten.errors import BadInput
from hasten.exact import Gaussian
from hasten.predictions import spread
from hasten.samplers.ddim import DDIM
from hasten.sampling import walk
from hasten.schedules import EDM, Flow, Schedule, VPCosine, VPLinear
from hasten.times import Trailing
from hasten.train.checkpoint import load_modules
from tests.distillers import _toy

M, C = 2.0, 0.5


class Straight(nn.Module):
    """The denoiser after reflow of N(0, 1) -> N(M, C^2): its pairs are (e, M + C e)."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, z: Tensor, t: Tensor, **cond: Any) -> Tensor:
        alpha, sigma = (spread(f(t), z) for f in (self.schedule.alpha, self.schedule.sigma))
        return M + C * (z - alpha * M) / (alpha * C + sigma)


def normal(n: int = 4000) -> Tensor:
    return torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("schedule", [Flow(), VPCosine(offset=0.0)], ids=["flow", "cosine"])
def test_one_gaussian_before_and_after_reflow(schedule: Schedule) -> None:
    z = normal()
    first = Gaussian(torch.tensor([M]), torch.tensor([C**2]), schedule)
    one = walk(DDIM(), first, z, Trailing()(schedule, 1))
    assert (one - M).abs().max() < 1e-12  # one step of the first flow is the mean, whatever the noise
    assert straightness(first, z, {}, 1024) == pytest.approx(0.21, abs=0.01)
    after = Straight(schedule)
    assert (walk(DDIM(), after, z, Trailing()(schedule, 1)) - (M + C * z)).abs().max() < 1e-12
    assert straightness(after, z, {}) < 1e-20


def test_the_velocity_of_one_gaussian() -> None:
    """v = m + (tau c^2 - (1 - tau)) / ((1 - tau)^2 + tau^2 c^2) (y - tau m), tau = 1 - u, from noise to data."""
    first, y = Gaussian(torch.tensor([M]), torch.tensor([C**2]), Flow()), normal(50)
    for u in (0.9, 0.5, 0.1):
        tau = 1 - u
        v = M + (tau * C**2 - u) / (u**2 + tau**2 * C**2) * (y - tau * M)
        assert ((first(y, torch.tensor(u, dtype=torch.float64)) - y) / u - v).abs().max() < 1e-12


@pytest.mark.parametrize("schedule", [VPCosine(offset=0.0), VPLinear(), EDM()], ids=["cosine", "linear", "edm"])
def test_a_ddim_step_is_an_euler_step_of_the_flow(schedule: Schedule) -> None:
    teacher, z = Gaussian(torch.tensor([M]), torch.tensor([C**2]), schedule), normal(20)
    t, s = (flow_times(schedule, torch.tensor(u, dtype=torch.float64)) for u in (0.8, 0.3))
    y = z / path_scale(schedule, float(t))
    v = (y - teacher(z, t)) / 0.8
    landed = walk(DDIM(), teacher, z, torch.stack([t, s]))
    assert (landed / path_scale(schedule, float(s)) - (y - 0.5 * v)).abs().max() < 1e-9
    assert float(schedule.sigma(t)) / path_scale(schedule, float(t)) == pytest.approx(0.8)


def test_pairs_leave_no_residual_and_random_pairing_does() -> None:
    """The least loss at a time is the variance of e - x that a line in y cannot explain: 0 for the flow's own pairs."""
    e = normal()
    for x, zero in ((M + C * e, True), (M + C * e.roll(1, 0), False)):
        for u in (0.99, 0.5, 0.01):
            y = (1 - u) * x + u * e
            a = torch.cat([y, torch.ones_like(y)], 1)
            residual = (a @ torch.linalg.lstsq(a, e - x).solution - (e - x)).square().mean()
            assert (residual < 1e-20) == zero


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
def test_the_loss_is_the_squared_error_of_the_velocity(prediction: str) -> None:
    torch.manual_seed(0)
    student = Denoiser(_toy.Small(16), VPCosine(offset=0.0), prediction)
    x, noise, t = torch.randn(6, 2), torch.randn(6, 2), torch.linspace(0.05, 1, 6, dtype=torch.float64)
    alpha, sigma = (spread(f(t), x) for f in (student.schedule.alpha, student.schedule.sigma))
    z = alpha * x + sigma * noise
    v = (z - (alpha + sigma) * student(z, t)) / sigma
    assert flow_loss(student, x, noise, t).item() == pytest.approx((v - (noise - x)).square().mean().item(), rel=1e-4)


def test_it_begins_as_the_teacher_and_ends_straight(tmp_path: Path) -> None:
    saved: dict[str, Student] = {}
    task = _toy.task(tmp_path, 80, teacher=_toy.mixture(), save_student=saved.__setitem__)
    student = ReFlow(pairs=2048, lr=2e-3).distill(task)
    assert list(saved) == ["reflow1", "distill"] and task.completed_stages == ["reflow1", "distill"]
    figures = student.figures
    assert figures["straightness"] < 0.25 * figures["straightness_teacher"]
    truth = _toy.truth()
    before, flow, after = (
        _toy.energy(_toy.sample(s, steps=1), truth)
        for s in (Student(_toy.toy(), "ddim", "trailing", 1), saved["reflow1"], student)
    )
    assert flow < 0.3 * before and after < 0.1 * before and after < 0.005


def test_the_first_flow_from_data_with_a_coupling(tmp_path: Path) -> None:
    """Pairing by optimal transport makes the flow that is learned from real samples straighter."""
    value = {}
    for coupling in ("ot_class", "ot"):
        task = _toy.task(tmp_path / coupling, {"flow": 80}, batch_size=128)
        method = ReFlow(rounds=0, coupling=coupling, distill_last=False, steps=4, lr=2e-3)
        assert method.needs_data
        student = method.distill(task)
        value[coupling] = _toy.energy(_toy.sample(student), _toy.truth())
        assert student.figures["straightness"] < 0.7 * student.figures["straightness_teacher"]
        assert student.steps == 4
    teacher = _toy.energy(_toy.sample(Student(_toy.toy(), "ddim", "trailing", 4)), _toy.truth())
    assert value["ot_class"] < 0.5 * teacher
    assert value["ot_class"] < 0.5 * value["ot"]  # over the whole batch the noise tells the class: biased when sampling


def test_rounds_a_last_student_of_two_steps_and_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round draws its pairs from the student before it; a second run reads what the first one left."""
    calls: list[Tensor] = []

    def spy(student: Any, x: Tensor, noise: Tensor, t: Tensor, **cond: Any) -> Tensor:
        calls.append(t)
        return flow_loss(student, x, noise, t, **cond)

    monkeypatch.setattr("hasten.distillers.reflow.flow_loss", spy)
    method, students = ReFlow(rounds=2, steps=2, pairs=64, own_steps=2), []
    for _ in range(2):
        task = _toy.task(tmp_path, 4, batch_size=64)
        students.append(method.distill(task))
    assert task.completed_stages == ["reflow1", "reflow2", "distill"] and len(calls) == 12
    assert torch.equal(torch.cat(calls[8:]).unique(), torch.tensor([0.5, 1.0], dtype=torch.float64))
    assert len(torch.cat(calls[:8]).unique()) > 400
    teachers = {name: task.pairs(name, 64, **options).config["teacher"] for name, options in (
        ("round1", {}), ("round2", {"steps": 2, "sampler": "ddim", "times": "trailing", "teacher": load(task, 0)}),
        ("last", {"steps": 2, "sampler": "ddim", "times": "trailing", "teacher": load(task, 1)}),
    )}  # fmt: skip
    assert len(set(teachers.values())) == 3
    first, second = (s.denoiser.state_dict() for s in students)
    assert all(torch.equal(first[key], second[key]) for key in first)


def load(task: DistillTask, stage: int) -> nn.Module:
    """The student that a stage left."""
    student = task.student()
    load_modules({"student": student}, task.out / "stages" / f"{stage}-reflow{stage + 1}" / "student.safetensors")
    return student.eval()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unknown coupling of reflow 'otc'"):
        ReFlow(coupling="otc")
    with pytest.raises(BadInput, match="a round or a coupling"):
        ReFlow(rounds=0)
    with pytest.raises(BadInput, match="guidance_scale must be 1, got 2"):
        ReFlow(coupling="ot").distill(_toy.task(tmp_path, 1, guidance_scale=2.0))
    assert not ReFlow().needs_data
    assert isinstance(_toy.task(tmp_path, 1), DistillTask)
