"""Feature distillation: the divergence, the terms beside it, the target, and what is learnt."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.distillers._features import random_classifier
from hasten.distillers._targets import prediction_loss
from hasten.distillers.progressive import Progressive
from hasten.distillers.rcfd import Rcfd, class_balance, feature_divergence
from hasten.errors import BadInput
from tests.distillers import _toy as toy

F64 = torch.float64


def features(seed: int, rows: int = 16, width: int = 64) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_the_divergence_is_least_at_the_sharpened_features() -> None:
    """Zero, with zero gradient, where phi_S = phi_T / tau + a constant; not at phi_S = phi_T."""
    wanted = features(0)
    for student, least in ((wanted / 0.9 + 7, True), (wanted, False)):
        student = student.clone().requires_grad_(True)
        value = feature_divergence(wanted, student, 0.9)
        (gradient,) = torch.autograd.grad(value, student)
        if least:
            assert abs(value.item()) < 1e-14 and float(gradient.abs().max()) < 1e-14
        else:
            assert 1e-3 < float(value) < 1e-2 and float(gradient.abs().max()) > 1e-5
    assert float(feature_divergence(wanted, features(1), 0.9)) > 0.5


def test_the_divergence_in_plain_terms() -> None:
    teacher, student = features(0), features(1)
    p, q = torch.softmax(teacher / 0.8, 1), torch.softmax(student, 1)
    assert float(feature_divergence(teacher, student, 0.8)) == pytest.approx(
        float((p * (p / q).log()).sum(1).mean()), rel=1e-12
    )


def test_the_balance_terms() -> None:
    """Entropy in [0, log K], diversity in [-log K, 0]; both 0 for a batch of one image of a sure class."""
    K = 5
    sure, even = 200 * torch.eye(K, dtype=F64), torch.zeros(K, K, dtype=F64)
    entropy, diversity = (lambda x: float(class_balance(x, 1.0))), (lambda x: float(class_balance(x, 0.0)))
    assert entropy(sure) == pytest.approx(0, abs=1e-12) and diversity(sure) == pytest.approx(-math.log(K))
    assert entropy(even) == pytest.approx(math.log(K)) and diversity(even) == pytest.approx(-math.log(K))
    assert entropy(sure[:1]) == pytest.approx(0, abs=1e-12) and diversity(sure[:1]) == pytest.approx(0, abs=1e-12)
    some = features(2, 8, K)
    assert 0 < entropy(some) < math.log(K) and -math.log(K) < diversity(some) < 0
    assert float(class_balance(some, 0.75)) == pytest.approx(0.75 * entropy(some) + 0.25 * diversity(some))
    # sure of its classes and of all of them: the best there is
    assert float(class_balance(sure, 0.75)) < min(
        float(class_balance(even, 0.75)), float(class_balance(sure[:1].expand(5, K), 0.75))
    )


def test_the_terms_of_the_loss(tmp_path: Path) -> None:
    """The pixel term is progressive distillation's own loss, on the same draws; the others leave the teacher alone."""
    task = toy.task(tmp_path)
    student, net = task.student(), random_classifier(task, 8).requires_grad_(False)
    batch = task.batches[0]

    def value(method: Rcfd) -> Tensor:
        torch.manual_seed(1)
        return method.loss_fn(task, net, task.teacher, student, 2, 2)(batch)

    bare = value(Rcfd(pixel=0.0, beta=0.0))
    torch.manual_seed(1)
    plain = Progressive().loss_fn(task, task.teacher, student, 2, 2)(batch)
    torch.testing.assert_close(value(Rcfd(pixel=0.5, beta=0.0)) - bare, 0.5 * plain, rtol=1e-3, atol=1e-7)
    more = value(Rcfd(pixel=0.0, beta=0.1, gamma=1.0)) - bare
    assert 0 < more.item() < 0.1 * math.log(3) + 1e-6
    bare.backward()
    assert all(p.grad is None for p in task.teacher.parameters()) and all(p.grad is None for p in net.parameters())
    assert float(student.net.out.weight.grad.abs().max()) > 0


def test_the_feature_term_is_least_at_the_target(tmp_path: Path) -> None:
    """tau = 1, no other term: a student that predicts x* has no loss; one slightly off has."""
    task = toy.task(tmp_path)
    net = random_classifier(task, 8).requires_grad_(False)
    method = Rcfd(pixel=0.0, beta=0.0, tau=1.0)
    student = task.student()
    with torch.no_grad():  # the student as the teacher: m = 1, so x* is its own prediction
        torch.manual_seed(0)
        same = float(method.loss_fn(task, net, task.denoiser, student, 4, 1)(task.batches[0]))
        student.net.out.bias.add_(0.3)
        torch.manual_seed(0)
        off = float(method.loss_fn(task, net, task.denoiser, student, 4, 1)(task.batches[0]))
    assert abs(same) < 1e-9 < 1e-5 < off


def test_the_student_is_far_better_than_its_teacher_at_its_steps(tmp_path: Path) -> None:
    saved: list[Any] = []
    task = toy.task(tmp_path, 50, save_student=lambda name, result: saved.append((name, result)))
    student = Rcfd(steps=(4, 1), start=16, width=8, lr=1e-3).distill(task)
    assert task.completed_stages == ["classifier", "steps4", "steps1"] and student is saved[-1][1]
    true = toy.truth(2000)
    for (_, result), bar in zip(saved, (0.009, 0.03)):
        teacher = dataclasses.replace(result, denoiser=toy.toy())
        value, plain = (toy.energy(toy.sample(s), true) for s in (result, teacher))
        assert value < bar < plain / 1.5, (result.steps, value, plain)


def test_plain_stages_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Students of at least `plain` steps are progressive distillation's."""
    calls: list[tuple[str, int]] = []

    def zero(student: Any) -> Any:
        def loss_fn(batch: dict[str, Tensor]) -> Tensor:
            x, t = batch["x"], torch.full((len(batch["x"]),), 0.5, dtype=F64)
            return prediction_loss(student, x, t, x, label=batch["label"])

        return loss_fn

    monkeypatch.setattr(
        Progressive,
        "loss_fn",
        lambda self, task, teacher, student, n, m: (calls.append(("plain", n)), zero(student))[1],
    )
    monkeypatch.setattr(
        Rcfd,
        "loss_fn",
        lambda self, task, net, teacher, student, n, m: (calls.append(("features", n)), zero(student))[1],
    )
    Rcfd(steps=(8, 4, 2), plain=4, width=8).distill(toy.task(tmp_path, 1))
    assert calls == [("plain", 8), ("plain", 4), ("features", 2)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": (8, 3)}, "divisor"),
        ({"tau": 0.0}, "tau"),
        ({"gamma": 1.5}, "gamma"),
        ({"steps": (16, 8)}, "use progressive"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Rcfd(**options)
