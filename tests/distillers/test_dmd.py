"""Distribution matching: the direction of its push, who learns from what, and one step on the mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.distillers.dmd import DMD, FakeScore, score_difference
from hasten.errors import BadInput
from hasten.exact import Gaussian
from hasten.schedules import VE, VPCosine

from ._images import Squares, image_task
from ._toy import Student, energy, sample, task, toy, truth

COSINE = VPCosine(offset=0.0)


@pytest.mark.parametrize("mu", [0.7, -2.0])
def test_the_scores_of_two_gaussians_differ_by_a_constant(mu: float) -> None:
    """Data N(0, 1), samples N(mu, 1), noise q: fake - real = mu q^2 / (1 + q^2) everywhere, which pulls mu to 0."""
    schedule = VE()
    one = torch.ones(1, dtype=torch.float64)
    real, fake = Gaussian(0 * one, one, schedule), Gaussian(mu * one, one, schedule)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    q = schedule.sigma(t)[:, None]
    for z in (-3.0, 0.0, 5.0):
        state = torch.full((3, 1), z, dtype=torch.float64)
        gap = fake(state, t) - real(state, t)
        torch.testing.assert_close(gap, mu * q**2 / (1 + q**2), atol=1e-12, rtol=1e-12)
        x = torch.full((3, 1), mu, dtype=torch.float64)
        g = score_difference(x, fake(state, t), real(state, t))
        torch.testing.assert_close(g, gap / (x - real(state, t)).abs())
        assert (g * mu > 0).all()  # x - g lies towards 0


def test_the_push_is_scaled_one_sample_at_a_time() -> None:
    x, fake, real = (torch.randn(3, 1, 4, 4, dtype=torch.float64) for _ in range(3))
    g = score_difference(x, fake, real)
    for i in range(3):
        torch.testing.assert_close(g[i], (fake[i] - real[i]) / (x[i] - real[i]).abs().mean())
    assert (score_difference(x, real, real) == 0).all() and score_difference(real, fake, real).isfinite().all()


class Same(nn.Module):
    """A teacher that is what the fake denoiser is."""

    def __init__(self, fake: nn.Module) -> None:
        super().__init__()
        self.fake = fake

    def forward(self, z: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.fake(z, t, **cond)


def test_gradients_go_where_they_should(tmp_path: Path) -> None:
    job = image_task(tmp_path)
    method, batch, student = DMD(steps=2), Squares()[0], job.student()
    fake = FakeScore(job.student(), job.shape)
    method.student_loss(job, student, fake)(batch).backward()
    assert all(p.grad is None and p.requires_grad for p in fake.parameters())
    assert all(p.grad is None for p in job.denoiser.parameters())
    assert sum(p.grad.norm() for p in student.parameters()) > 0
    student.zero_grad(set_to_none=True)
    method.fake_loss(job, student, fake)(batch).backward()
    assert all(p.grad is None for p in student.parameters())
    assert sum(p.grad.norm() for p in fake.head.parameters()) > 0
    # equal denoisers and no critic: nothing to learn
    job.teacher = Same(fake.denoiser)
    DMD(gan=0.0).student_loss(job, student, fake)(batch).backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in student.parameters())


def test_the_students_gradient_is_the_push(tmp_path: Path) -> None:
    """d L / d x = g / (n d), for a student that is one parameter a sample."""

    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.randn(256, 2))

        def forward(self, z: Tensor, t: Tensor, **cond: Any) -> Tensor:
            return 1.0 * self.x

    job = task(tmp_path)
    student, fake, batch = Free(), FakeScore(job.student(), (2,)), job.batches[0]
    fake.denoiser.net.out.bias.data += 0.3
    method = DMD(gan=0.0)
    torch.manual_seed(4)
    method.student_loss(job, student, fake)(batch).backward()  # type: ignore[arg-type]
    torch.manual_seed(4)
    method.generate(job, student, batch)  # type: ignore[arg-type]
    t = method.sample_times(COSINE, 256)
    noise = torch.randn(256, 2)
    z = COSINE.alpha(t)[:, None].float() * student.x.detach() + COSINE.sigma(t)[:, None].float() * noise
    cond = {"label": batch["label"]}
    with torch.no_grad():
        g = score_difference(student.x, fake.denoiser(z, t, **cond), job.teacher(z, t, **cond))
    torch.testing.assert_close(student.x.grad * 512, g, atol=1e-5, rtol=1e-4)


def test_training_walks_the_students_own_path(tmp_path: Path) -> None:
    """With several steps the student is evaluated at states of its own path, never at noised data."""
    job, times = task(tmp_path, batch_size=8), []

    class Told(nn.Module):
        def forward(self, z: Tensor, t: Tensor, **cond: Any) -> Tensor:
            times.append(float(t.flatten()[0]))
            return torch.full_like(z, 100.0)

    torch.manual_seed(5)
    paths = set()
    for _ in range(40):
        times.clear()
        DMD(steps=4).generate(job, Told(), job.batches[0])  # type: ignore[arg-type]
        paths.add(tuple(times))
    assert paths == {(1.0,), (1.0, 0.75), (1.0, 0.75, 0.5), (1.0, 0.75, 0.5, 0.25)}


def test_one_step_on_the_mixture(tmp_path: Path) -> None:
    method = DMD(lr=2e-3, fake_lr=2e-3, every=2)
    student = method.distill(task(tmp_path, 60))
    value = energy(sample(student, 3000), truth())
    teacher = energy(sample(Student(toy(), "ddim", "trailing", 1), 3000), truth())
    assert teacher > 0.05 and value < 0.1 * teacher, (value, teacher)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"every": 0}, {"low": 0.0}, {"low": 0.9, "high": 0.5}])
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="dmd"):
        DMD(**wrong)
