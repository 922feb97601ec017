"""Shortcut fine-tuning: an unbiased gradient, the chain's own density, fresh chains, and fewer errors on the mixture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.distillers.sft_pg import SFTPG, DDPMChain, gradient_penalty, random_moves
from hasten.errors import BadInput
from hasten.samplers.ddpm import DDPM
from hasten.sampling import walk
from hasten.schedules import VPCosine
from hasten.times import Trailing

from ._toy import Student, energy, sample, task, toy, truth

COSINE = VPCosine(offset=0.0)


class Fixed(nn.Module):
    """A policy whose prediction is a parameter, one a sample, so that each has its own gradient."""

    def __init__(self, theta: float, n: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.full((n, 1), theta, dtype=torch.float64))

    def forward(self, z: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.theta


def test_the_gradient_is_unbiased_and_the_baseline_lowers_its_variance() -> None:
    """One step to x ~ N(theta, std^2), f(x) = x^2: the mean is d E f = 2 theta, the variance 10.7 or 5.5."""
    torch.manual_seed(0)
    theta, std, n = 0.7, 0.4, 400_000
    policy = Fixed(theta, n)
    chain = DDPMChain(policy, COSINE, 1, std)  # type: ignore[arg-type]
    states = chain.run(torch.zeros(n, 1, dtype=torch.float64))
    f, k = states[1, :, 0] ** 2, torch.zeros(n, dtype=torch.long)
    (score,) = torch.autograd.grad(chain.logp(states[0], states[1], k).sum(), policy.theta)
    values = {}
    for name, baseline in (("plain", 0.0), ("value", theta**2 + std**2)):
        g = (f - baseline) * score[:, 0]
        assert abs(g.mean() - 2 * theta) < 3 * g.std() / n**0.5
        values[name] = g.var().item()
    assert values["plain"] == pytest.approx(10.7, abs=0.3) and values["value"] == pytest.approx(5.5, abs=0.2)


def test_the_density_of_the_sampled_chain() -> None:
    """logp of the stored moves is that of their noise, a mean over the pixels."""
    chain = DDPMChain(toy().double(), COSINE, 4, 1e-3)
    like = torch.zeros(50, 2, dtype=torch.float64)
    torch.manual_seed(1)
    states = chain.run(like)
    torch.manual_seed(1)
    assert torch.equal(states[0], torch.randn_like(like))
    for move in range(4):
        xi = torch.randn_like(like)
        wanted = (-0.5 * xi**2 - chain.std[move].log() - 0.5 * math.log(2 * math.pi)).mean(1)
        values = chain.logp(states[move], states[move + 1], torch.full((50,), move))
        torch.testing.assert_close(values.double(), wanted, atol=1e-6, rtol=1e-6)


def test_the_chain_is_ddpm() -> None:
    student, noise = toy().double(), [torch.randn(9, 2, dtype=torch.float64) for _ in range(5)]
    chain, draws = DDPMChain(student, COSINE, 4, 1e-9), iter(noise[1:])
    wanted = walk(DDPM(), student, noise[0], Trailing()(COSINE, 4), lambda: next(draws))
    z = noise[0]
    for move in range(4):
        k = torch.full((9,), move)
        z = chain.mean(z, k) + chain.std[move] * noise[move + 1]
    torch.testing.assert_close(z, wanted, atol=1e-8, rtol=1e-8)


def test_a_constant_critic_teaches_nothing() -> None:
    """The mean of the score is zero, at every move."""
    n = 20_000
    torch.manual_seed(2)
    policy = Fixed(0.3, n)
    chain = DDPMChain(policy, COSINE, 3, 0.1)  # type: ignore[arg-type]
    states = chain.run(torch.zeros(n, 1, dtype=torch.float64))
    for move in range(3):
        k = torch.full((n,), move)
        (score,) = torch.autograd.grad(chain.logp(states[move], states[move + 1], k).sum(), policy.theta)
        assert abs(score.mean()) < 3.5 * score.std() / n**0.5
        assert score.std().item() == pytest.approx(chain.x0_scale[move].item() / chain.std[move].item(), rel=0.03)


def test_picks_are_different_moves_of_each_chain() -> None:
    torch.manual_seed(3)
    k = random_moves(500, 5, 3).view(3, 500)
    assert all(len(set(column.tolist())) == 3 for column in k.T)
    assert (torch.bincount(k.flatten(), minlength=5) - 300).abs().max() < 60


def test_only_steep_critics_are_penalised() -> None:
    class Plane(nn.Module):
        def __init__(self, slope: float) -> None:
            super().__init__()
            self.slope = slope

        def forward(self, x: Tensor, t: float, label: Tensor | None = None) -> Tensor:
            return self.slope * x[:, :1]

    x = torch.randn(8, 2)
    assert gradient_penalty(Plane(0.9), x, x + 1).item() == 0
    assert gradient_penalty(Plane(3.0), x, x + 1).item() == pytest.approx(4.0)


def test_one_fresh_set_of_chains_a_step_shared_by_three(tmp_path: Path) -> None:
    """The chains of the policy's present weights; the critic's verdict on them; the same for value and policy."""
    job = task(tmp_path, batch_size=64)
    taken: dict[str, Any] = {}
    job.fit = lambda name, modules, **options: (
        taken.update({p.name: p for p in modules})
        or {  # type: ignore[method-assign]
            "student": taken["student"].module
        }
    )
    SFTPG(steps=4, last=0.05).distill(job)
    assert list(taken) == ["critic", "value", "student"]
    batch = job.batches[0]
    first = None
    for _ in range(2):
        for name in taken:
            loss = taken[name].loss(batch)
            loss.backward()
            assert loss.isfinite() and loss.ndim == 0
            if name == "critic":
                chain = batch["chain"]
                assert chain.shape == (5, 64, 2) and not chain.requires_grad
                assert first is None or not torch.equal(first, chain)
                assert all(p.grad is None for p in taken["student"].module.parameters())
            else:
                assert batch["chain"] is chain
        first = chain
        assert batch["advantage"].shape == (128,) and not batch["advantage"].requires_grad
        grads = [p.grad for p in taken["student"].module.parameters() if p.grad is not None]
        assert sum(g.norm() for g in grads) > 0
        taken["student"].module.zero_grad(set_to_none=True)


def test_four_steps_on_the_mixture(tmp_path: Path) -> None:
    method = SFTPG(steps=4, picks=4, last=0.05, balance=True, penalty=0.3, lr=2e-4, critic_lr=5e-3, value_lr=5e-3)
    student = method.distill(task(tmp_path, 100, batch_size=512))
    values = energy(sample(student, 3000), truth())
    teacher = energy(sample(Student(toy(), "ddpm", "trailing", 4), 3000), truth())
    assert teacher > 0.015 and values < 0.5 * teacher, (values, teacher)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"picks": 0}, {"last": 0.0}, {"bound": "norm"}])
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="sft_pg"):
        SFTPG(**wrong)
