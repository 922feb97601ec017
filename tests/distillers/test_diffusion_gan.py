"""Diffusion GANs: their distributions, margins and posterior, and two steps on the mixture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.distillers._gan import predict_raw_and_x0
from hasten.distillers.diffusion_gan import DiffusionGAN, posterior_sample
from hasten.errors import BadInput, HastenError
from hasten.predictions import Eps, V
from hasten.samplers.ddpm import DDPM
from hasten.sampling import walk
from hasten.schedules import VPCosine, VPLinear
from hasten.times import Trailing
from hasten.train.adversarial import margin_loss

from ._images import Squares, image_task
from ._toy import Student, energy, sample, task, toy, truth

COSINE = VPCosine(offset=0.0)


@pytest.mark.parametrize("s", [0.0, 0.25, 0.5, 0.75])
def test_fakes_of_the_datas_law_look_like_data_at_every_time(s: float) -> None:
    """x_hat distributed as the data, whatever z: y' and y have one distribution; with a shift they do not."""
    torch.manual_seed(0)
    data, other = truth(4000).split(2000)
    batch = {"t": torch.full((2000,), s + 0.25, dtype=torch.float64), "z": 9 * torch.randn(2000, 2)}
    method = DiffusionGAN()
    real, at = method.critic_input(COSINE, data, batch)
    assert torch.equal(at, torch.full_like(at, s))
    assert abs(energy(method.critic_input(COSINE, other, batch)[0], real)) < 0.004
    assert energy(method.critic_input(COSINE, other + 1.0, batch)[0], real) > 0.02


def test_margins_stop_the_gradient_exactly() -> None:
    real = torch.tensor([0.4, 0.6, 7.0], requires_grad=True)
    fake = torch.tensor([-0.4, -0.6, -7.0], requires_grad=True)
    a, b = torch.autograd.grad(margin_loss(real, fake, 0.5), (real, fake))
    assert a[0] < 0 < b[0] and (a[1:] == 0).all() and (b[1:] == 0).all()
    free = margin_loss(real, fake, math.inf)
    bce = nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(free, bce(real, torch.ones(3)) + bce(fake, torch.zeros(3)))
    assert all((g != 0).all() for g in torch.autograd.grad(free, (real, fake)))


def test_the_critic_begins_knowing_nothing(tmp_path: Path) -> None:
    """A copy of the network with a last layer of zeros: the loss is 2 log 2, and nothing reaches the student."""
    job, batch = image_task(tmp_path), Squares()[0]
    method, student = DiffusionGAN(strength=0.0), job.student()
    critic, module, penalty = method.build_critic(job)
    loss = method.student_loss(job, student, critic, module)(batch)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in student.parameters())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    loss = method.critic_loss(job, student, critic, penalty)(batch)
    assert loss.item() == pytest.approx(2 * math.log(2))
    loss.backward()
    assert module.net.conv_out.weight.grad.norm() > 0


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        return self.c.expand(len(x), 2)


def test_reconstruction_alone_gives_the_mean_of_the_data(tmp_path: Path) -> None:
    """At t = 1 the input holds nothing, and the minimum is the mean (v = -x there)."""
    job = task(tmp_path, batch_size=4000)
    method, student = DiffusionGAN(steps=1), Denoiser(Constant(), COSINE, V())
    batch = job.batches[0]
    nothing = (lambda y, s, **cond: (0 * y).sum(1)), nn.Identity()
    student.net.c.data = -batch["x"].mean(0)
    loss = method.student_loss(job, student, *nothing)(batch)
    loss.backward()
    assert student.net.c.grad.abs().max() < 1e-5
    torch.testing.assert_close(batch["fake"], batch["x"].mean(0).expand(4000, 2))
    student.net.c.grad = None
    student.net.c.data += 0.5
    method.student_loss(job, student, *nothing)(batch).backward()
    torch.testing.assert_close(student.net.c.grad, torch.full((2,), 0.5), atol=1e-4, rtol=1e-4)  # 2 (c - mean) / d


@pytest.mark.parametrize("schedule", [COSINE, VPLinear()])
def test_the_posterior_is_bayes(schedule: Any) -> None:
    torch.manual_seed(1)
    t, s = torch.tensor([0.9, 0.5], dtype=torch.float64), torch.tensor([0.4, 0.1], dtype=torch.float64)
    z, x0 = torch.tensor([[0.7], [-0.2]], dtype=torch.float64), torch.tensor([[0.3], [1.1]], dtype=torch.float64)
    many = 200_000
    draws = posterior_sample(schedule, *(v.repeat_interleave(many, 0) for v in (z, x0, t, s))).view(2, many)
    a = schedule.alpha(t) / schedule.alpha(s)
    prior, like = 1 / schedule.sigma(s) ** 2, a**2 / (schedule.sigma(t) ** 2 - a**2 * schedule.sigma(s) ** 2)
    var = 1 / (prior + like)
    mean = var * (prior * schedule.alpha(s) * x0[:, 0] + like * z[:, 0] / a)
    torch.testing.assert_close(draws.var(1), var, rtol=0.015, atol=0)
    assert ((draws.mean(1) - mean).abs() < 4 * (var / many).sqrt()).all()


def test_the_posterior_is_a_step_of_ddpm() -> None:
    """So the sampler of the hybrid is "ddpm"; also from pure noise and into the clean end."""
    for r, e in ((1.0, 0.75), (0.75, 0.5), (0.25, 0.0)):
        z, x0, xi = (torch.randn(6, 2, dtype=torch.float64) for _ in range(3))
        t, s = (torch.full((6,), v, dtype=torch.float64) for v in (r, e))
        grid = torch.tensor([r, e], dtype=torch.float64)
        wanted = walk(DDPM(), lambda x, t, x0=x0: x0, z, grid, lambda xi=xi: xi, schedule=COSINE)
        state = torch.random.get_rng_state()
        value = posterior_sample(COSINE, z, x0, t, s)
        torch.random.set_rng_state(state)
        value = value + COSINE.sigma(s)[0] * 0 + spread_of(r, e) * (xi - torch.randn_like(z))  # the same draw for both
        torch.testing.assert_close(value, wanted, atol=1e-12, rtol=1e-12)


def spread_of(r: float, s: float) -> Tensor:
    """Standard deviation of q(z_s | z_r, x) on the cosine schedule."""
    (a_r, s_r), (a_s, s_s) = ((COSINE.alpha(t), COSINE.sigma(t)) for t in (r, s))
    return s_s * torch.sqrt(1 - (a_r * s_s / (a_s * s_r)) ** 2)


def test_times_of_training(tmp_path: Path) -> None:
    job, student = task(tmp_path, batch_size=2000), toy()
    for times in ("nodes", "all"):
        batch = job.batches[0]
        method = DiffusionGAN(times=times)
        method.generate(job, student, batch)
        t, s = batch["t"], method.critic_input(COSINE, batch["x"], batch)[1]
        torch.testing.assert_close(s, (t - 0.25).clamp_min(0))
        assert t.min() > 0 and t.max() <= 1 and s.min() == 0
        if times == "nodes":
            assert sorted(set(t.tolist())) == Trailing()(COSINE, 4)[:-1].flip(0).tolist()
        else:
            assert len(set(t.tolist())) > 1900


def test_raw_and_x0_are_those_of_the_denoiser() -> None:
    student, z, t = toy(), torch.randn(7, 2), torch.linspace(0.1, 1, 7, dtype=torch.float64)
    raw, x0 = predict_raw_and_x0(student, z, t)
    assert torch.equal(raw, student.raw(z, t))
    torch.testing.assert_close(x0, student(z, t))
    with pytest.raises(HastenError, match="eps"):
        predict_raw_and_x0(student.replace(prediction=Eps()), z, t)


def test_four_steps_on_the_mixture(tmp_path: Path) -> None:
    method = DiffusionGAN(lr=2e-3, critic_lr=3e-3, every=1, strength=0.3)
    student = method.distill(task(tmp_path, 300, batch_size=128))
    value = energy(sample(student, 3000), truth())
    teacher = energy(sample(Student(toy(), "ddim", "trailing", 4), 3000), truth())
    assert teacher > 0.014 and value < 0.5 * teacher, (value, teacher)


@pytest.mark.slow
def test_the_hybrid_on_the_mixture(tmp_path: Path) -> None:
    """Better than its teacher's DDPM, by a quarter only: x_hat has no chance of its own, and one point is no posterior."""
    method = DiffusionGAN(
        lr=2e-3, critic_lr=3e-3, every=1, posterior=True, margin=None, strength=0.5, r1=0.05
    )  # fmt: skip
    student = method.distill(task(tmp_path, 120))
    value = energy(sample(student, 4000), truth())
    teacher = energy(sample(Student(toy(), "ddpm", "trailing", 4), 4000), truth())
    assert teacher > 0.016 and value < 0.9 * teacher, (value, teacher)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"critic": "head"}, {"times": "some"}, {"r1": 0.1}])
def test_impossible_options_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="diffusion_gan"):
        DiffusionGAN(**wrong)
    job = task(tmp_path)
    job.denoiser = job.denoiser.replace(net=Constant())
    with pytest.raises(BadInput, match="critic=heads"):
        DiffusionGAN().distill(job)


def test_a_student_of_four_nodes_can_be_sampled_in_one_step(tmp_path: Path) -> None:
    """UFOGen's: the recommended steps are another divisor of K."""
    result = DiffusionGAN(steps=4, times="all", sampled=1, critic="heads").distill(task(tmp_path, steps=1))
    assert (result.steps, result.sampler, result.times) == (1, "consistency", "trailing")
    for wrong in ({"sampled": 3}, {"sampled": -1}, {"sampled": 2, "posterior": True}):
        with pytest.raises(BadInput, match="sampled must be a divisor of steps=4"):
            DiffusionGAN(**wrong)
