"""Fine-tuning by MMD: the estimator, its gradient, its sampler, and what is learnt."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.distillers._features import trained_classifier
from hasten.distillers.mmd import Mmd, ddim_sample, mmd2
from hasten.errors import BadInput
from hasten.metrics.kid import polynomial_mmd2
from hasten.nets.classifier import Classifier
from hasten.samplers import DDIM
from hasten.sampling import walk
from hasten.times import Trailing
from tests.distillers import _toy as toy

F64 = torch.float64


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---- the estimator ----


def test_it_is_unbiased() -> None:
    """Over 2000 pairs of samples of 64 of one distribution in 8 dimensions its mean is 0 within 4 errors, that of the estimate
    with the diagonals is not, by .26."""
    x, y = normals(2, 2000, 64, 8)
    values = torch.stack([mmd2(a, b) for a, b in zip(x, y)])
    error = float(values.std()) / 2000**0.5
    assert error < 0.002 and abs(float(values.mean())) < 4 * error
    assert bool((values < 0).any())
    k = lambda a, b: (a @ b.transpose(1, 2) / 8 + 1) ** 3  # noqa: E731
    biased = (k(x, x) + k(y, y) - 2 * k(x, y)).mean((1, 2))
    assert float(biased.mean()) == pytest.approx(0.26, abs=0.02)


def test_it_is_the_metric_of_the_same_name() -> None:
    x, y = normals(30, 5), 0.5 + normals(20, 5, seed=1)
    assert float(mmd2(x, y)) == pytest.approx(polynomial_mmd2(x, y), rel=1e-9)


def test_a_linear_kernel_sees_the_means() -> None:
    """Degree 1: |difference of means|^2 / D, which is 1 for a shift of 1 in every dimension; scale replaces D."""
    x, y = normals(1500, 8), 1 + normals(1500, 8, seed=1)
    exact = float((x.mean(0) - y.mean(0)).square().mean())
    assert float(mmd2(x, y, "linear")) == pytest.approx(exact, abs=0.005) == pytest.approx(1.0, abs=0.1)
    assert float(mmd2(x, y, "linear", scale=2.0)) == pytest.approx(4 * exact, abs=0.02)


def test_the_gaussian_kernel_of_shifted_gaussians() -> None:
    """In 1 dimension with scale 1: E k = (1 + 4)^-1/2 exp(-m^2 / (1 + 4)) for means m apart, deviations 1."""
    x, y = normals(1500, 1), 1 + normals(1500, 1, seed=1)
    wanted = 2 * 5**-0.5 * (1 - torch.exp(torch.tensor(-0.2)))
    assert float(mmd2(x, y, "rbf")) == pytest.approx(float(wanted), abs=0.02)


@pytest.mark.parametrize("kernel", ["cubic", "rbf"])
def test_its_gradient_is_the_difference_quotient(kernel: str) -> None:
    x, y = normals(12, 4), 0.3 + normals(9, 4, seed=1)
    y.requires_grad_(True)
    (gradient,) = torch.autograd.grad(mmd2(x, y, kernel), y)
    y = y.detach()
    for k in range(4):
        step = torch.zeros_like(y)
        step[3, k] = 1e-6
        quotient = (mmd2(x, y + step, kernel) - mmd2(x, y - step, kernel)) / 2e-6
        assert float(gradient[3, k]) == pytest.approx(float(quotient), rel=1e-5, abs=1e-9)


def test_an_affine_generator_finds_mean_and_scale() -> None:
    """G(e) = m + s e on N(1, .5^2): by gradient descent on the estimate, from m = 0 and s = 1."""
    m, s = torch.zeros(1, dtype=F64, requires_grad=True), torch.ones(1, dtype=F64, requires_grad=True)
    optimiser = torch.optim.Adam([m, s], 0.03)
    g = torch.Generator().manual_seed(0)
    for k in range(300):
        optimiser.param_groups[0]["lr"] = 0.03 * (1 - k / 300)
        x, e = torch.randn(2, 256, 1, generator=g, dtype=F64)
        optimiser.zero_grad()
        mmd2(1 + 0.5 * x, m + s * e).backward()
        optimiser.step()
    assert m.item() == pytest.approx(1, abs=0.05) and s.item() == pytest.approx(0.5, abs=0.05)


# ---- the sampler, the loss ----


def test_it_trains_through_the_recommended_sampler() -> None:
    denoiser, times = toy.toy(), Trailing()(toy.toy().schedule, 3)
    z, label = normals(16, 2).float(), torch.arange(16) % 3
    wanted = walk(DDIM(), denoiser, z, times, label=label)
    torch.testing.assert_close(
        ddim_sample(denoiser, denoiser.schedule, z, times, {"label": label}), wanted, rtol=0, atol=1e-5
    )


def test_evaluating_again_changes_no_gradient() -> None:
    """Each step is reached by the gradient, with and without keeping activations."""
    measured = []
    z, label = normals(16, 2).float(), torch.arange(16) % 3
    for again in (False, True):
        student = toy.toy().requires_grad_(True)
        samples = ddim_sample(student, student.schedule, z, Trailing()(student.schedule, 3), {"label": label}, again)
        samples.square().mean().backward()
        measured.append([p.grad for p in student.net.parameters() if p.grad is not None])
    assert len(measured[0]) == len(measured[1]) > 5
    for one, two in zip(*measured):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_the_anchor_holds_the_output(tmp_path: Path) -> None:
    """For an unchanged student the anchor is 0, for a moved one anchor times its mean square distance."""
    task = toy.task(tmp_path)
    student = task.student()
    losses = {}
    for anchor in (0.0, 2.0):
        loss_fn = Mmd(steps=2, anchor=anchor).loss_fn(task, nn.Identity(), student)
        for moved in (0.0, 0.5):
            with torch.no_grad():
                student.net.out.bias.copy_(task.denoiser.net.out.bias + moved)
            torch.manual_seed(0)
            losses[anchor, moved] = loss_fn(task.batches[0]).item()
    assert losses[2.0, 0.0] == pytest.approx(losses[0.0, 0.0], abs=1e-9)
    # v is moved by .5: x0 by -.5 sigma, of which the last step, at t = 1/2, keeps .5 sin(pi/4) and more
    assert losses[2.0, 0.5] - losses[0.0, 0.5] > 2 * (0.5 * 0.7) ** 2


# ---- the classifier ----


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 7), (5,)])
def test_a_classifier(shape: tuple[int, ...]) -> None:
    net = Classifier(shape, 4, width=8)
    x = torch.randn(3, *shape)
    features, logits = net(x)
    assert features.shape == (3, 32) and logits.shape == (3, 4)
    assert torch.equal(features, net.features(x)) and torch.equal(logits, net.head(features))
    # no statistics of the batch: a sample alone has the same features
    torch.testing.assert_close(net(x[:1])[0], features[:1], rtol=1e-4, atol=1e-5)
    assert Classifier(**net.config).load_state_dict(net.state_dict())
    with pytest.raises(ValueError, match="classes"):
        Classifier(shape, 0)


def test_the_classifier_stage(tmp_path: Path) -> None:
    """It learns the task's labels, is a stage of its own, and is not trained again."""
    task = toy.task(tmp_path, 100)
    net = trained_classifier(task, 0.1, width=8)
    assert task.completed_stages == ["classifier"] and not any(p.requires_grad for p in net.parameters())
    batch = toy.Draws(2000, seed=5)[0]
    measured = float((net(batch["x"])[1].argmax(1) == batch["label"]).float().mean())
    assert measured > 0.97
    again = trained_classifier(toy.task(tmp_path, 100), 0.1, width=8)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))


def test_a_classifier_needs_labels(tmp_path: Path) -> None:
    task = toy.task(tmp_path)
    task.batches = [{"x": torch.zeros(4, 2)}]  # type: ignore[assignment]
    with pytest.raises(BadInput, match="labels"):
        Mmd().distill(task)


# ---- training ----


def test_the_student_is_far_better_than_before_at_its_steps(tmp_path: Path) -> None:
    task = toy.task(tmp_path, 80)
    student = Mmd(steps=2, kernel="rbf", width=8, lr=1e-3).distill(task)
    assert task.completed_stages == ["classifier", "mmd"] and student.steps == 2
    true = toy.truth(2000)
    before = dataclasses.replace(student, denoiser=toy.toy())
    measured, plain = (toy.energy(toy.sample(s), true) for s in (student, before))
    assert measured < 0.01 < plain / 3, (measured, plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": "classifer"}, "classifier"),
        ({"kernel": "cubc"}, "cubic"),
        ({"steps": 0}, "steps"),
        ({"anchor": -1.0}, "anchor"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Mmd(**options)
