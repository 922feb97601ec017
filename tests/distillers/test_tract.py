"""TRACT: the composed jump against exact flow, the self-teacher's part in it, and what it learns."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.distillers._ema_target import EMATarget
from hasten.distillers._targets import ddim_path, ddim_step, jump_target, time_nodes
from hasten.distillers.tract import Tract, two_step_target
from hasten.errors import BadInput
from hasten.exact import Gaussian
from hasten.schedules import Flow, Schedule, VPCosine, VPLinear
from hasten.times import Trailing
from tests.distillers import _toy as toy

F64 = torch.float64


class Interrupted:
    """Batches that send this process SIGINT when batch `at` is first read."""

    def __init__(self, batches: Any, at: int) -> None:
        self.batches, self.at, self.batch_size = batches, at, batches.batch_size

    def __getitem__(self, k: int) -> Any:
        if k == self.at:
            self.at = -1
            os.kill(os.getpid(), signal.SIGINT)
        return self.batches[k]


def assert_resumes_exactly(method: Any, out: Path, steps: int = 12, at: int = 7) -> None:
    """A run that is stopped in its first stage and started again ends with the weights of one that was not."""
    whole = method.distill(toy.task(out / "whole", steps)).denoiser.state_dict()
    task = toy.task(out / "cut", steps)
    task.batches = Interrupted(task.batches, at)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        method.distill(task)
    resumed = method.distill(toy.task(out / "cut", steps)).denoiser.state_dict()
    again = method.distill(toy.task(out / "cut", steps)).denoiser.state_dict()
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]) and torch.equal(value, again[key]), key


@pytest.mark.parametrize("schedule", [VPCosine(offset=0.0), VPLinear(), Flow()], ids=lambda s: type(s).__name__)
def test_exact_steps_compose_to_the_exact_flow(schedule: Schedule) -> None:
    """An exact step and an exact jump of the self-teacher: the target's own step lands on the flow, from all 8 places of
    both segments of a phase 16 -> 2."""
    exact = Gaussian(torch.tensor([0.3, -0.5]), torch.tensor([0.4, 0.05]), schedule)
    nodes = time_nodes(Trailing(), schedule, 16)
    g = torch.Generator().manual_seed(0)
    for end in (0, 8):
        for i in range(end + 1, end + 9):
            z = torch.randn(32, 2, generator=g, dtype=F64)
            t, middle, e = (nodes[k].expand(32) for k in (i, i - 1, end))

            def teacher(z: Tensor, t: Tensor) -> Tensor:
                return jump_target(schedule, z, exact.endpoint(z, t, middle), t, middle)

            def itself(z: Tensor, t: Tensor) -> Tensor:
                if i - 1 == end:  # it must not matter
                    return torch.full_like(z, torch.nan)
                return jump_target(schedule, z, exact.endpoint(z, t, e), t, e)

            target = two_step_target(teacher, itself, schedule, z, t, middle, e)
            landed = ddim_step(schedule, z, target, t, e)
            torch.testing.assert_close(landed, exact.endpoint(z, t, e), rtol=0, atol=1e-9)


def test_the_target_is_that_of_the_plain_steps() -> None:
    """With the same function as teacher and as itself it is progressive distillation's target of these two steps."""
    exact, schedule = toy.mixture(), VPCosine(offset=0.0)
    nodes = time_nodes(Trailing(), schedule, 12)
    i = torch.arange(1, 13)
    end = (i - 1) // 4 * 4
    z = torch.randn(12, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    target = two_step_target(exact, exact, schedule, z, nodes[i], nodes[i - 1], nodes[end])
    for k in range(12):
        times = [nodes[j][None] for j in dict.fromkeys([int(i[k]), int(i[k]) - 1, int(end[k])])]
        _, plain = ddim_path(exact, schedule, z[k : k + 1], times)
        torch.testing.assert_close(target[k : k + 1], plain, rtol=1e-10, atol=1e-10)


def test_only_nodes_inside_a_segment_are_evaluated(tmp_path: Path) -> None:
    """The teacher is evaluated at every node but the clean one; the step goes to the end below, of 2 segments of 4."""
    evaluated: list[Tensor] = []
    task = toy.task(tmp_path)

    def teacher(z: Tensor, t: Tensor, **cond: Any) -> Tensor:
        evaluated.append(t)
        return torch.zeros_like(z)

    target = EMATarget(task.student())
    ends: list[Tensor] = []
    target.copy.forward = lambda z, t, **cond: (ends.append(t), torch.zeros_like(z))[1]  # type: ignore[assignment,func-returns-value]
    torch.manual_seed(0)
    Tract(phases=(8, 2)).loss_fn(task, teacher, target, 2, 4)(task.batches[0])
    i = (evaluated[0] * 8).round().long()
    assert i.unique().tolist() == list(range(1, 9))
    assert torch.equal((ends[0] * 8).round().long(), i - 1)


def test_the_shadow_is_the_corrected_average() -> None:
    """After n steps it is the mean of the weights after step 1 .. n with weights m^(n - k), the first ones forgotten."""
    target = EMATarget(toy.toy())
    weight = target.student.net.out.weight
    weight.requires_grad_(True)
    target.train()
    assert not target.copy.training and not any(p.requires_grad for p in target.copy.parameters())
    before = weight.detach().clone()
    seen = []
    for n in range(5):
        assert target.update(0.5) == n
        if n == 0:
            assert torch.equal(target.copy.net.out.weight, before)
        else:
            shares = torch.tensor([0.5 ** (n - 1 - k) for k in range(n)])
            wanted = sum(s * w for s, w in zip(shares / shares.sum(), seen))
            torch.testing.assert_close(target.copy.net.out.weight, wanted)
        with torch.no_grad():
            weight.add_(torch.randn_like(weight))
        seen.append(weight.detach().clone())
    assert int(target.state_dict()["count"]) == 5


def test_a_stopped_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    assert_resumes_exactly(Tract(phases=(8, 2, 1)), tmp_path)


def test_the_student_is_far_better_than_its_teacher_at_its_steps(tmp_path: Path) -> None:
    saved = []
    student = Tract(phases=(32, 4, 1), lr=1e-3).distill(
        toy.task(tmp_path, 75, save_student=lambda name, each: saved.append((name, each)))
    )
    assert [name for name, _ in saved] == ["steps4", "steps1"] and student is saved[-1][1]
    true = toy.truth(2000)
    for (_, each), bar in zip(saved, (0.008, 0.012)):
        teacher = dataclasses.replace(each, denoiser=toy.toy())
        distance, plain = (toy.energy(toy.sample(s), true) for s in (each, teacher))
        assert distance < bar < plain / 1.5, (each.steps, distance, plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"phases": (8,)}, "the teacher's steps first"),
        ({"phases": (8, 3)}, "divisor"),
        ({"phases": (8, 2, 2)}, "divisor"),
        ({"momentum": 1.0}, "momentum"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Tract(**options)
