"""One evaluation that does what the teacher's sampler does, against maps in closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.distillers import DistillTask, Student
from hasten.distillers.denoising_student import DenoisingStudent, generate, one_step_student, regression_error
from hasten.errors import BadInput
from hasten.exact import Gaussian
from hasten.pick import pick
from hasten.plan.draw import draw
from hasten.samplers.ddim import DDIM
from hasten.sampling import Noise
from hasten.schedules import VE, VPCosine
from hasten.times import Trailing
from tests.distillers import _toy


class Affine(nn.Module):
    """`net(x, time)`, linear in x."""

    null_label = None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.layer(x)


class Blank:
    batch_size = 64

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return {"x": torch.zeros(64, 2)}


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_on_one_gaussian_a_linear_student_is_exact(tmp_path: Path, prediction: str) -> None:
    """F(z) = m + c z from alpha = 0; a linear network trained on pairs of the sampler reaches it."""
    schedule = VPCosine(offset=0.0)
    mean, std = torch.tensor([0.7, -0.4]), torch.tensor([0.3, 0.5])
    teacher = Gaussian(mean, std**2, schedule)
    torch.manual_seed(0)
    base = Denoiser(Affine(), schedule, prediction)
    steps = {"student": 250}
    task = DistillTask(teacher, base, Blank(), (2,), tmp_path, steps=steps, show=False)  # type: ignore[arg-type]
    method = DenoisingStudent(pairs=512, pair_steps=48, loss="l2", lr=3e-2)
    student = method.distill(task)
    assert student.figures["held_out"] < 1e-8
    z = torch.randn(100, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ode = teacher.endpoint(z, 1.0)  # the exact solution of the probability-flow equation
    assert (ode - (mean + std * z)).abs().max() < 1e-6
    assert (generate(student.denoiser, z.float()) - ode).abs().max() < 4e-3  # UniPC's own error, by 48 steps
    stored = task.pairs("teacher", 512, steps=48)[:100]
    assert (generate(student.denoiser, stored["noise"]) - stored["x"]).abs().max() < 3e-4


def test_more_pairs_are_better_at_the_same_number_of_updates(tmp_path: Path) -> None:
    fresh = _toy.task(tmp_path / "fresh", 0, seed=7).pairs("a", 512)
    errors = []
    for pairs in (32, 1024):
        task, method = _toy.task(tmp_path / str(pairs), 150, batch_size=64), DenoisingStudent(pairs=pairs, lr=2e-3)
        errors.append(method.mean_loss(task, method.distill(task).denoiser, fresh))
    assert errors[1] < 0.7 * errors[0]


def test_one_step_is_far_better_than_the_teachers(tmp_path: Path) -> None:
    saved: dict[str, Student] = {}
    task = _toy.task(tmp_path, 70, teacher=_toy.mixture(), save_student=saved.__setitem__)
    student = DenoisingStudent(pairs=3072, lr=2e-3).distill(task)
    assert saved["student"] is student and student.steps == 1
    assert pick("samplers", student.sampler).nfe(student.steps) == 1
    truth, mine = _toy.truth(), _toy.sample(student)
    teacher = _toy.sample(Student(_toy.toy(), "ddim", "trailing", 1))
    assert _toy.energy(mine, truth) < 0.006 < 0.03 < _toy.energy(teacher, truth)
    # the sampler's one step is G itself, on the very noise
    noise = Noise(range(8), (2,))
    label = torch.arange(8) % 3
    x = draw(student.denoiser, DDIM(), Trailing(), noise, steps=1, label=label)
    assert torch.allclose(x, generate(student.denoiser, noise.initial(), label=label), atol=1e-6)


def test_the_output_of_an_eps_student_is_read_as_the_difference(tmp_path: Path) -> None:
    """G(z) = z - net(z): finite where an eps network has nothing to say."""
    torch.manual_seed(0)
    eps = Denoiser(Affine(), VPCosine(offset=0.0), "eps")
    z = torch.randn(5, 2)
    assert torch.allclose(generate(one_step_student(eps), z), z - eps.net(z, z), atol=1e-6)
    v = Denoiser(Affine(), VPCosine(offset=0.0), "v")
    assert one_step_student(v) is v


def test_noise_is_scaled_to_the_schedule() -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(Affine(), VE(), "x0")
    z = torch.randn(5, 2)
    assert torch.allclose(generate(denoiser, z), denoiser.net(z * (1 + 50.0**2) ** 0.5, z))


def test_losses_and_refusals() -> None:
    x, y = torch.tensor([[1.0, -2.0]]), torch.zeros(1, 2)
    assert float(regression_error(x, y, "l1")) == 1.5 and float(regression_error(x, y, "l2")) == 2.5
    with pytest.raises(BadInput, match="unknown loss of denoising_student 'l3': did you mean"):
        DenoisingStudent(loss="l3")
    with pytest.raises(BadInput, match="held"):
        DenoisingStudent(held=0.0)
    assert replace(DenoisingStudent(), loss="l2") == pick("distillers", "denoising_student:loss=l2")
