"""Guided distillation: stage one, deterministic and stochastic students, and the guidance scale as an input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.distillers import Student
from hasten.distillers._targets import noised
from hasten.distillers.guided import GuidedDistillation
from hasten.errors import BadInput
from hasten.guides.cfg import CFG, with_step_count
from hasten.nets.unet import UNet
from hasten.predictions import V
from hasten.schedules import VPCosine
from tests.distillers._toy import Exact, energy, mixture, proportional, sample, task, toy


def unet(**more: Any) -> UNet:
    torch.manual_seed(0)
    net = UNet(1, widths=(8, 16), classes=3, patch=1, **more)
    for p in net.parameters():  # what starts at zero would hide everything
        nn.init.normal_(p, std=0.1)
    return net


def test_a_student_starts_as_the_conditional_teacher_at_every_scale(tmp_path: Path) -> None:
    teacher = Denoiser(unet(), VPCosine(offset=0.0), V())
    job = replace(task(tmp_path), denoiser=teacher, teacher=teacher)
    student = job.student(guidance=(1.0, 5.0))
    x, t = torch.randn(6, 1, 8, 8), torch.linspace(0, 1, 6, dtype=torch.float64)
    label, scale = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1.0, 1.7, 2.0, 3.3, 4.1, 5.0])
    assert torch.equal(student(x, t, label=label, guidance=scale), teacher(x, t, label=label))
    assert student.guidance_range == (1.0, 5.0) and teacher.guidance_range is None


def test_a_network_at_a_fixed_scale_equals_it_at_that_scale() -> None:
    net = unet(guidance=(1.0, 5.0))
    x, t, label = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 3])
    fixed = net.fixed(2.5)
    assert torch.allclose(fixed(x, t, label), net(x, t, label, guidance=torch.full((4,), 2.5)), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(fixed(x, t, label), net(x, t, label, guidance=torch.full((4,), 1.5)), atol=1e-2)
    assert fixed.guidance_range is None
    with pytest.raises(ValueError, match="needs guidance"):
        net(x, t, label)
    with pytest.raises(ValueError, match="takes no guidance"):
        fixed(x, t, label, guidance=torch.ones(4))


class Perfect(nn.Module):
    """The exact student of stage one: the guided mixture with the scale as an input."""

    guidance_range = (1.0, 5.0)

    def __init__(self, exact: Exact) -> None:
        super().__init__()
        self.exact, self.schedule, self.null_label = exact, exact.schedule, 3

    def forward(self, x: Tensor, t: Tensor, label: Tensor, guidance: Tensor) -> Tensor:
        both, t = torch.cat([label, torch.full_like(label, 3)]), torch.as_tensor(t).expand(len(x))
        of_class, of_all = self.exact(torch.cat([x, x]), torch.cat([t, t]), label=both).chunk(2)
        return of_all + guidance[:, None].double() * (of_class - of_all)


def test_the_exact_merged_student_draws_what_the_guided_teacher_draws() -> None:
    exact, label = mixture(), proportional(50)
    for scale in (1.0, 2.0, 4.5):
        student = Student(CFG(scale).wrap(Perfect(exact)), "ddim", "trailing", 8)  # type: ignore[arg-type]
        teacher = Student(CFG(scale).wrap(exact), "ddim", "trailing", 8)  # type: ignore[arg-type]
        a, b = (sample(s, 50, label=label) for s in (student, teacher))
        assert torch.allclose(a, b.to(a.dtype), atol=1e-5)


def test_students_of_both_kinds_follow_the_teacher_over_the_scales(tmp_path: Path) -> None:
    students: dict[str, Student] = {}
    job = task(tmp_path, steps=150, save_student=students.__setitem__)
    GuidedDistillation(steps=(2,), start=16, guidance=(1.0, 3.0), lr=1e-3).distill(job)
    assert list(students) == ["guidance", "steps2"]
    base = toy()
    for scale in (1.0, 2.0):
        guided = CFG(scale).wrap(base)
        reference = sample(Student(guided, "ddim", "trailing", 64), 3000, seed=50_000)  # type: ignore[arg-type]
        plain = energy(sample(Student(guided, "ddim", "trailing", 2)), reference)  # type: ignore[arg-type]
        two = replace(students["steps2"], denoiser=CFG(scale).wrap(students["steps2"].denoiser))
        assert 4 * energy(sample(two), reference) < plain


def test_one_network_serves_several_counts_of_steps(tmp_path: Path) -> None:
    students: dict[str, Student] = {}
    job = task(tmp_path, steps={"guidance": 80, "shared": 200}, save_student=students.__setitem__)
    last = GuidedDistillation(steps=(4, 2, 1), start=16, guidance=(1.0, 2.0), lr=1e-3, shared=True).distill(job)
    assert list(students) == ["guidance", "shared"] and last.steps == 4 and last.denoiser.step_counts == (4, 2, 1)
    guided = CFG(1.5).wrap(toy())
    reference = sample(Student(guided, "ddim", "trailing", 64), 3000, seed=50_000)  # type: ignore[arg-type]
    for n in (4, 2, 1):
        plain = energy(sample(Student(guided, "ddim", "trailing", n)), reference)  # type: ignore[arg-type]
        student = replace(last, denoiser=with_step_count(CFG(1.5).wrap(last.denoiser), n), steps=n)  # type: ignore[arg-type]
        assert 2.5 * energy(sample(student), reference) < plain, n
    with pytest.raises(BadInput, match="4, 2, 1 steps, asked for 8"):
        with_step_count(last.denoiser, 8)


def test_one_and_two_steps_get_their_shares_of_the_images() -> None:
    counts = torch.bincount(GuidedDistillation(steps=(8, 4, 2, 1), last=3, shared=True).assign_counts(800), minlength=4)
    assert torch.allclose(counts.double(), 800 * torch.tensor([1, 1, 3, 3]).double() / 8, atol=1.01), counts


def test_the_unet_takes_its_count_of_steps() -> None:
    net = unet(steps=(4, 1))
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    four, one = (net(x, t, steps=torch.full((2,), n)) for n in (4, 1))
    mixed = net(x, t, steps=torch.tensor([4, 1]))
    assert torch.allclose(mixed[0], four[0], atol=1e-6) and torch.allclose(mixed[1], one[1], atol=1e-6)
    assert not torch.allclose(four, one, atol=1e-3)
    with pytest.raises(ValueError, match="takes \\(4, 1\\) steps"):
        net(x, t, steps=torch.full((2,), 2))
    with pytest.raises(ValueError, match="needs steps="):
        net(x, t)


def test_the_scale_matters_to_the_student(tmp_path: Path) -> None:
    job = task(tmp_path, steps=150)
    merged = GuidedDistillation(guidance=(1.0, 3.0), lr=3e-3).merged(job)
    batch = job.batches[1000]
    label, t = batch["label"], torch.full((256,), 0.6, dtype=torch.float64)
    z = noised(job.schedule, batch["x"], t, torch.randn(256, 2, generator=torch.Generator().manual_seed(0)))
    errors = []
    for scale in (1.0, 2.0, 3.0):
        want = CFG(scale).wrap(toy())(z, t, label=label)
        predictions = [merged(z, t, label=label, guidance=torch.full((256,), s)) for s in (1.0, 2.0, 3.0)]
        errors.append([(x - want).square().mean().item() for x in predictions])
    for k, row in enumerate(errors):
        assert row[k] == min(row), errors


def recorded(
    job: Any, kind: str, n: int, m: int, method: GuidedDistillation
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Times of the teacher's evaluations in a loss, the student's times, its targets, and the teacher's predictions."""
    exact, evaluated, predictions = mixture(), [], []

    class Teacher(Perfect):
        def forward(self, x: Tensor, t: Tensor, label: Tensor, guidance: Tensor) -> Tensor:
            evaluated.append(t)
            predictions.append(super().forward(x, t, label, guidance))
            return predictions[-1]

    seen: dict[str, Tensor] = {}
    student = job.student(guidance=(1.0, 5.0))
    original = student.raw

    def raw(z: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        seen["t"] = t
        return original(z, t, **cond)

    student.raw = raw  # type: ignore[method-assign]
    loss_fn = method.deterministic_loss if kind == "deterministic" else method.stochastic_loss
    from hasten.distillers import guided as module

    targets: list[Tensor] = []
    paths = {name: getattr(module, name) for name in ("ddim_path", "midpoint_path")}

    def watched(inner: Any) -> Any:
        def path(*args: Any, **cond: Any) -> Any:
            end, target = inner(*args, **cond)
            targets.append(target)
            return end, target

        return path

    for name, path in paths.items():
        setattr(module, name, watched(path))
    try:
        torch.manual_seed(0)
        loss_fn(job, Teacher(exact), student, n, m)(job.batches[0])  # type: ignore[arg-type]
    finally:
        for name, path in paths.items():
            setattr(module, name, path)
    return evaluated, seen["t"], targets[0], torch.stack(predictions)


def test_the_stochastic_loss_takes_double_steps_and_one_from_the_last_node(tmp_path: Path) -> None:
    job, n = task(tmp_path), 4
    evaluated, t, target, predictions = recorded(
        job, "stochastic", n, 2, GuidedDistillation(steps=(8, 4), kind="stochastic")
    )
    assert sorted(set(t.tolist())) == [k / n for k in range(1, n + 1)]
    last = t == 1 / n
    assert len(evaluated) == 2  # two steps of 1/N of a teacher that jumps 1/N
    assert torch.equal(evaluated[0], t) and torch.equal(evaluated[1][~last], t[~last] - 1 / n)
    assert torch.equal(evaluated[1][last], t[last])  # the step before it had no length
    assert torch.allclose(target[last].double(), predictions[1][last], atol=1e-6)
    assert not torch.allclose(target[~last].double(), predictions[1][~last], atol=1e-2)


def test_the_deterministic_loss_takes_steps_of_half_the_length(tmp_path: Path) -> None:
    evaluated, t, _, _ = recorded(task(tmp_path), "deterministic", 4, 2, GuidedDistillation(steps=(8, 4)))
    assert len(evaluated) == 2 and torch.equal(evaluated[0], t) and torch.equal(evaluated[1], t - 1 / 8)
    assert sorted(set(t.tolist())) == [k / 4 for k in range(1, 5)]


def test_the_first_student_may_learn_from_steps_of_second_order(tmp_path: Path) -> None:
    evaluated, t, _, _ = recorded(
        task(tmp_path), "deterministic", 4, 2, GuidedDistillation(steps=(4, 2), start=8, order=2)
    )
    assert [torch.equal(a, t - k / 16) for k, a in enumerate(evaluated)] == [True] * 4  # each step, and its middle
    evaluated, t, _, _ = recorded(
        task(tmp_path), "deterministic", 2, 2, GuidedDistillation(steps=(4, 2), start=8, order=2)
    )
    assert len(evaluated) == 2  # a student of few steps is evaluated where it was trained
    with pytest.raises(BadInput, match="order must be 1 or 2"):
        GuidedDistillation(order=3)


def test_a_scale_out_of_range_is_refused_with_the_range() -> None:
    student = Denoiser(unet(guidance=(1.0, 5.0)), VPCosine(offset=0.0), V())
    with pytest.raises(BadInput, match="guidance_scale 1 to 5, asked for 6"):
        CFG(6.0).wrap(student)
    one = Denoiser(unet(), VPCosine(offset=0.0), V(), guidance_range=(2.0, 2.0))
    assert CFG(2.0).wrap(one) is one
    with pytest.raises(BadInput, match="guidance_scale 2 only"):
        CFG(1.0).wrap(one)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="stochastic"):
        GuidedDistillation(kind="stochastik")
    with pytest.raises(BadInput, match="low < high"):
        GuidedDistillation(guidance=(2.0, 2.0))
    plain = Denoiser(nn.Linear(2, 2), VPCosine(offset=0.0), V())
    with pytest.raises(BadInput, match="null label"):
        GuidedDistillation().distill(replace(task(tmp_path), denoiser=plain))
