"""ProDiff: its table, its target, its mask, and a halving on the mixture."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.distillers import DistillTask, Student
from hasten.distillers._targets import ddim_path, ddim_step
from hasten.distillers.prodiff import ProDiff, prodiff_schedule, teacher_nodes
from hasten.errors import BadInput
from hasten.exact import Gaussian, GaussianMixture
from hasten.pick import pick
from hasten.plan.draw import draw
from hasten.sampling import Count, Noise
from hasten.schedules import Schedule, VPCosine
from tests.distillers import _toy

TABLE = prodiff_schedule()


def mixture() -> GaussianMixture:
    exact = _toy.mixture()
    return GaussianMixture(exact.weights, exact.means, exact.variances, TABLE, labels=[0, 1, 2])


def test_the_table() -> None:
    alpha = torch.tensor(TABLE.alphas_cumprod, dtype=torch.float64).sqrt()
    assert torch.allclose(alpha[:4], torch.tensor([0.664, 0.199, 0.027, 0.0016], dtype=torch.float64), rtol=0.02)
    s = torch.arange(1, 6, dtype=torch.float64) / 5  # the sums of the odd numbers are squares
    assert torch.allclose(alpha, torch.exp(-0.05 * s - 0.25 * 39.9 * s**2), rtol=1e-10)
    assert float(TABLE.sigma(TABLE.t_min)) == pytest.approx(0.75, abs=0.005)
    assert torch.equal(TABLE.index(teacher_nodes(TABLE, 4)).round(), torch.arange(5.0, dtype=torch.float64))
    assert torch.allclose(teacher_nodes(VPCosine(), 4), torch.arange(5, dtype=torch.float64) / 4 * VPCosine().t_max)


class Oracle(nn.Module):
    """What a student of twice as long steps has to say: it runs two of its teacher's."""

    def __init__(self, teacher: Any, times: Tensor) -> None:
        super().__init__()
        self.teacher, self.times, self.schedule = teacher, times, TABLE

    def forward(self, z: Tensor, t: Tensor, **cond: Any) -> Tensor:
        i = torch.stack([(self.times - one).abs().argmin() for one in t])
        return ddim_path(self.teacher, TABLE, z, [self.times[i], self.times[i - 1], self.times[i - 2]], **cond)[1]


def walked(denoiser: Any, z: Tensor, times: Tensor) -> Tensor:
    """DDIM down the increasing times, all the way to the first."""
    for t, s in zip(times.flip(0), times.flip(0)[1:]):
        t, s = t.expand(len(z)), s.expand(len(z))
        z = ddim_step(TABLE, z, denoiser(z, t), t, s)
    return z


def test_oracles_land_where_the_teacher_does_through_all_halvings() -> None:
    finest, teacher = teacher_nodes(TABLE, 4), mixture()
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    two = Oracle(teacher, finest)
    one = Oracle(two, finest[::2])
    end = walked(teacher, z, finest)
    assert (walked(two, z, finest[::2]) - end).abs().max() < 1e-12
    assert (walked(one, z, finest[::4]) - end).abs().max() < 1e-12
    assert (walked(teacher, z, finest[::2]) - end).abs().max() > 0.05  # the teacher itself does not
    for i in (2, 3, 4):  # from every node
        t, s, u = (finest[k].expand(50) for k in (i, i - 1, i - 2))
        z_end, target = ddim_path(teacher, TABLE, z, [t, s, u])
        assert (ddim_step(TABLE, z, target, t, u) - z_end).abs().max() < 1e-12


def task(out: Path, teacher: nn.Module, schedule: Schedule = TABLE, steps: int = 1) -> DistillTask:
    base = _toy.toy().replace(schedule=schedule)
    return DistillTask(teacher, base, _toy.Draws(32), (2,), out, steps=_toy.Steady(steps), show=False)  # type: ignore[arg-type]


def test_the_loss_is_that_of_the_oracle_and_the_student_is_evaluated_at_its_nodes(tmp_path: Path) -> None:
    teacher, finest = mixture(), teacher_nodes(TABLE, 4)
    evaluated: list[Tensor] = []

    class Recorder(Oracle):
        def forward(self, z: Tensor, t: Tensor, **cond: Any) -> Tensor:
            evaluated.append(t)
            return super().forward(z, t, **cond)

    loss_fn = ProDiff().loss_fn(task(tmp_path, teacher), teacher, Recorder(teacher, finest), finest, 2)
    torch.manual_seed(0)
    batch = {key: value.double() if key == "x" else value for key, value in _toy.Draws(64)[0].items()}
    assert float(loss_fn(batch)) < 1e-12
    assert torch.equal(evaluated[0].unique(), finest[[2, 4]])
    worse = ProDiff().loss_fn(task(tmp_path, teacher), teacher, teacher, finest, 2)
    assert float(worse(batch)) > 1e-3


class Neighbours(nn.Module):
    """x0 (B, 1, M, F) from its neighbours too: padding would leak into the frames beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.schedule = nn.Conv2d(1, 1, 3, padding=1), TABLE

    def forward(self, z: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.conv(z)


def test_padding_does_not_count(tmp_path: Path) -> None:
    teacher, student, finest = Neighbours(), Neighbours(), teacher_nodes(TABLE, 4)
    with torch.no_grad():
        student.conv.weight *= 2
    x, mask = torch.randn(3, 1, 4, 6), torch.ones(3, 6)
    mask[0, 4:], mask[2, 1:] = 0, 0
    loss_fn = ProDiff().loss_fn(task(tmp_path, teacher), teacher, student, finest, 2)

    def value(x: Tensor, **more: Tensor) -> float:
        torch.manual_seed(1)
        return float(loss_fn({"x": x, **more}).detach())

    other = torch.where(mask[:, None, None].bool(), x, 50.0 * torch.randn_like(x))
    assert value(x, mask=mask) == value(other, mask=mask)
    assert value(x) != pytest.approx(value(other), rel=0.1)
    assert value(x, mask=mask) == pytest.approx(value(x, mask=mask[:, None, None]))
    assert value(x, mask=torch.ones(3, 6)) == pytest.approx(value(x))
    with pytest.raises(BadInput, match="mask of shape"):
        value(x, mask=torch.ones(3, 5))


def test_the_gradient_of_l1_is_one_over_the_valid_elements(tmp_path: Path) -> None:
    finest, mask, output = teacher_nodes(TABLE, 4), torch.ones(3, 6), torch.full((3, 1, 4, 6), 9.0, requires_grad=True)
    mask[1, 2:] = 0
    teacher = Neighbours()
    loss_fn = ProDiff().loss_fn(task(tmp_path, teacher), teacher, lambda z, t, **cond: output, finest, 2)
    loss_fn({"x": torch.randn(3, 1, 4, 6), "mask": mask}).backward()
    valid = mask[:, None, None].expand(3, 1, 4, 6)
    assert output.grad is not None
    assert torch.allclose(output.grad.abs(), valid / valid.sum())


def test_the_student_returns_its_last_prediction(tmp_path: Path) -> None:
    """Two calls, at entries 4 and 2 of the table, and the second prediction is the result."""
    gaussian = Gaussian(torch.zeros(2), torch.ones(2), TABLE)
    job = task(tmp_path, gaussian)
    student = ProDiff().distill(job)
    assert student.sampler == "ddim" and student.steps == 2 and job.completed_stages == ["steps2"]
    times = pick("times", student.times)(TABLE, 2)
    assert torch.equal(TABLE.index(times[:2]).round(), torch.tensor([4.0, 2.0], dtype=torch.float64)) and times[2] == 0
    counted, noise = Count(gaussian), Noise(range(4), (2,))
    x = draw(counted, pick("samplers", "ddim"), times, noise)
    z = ddim_step(TABLE, noise.initial(), gaussian(noise.initial(), times[0]), times[0].expand(4), times[1].expand(4))
    assert counted.calls == 2 and torch.allclose(x, gaussian(z, times[1]), atol=1e-6)


def test_frozen_parts_stay(tmp_path: Path) -> None:
    job = task(tmp_path, mixture(), steps=5)
    trained = ProDiff(frozen=("label", "hidden.0"), lr=1e-2).distill(job).denoiser.net
    old, new = job.denoiser.net.state_dict(), trained.state_dict()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    saved = {key for key in old if key.startswith(("label.", "hidden.0."))}
    assert changed == set(old) - saved and len(saved) == 3
    with pytest.raises(BadInput, match="no parameter names start with 'labels': did you mean"):
        ProDiff(frozen=("labels",)).distill(job)


def test_on_the_mixture(tmp_path: Path) -> None:
    saved: dict[str, Student] = {}
    job = _toy.task(tmp_path, 80, teacher=_toy.mixture(), batch_size=128, save_student=saved.__setitem__)
    student = ProDiff(steps=(2,), start=12, lr=2e-3).distill(job)
    assert list(saved) == ["steps2"]
    energy = functools.partial(_toy.energy, b=_toy.truth())
    teacher = Student(_toy.toy(), "ddim", "trailing", 2)
    assert energy(_toy.sample(student)) < 0.3 * energy(_toy.sample(teacher))


def test_refusals() -> None:
    with pytest.raises(BadInput, match="unknown loss of prodiff 'ssim'"):
        ProDiff(loss="ssim")
    with pytest.raises(BadInput, match="prodiff: 3 steps cannot follow 4"):
        ProDiff(steps=(4, 3))
