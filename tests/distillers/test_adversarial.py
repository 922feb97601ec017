"""Adversarial distillation: its losses to the letter, and two steps on the mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.distillers._gan import initial_or_noised
from hasten.distillers.adversarial import Adversarial
from hasten.errors import BadInput
from hasten.nets.critic import Critic, PointCritic
from hasten.schedules import VPCosine, VPLinear
from hasten.train.adversarial import hinge_loss, r1_penalty
from hasten.train.trained_module import frozen_parameters

from ._images import Squares, image_task
from ._toy import Student, energy, mixture, sample, task, toy, truth

COSINE = VPCosine(offset=0.0)


def test_hinge_is_zero_and_flat_beyond_its_margins() -> None:
    real = torch.tensor([[1.0, 3.0], [1.5, 2.0]], requires_grad=True)
    fake = torch.tensor([[-1.0, -9.0], [-2.0, -1.5]], requires_grad=True)
    loss = hinge_loss(real, fake)
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (real, fake)))
    assert hinge_loss(torch.tensor([0.25]), torch.tensor([0.5])).item() == pytest.approx(0.75 + 1.5)
    g = torch.autograd.grad(hinge_loss(real - 2, fake + 2), (real, fake))
    assert g[0][0, 0] == -0.25 and g[1][0, 0] == 0.25 and g[0][0, 1] == 0


def test_slope_is_the_squared_gradient_in_the_heads_input() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(2, 5, dtype=torch.float64)
    step, total = 1e-5, 0.0
    for row in x:
        for unit in torch.eye(5, dtype=torch.float64):
            total += ((head(row + step * unit) - head(row - step * unit)).sum() / (2 * step)).item() ** 2
    value = r1_penalty(lambda f: head(f[0]), [x])
    assert value.item() == pytest.approx(total / 2, rel=1e-6)
    (g,) = torch.autograd.grad(value, head[0].weight)  # it can be learned from
    assert g.norm() > 1e-4


class Linear(nn.Module):
    """A teacher that predicts ehat = W z, and records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = COSINE
        self.W = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, z: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.calls.append((z, t))
        alpha, sigma = COSINE.alpha(t)[:, None], COSINE.sigma(t)[:, None]
        return (z - sigma * (z @ self.W)) / alpha


def test_score_distillation_is_the_gradient_of_the_weighted_distance() -> None:
    """sds: d/dx_hat = sigma_t^2 (ehat - e'), whatever the teacher predicts; no gradient passes through it or its input."""
    torch.manual_seed(1)
    teacher, n = Linear(), 50
    fake = torch.randn(n, 3, dtype=torch.float64, requires_grad=True)
    loss = Adversarial(distance="sds").distillation_loss(teacher, COSINE, fake)
    (z, t) = teacher.calls[0]
    assert not z.requires_grad
    loss.backward()
    assert teacher.W.grad is None
    alpha, sigma = COSINE.alpha(t)[:, None], COSINE.sigma(t)[:, None]
    e = (z - alpha * fake.detach()) / sigma
    wanted = sigma**2 * (z @ teacher.W.detach() - e)
    torch.testing.assert_close(fake.grad * n * 3, wanted, atol=1e-12, rtol=1e-9)
    again = Adversarial(distance="exponential")
    assert torch.equal(again.time_weight(COSINE, t), COSINE.alpha(t))


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_data_are_where_the_teacher_does_not_pull(shift: float) -> None:
    """x_hat distributed as the data, with the exact teacher: the mean gradient is 0; off the data it points back."""
    torch.manual_seed(2)
    fake = (truth(20_000) + shift).requires_grad_(True)
    Adversarial(distance="sds").distillation_loss(mixture(), COSINE, fake).backward()
    g = fake.grad * fake.numel()
    z = g.mean(0) / (g.std(0) / len(g) ** 0.5)
    assert z.abs().max() < 4 if shift == 0 else z.min() > 20


def test_the_first_node_holds_nothing_of_the_image() -> None:
    for schedule in (COSINE, VPLinear()):  # alpha(1) = 0, and .0066
        x, t = 1e6 * torch.ones(3, 2), torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64)
        torch.manual_seed(3)
        z = initial_or_noised(schedule, x, t)
        torch.manual_seed(3)
        noise = torch.randn_like(x)
        torch.testing.assert_close(z[[0, 2]], noise[[0, 2]])
        torch.testing.assert_close(z[1], schedule.alpha(0.5).float() * x[1] + schedule.sigma(0.5).float() * noise[1])


def test_each_module_learns_from_its_own_loss_alone(tmp_path: Path) -> None:
    job = image_task(tmp_path)
    student, critic = job.student(), Critic(job.denoiser, job.shape, 16)
    method, batch = Adversarial(), Squares()[0]
    method.student_loss(job, student, critic)(batch).backward()
    assert all(p.grad is None and p.requires_grad for p in critic.heads.parameters())
    assert sum(p.grad.norm() for p in student.parameters()) > 0
    assert not batch["fake"].requires_grad and batch["fake"].shape == batch["x"].shape
    student.zero_grad(set_to_none=True)
    method.critic_loss(job, student, critic)(batch).backward()
    assert all(p.grad is None for p in student.parameters())
    assert all(p.grad is not None for p in critic.heads.parameters())
    assert all(p.grad is None for p in job.denoiser.parameters())
    with frozen_parameters(critic.heads):
        assert not any(p.requires_grad for p in critic.heads.parameters())
    del batch["fake"]  # a step when only the critic learns: it makes its own
    assert method.critic_loss(job, student, critic)(batch).isfinite() and "fake" in batch


def test_the_critic_is_a_game_about_reality(tmp_path: Path) -> None:
    """Its loss falls below 2, the value of knowing nothing, where the fakes are wrong."""
    torch.manual_seed(4)
    job = task(tmp_path)
    method, wrong = Adversarial(augment=False, level=(-1.0, 1.0)), toy()
    critic = Critic(job.denoiser, (2,))
    assert isinstance(critic.heads, PointCritic)
    critic_loss = method.critic_loss(job, wrong, critic)
    optimiser = torch.optim.Adam(critic.heads.parameters(), 3e-3)
    losses = []
    for k in range(40):
        batch = job.batches[k]
        batch["fake"] = batch["x"] + 1.0
        optimiser.zero_grad()
        loss = critic_loss(batch)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert abs(losses[0] - 2) < 0.3 and sum(losses[-5:]) / 5 < 1.2


def test_a_start_is_distilled_first(tmp_path: Path) -> None:
    seen = []
    job = image_task(tmp_path, save_student=lambda name, student: seen.append((name, student.steps)))
    student = Adversarial(start="progressive", steps=1).distill(job)
    assert (student.sampler, student.times, student.steps) == ("consistency", "trailing", 1)
    assert seen == [("steps4", 4), ("steps2", 2), ("steps1", 1), ("adversarial", 1)]


def test_two_steps_on_the_mixture(tmp_path: Path) -> None:
    method = Adversarial(steps=2, lr=2e-3, critic_lr=3e-3, r1=0.1, strength=0.1, level=(-2.0, 1.0))
    student = method.distill(task(tmp_path, 300, batch_size=128))
    value = energy(sample(student, 3000), truth())
    teacher = energy(sample(Student(toy(), "ddim", "trailing", 2), 3000), truth())
    assert teacher > 0.03 and value < 0.5 * teacher, (value, teacher)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"distance": "sd"}, {"start": "prog"}])
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="adversarial"):
        Adversarial(**wrong)
