"""Temporal convolutions, the U-Net around them, and a student that predicts the whole path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.distillers import DistillTask, Student
from hasten.distillers.dsno import DSNO
from hasten.errors import BadInput
from hasten.exact import Gaussian, GaussianMixture
from hasten.loading import load
from hasten.model import Model
from hasten.nets.temporal import TemporalConv, TemporalUNet
from hasten.nets.unet import UNet
from hasten.plan.draw import draw
from hasten.sampling import Noise
from hasten.schedules import VPCosine
from hasten.times import Trailing
from tests.distillers import _toy
from tests.nets.test_unet import lively

CLOCKS = (0.5625, 0.25, 0.0625, 0.0)


def conv(modes: int = 3, T: int = 4, channels: int = 3) -> TemporalConv:
    torch.manual_seed(0)
    layer = TemporalConv(channels, T, modes).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
    return layer


def features(B: int = 2, T: int = 4, channels: int = 3) -> Tensor:
    return torch.randn(B * T, channels, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("T", [4, 5])
def test_all_modes_and_the_identity_change_nothing(T: int) -> None:
    layer, u = conv(9, T), features(2, T)
    assert layer.modes == T // 2 + 1  # all there are
    with torch.no_grad():
        layer.weight[0], layer.weight[1] = torch.eye(3), 0
    assert (layer.convolve(u) - u).abs().max() < 1e-14
    assert torch.allclose(layer(u), u + nn.functional.leaky_relu(u))


def test_it_is_a_circular_convolution_along_the_states() -> None:
    layer, u = conv(2), features()
    shifted = u.unflatten(0, (2, 4)).roll(1, 1).flatten(0, 1)
    assert (
        layer.convolve(shifted) - layer.convolve(u).unflatten(0, (2, 4)).roll(1, 1).flatten(0, 1)
    ).abs().max() < 1e-14
    kernel = torch.fft.irfft(torch.complex(*layer.weight), n=4, dim=0)  # (T, C, C); the third mode is zero
    path = u.unflatten(0, (2, 4))
    direct = torch.stack(
        [sum(torch.einsum("io,bihw->bohw", kernel[(m - n) % 4], path[:, n]) for n in range(4)) for m in range(4)], 1
    )
    assert (layer.convolve(u) - direct.flatten(0, 1)).abs().max() < 1e-14
    assert layer.convolve(u.bfloat16()).dtype == torch.bfloat16


def nets(**more: Any) -> tuple[UNet, TemporalUNet]:
    """A U-Net and one of paths with its weights, R = 0."""
    options: dict[str, Any] = {"channels": 1, "widths": (8, 16), "classes": 3, "attention": (1,), **more}
    plain: Any = lively(UNet(**options))
    temporal: Any = TemporalUNet(states=CLOCKS, **options).eval()
    missing = temporal.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(".temporal.weight" in key for key in missing.missing_keys)
    assert len(missing.missing_keys) == sum(len(row) for row in (*temporal.down, temporal.middle, *temporal.up))
    for module in temporal.modules():
        if isinstance(module, TemporalConv):
            nn.init.zeros_(module.weight)
    return plain, temporal


@pytest.mark.parametrize("patch", [1, 2])
def test_without_the_convolutions_it_is_the_plain_network_at_each_time(patch: int) -> None:
    plain, temporal = nets(patch=patch)
    z, label, ones = torch.randn(3, 1, 8, 8), torch.tensor([0, 3, 2]), torch.ones(3)
    with torch.no_grad():
        path = temporal.path(z, ones, label=label)
        for m, clock in enumerate(CLOCKS):
            assert torch.allclose(path[:, m], plain(z, torch.full((3,), clock), label), atol=1e-5)
        assert torch.equal(temporal(z, ones, label), path[:, -1])
    with pytest.raises(ValueError, match="evaluated at time 1 only"):
        temporal(z, 0.5 * ones, label)


def test_states_see_one_another_through_the_convolutions_alone() -> None:
    _, temporal = nets()
    z, ones = torch.randn(2, 1, 8, 8), torch.ones(2)

    def reach() -> Tensor:
        """Whether state m depends on the embedding of state n."""
        emb = temporal.embed(ones).detach().requires_grad_(True)
        path = temporal._decode_all(*temporal.encode(z, emb), emb)
        rows = [torch.autograd.grad(path[:, m].square().sum(), emb, retain_graph=True)[0] for m in range(4)]
        return torch.stack([g.unflatten(0, (2, 4)).abs().amax((0, 2)) for g in rows]) > 0

    assert torch.equal(reach(), torch.eye(4, dtype=torch.bool))
    layer = next(m for m in temporal.up.modules() if isinstance(m, TemporalConv))
    nn.init.uniform_(layer.weight)
    assert bool(reach().all())


class Blank:
    """Batches that only have the shape."""

    batch_size = 64

    def __init__(self, labels: bool = False) -> None:
        self.labels = labels

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return {"x": torch.zeros(64, 1, 1, 2)} | ({"label": torch.zeros(64, dtype=torch.long)} if self.labels else {})


def job(out: Path, teacher: nn.Module, steps: int, labels: bool = False, width: int = 32) -> DistillTask:
    torch.manual_seed(0)
    net = UNet(channels=1, widths=(width,), classes=3 if labels else 0)
    base = Denoiser(net, teacher.schedule, "v")  # type: ignore[arg-type]
    return DistillTask(teacher, base, Blank(labels), (1, 1, 2), out, steps={"student": steps}, show=False)  # type: ignore[arg-type]


class Lines(nn.Module):
    """States that are affine in z, each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.zeros(4, 1, 1, 2)), nn.Parameter(torch.zeros(4, 1, 1, 2))

    def path(self, z: Tensor, time: Tensor) -> Tensor:
        return self.gain * z[:, None] + self.shift


def test_on_one_gaussian_the_operator_is_affine(tmp_path: Path) -> None:
    """Z(t_m) = alpha_m m + z sqrt(V_m): the loss of all states has its minimum, zero, there."""
    schedule = VPCosine(offset=0.0)
    mean, variance = torch.tensor([[[0.3, -0.2]]]), torch.tensor([[[0.09, 0.16]]])
    teacher = Gaussian(mean, variance, schedule)
    z = torch.randn(256, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = torch.stack([teacher.endpoint(z, 1.0, t) for t in CLOCKS], 1)
    student: Any = Denoiser(Lines().double(), schedule, "x0")
    loss_fn = DSNO(loss="l2", largest=10.0).loss_fn(job(tmp_path, teacher, 1), student)
    batch = {"noise": z, "states": ends[:, :-1], "x": ends[:, -1]}
    solver = torch.optim.LBFGS(student.parameters(), max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> float:
        solver.zero_grad()
        loss = loss_fn(batch)
        loss.backward()
        return loss.item()

    solver.step(closure)
    assert loss_fn(batch).item() < 1e-8
    for m, t in enumerate(CLOCKS):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        assert (student.net.gain[m] - (alpha**2 * variance + sigma**2).sqrt()).abs().max() < 5e-4
        assert (student.net.shift[m] - alpha * mean).abs().max() < 5e-4


def test_the_weights_are_the_papers() -> None:
    weights = DSNO().weights(VPCosine(offset=0.0))
    assert torch.allclose(weights / weights[0], torch.tensor([1.0, 2.41, 10.15, 1e4], dtype=torch.float64), rtol=2e-3)
    assert float(weights.sum()) == pytest.approx(1)


def pictures() -> GaussianMixture:
    """The mixture at 0.4 of its size, as images of 1 x 2 in [-1, 1]."""
    exact = _toy.mixture()
    means, variances = (v.reshape(3, 1, 1, 2) for v in (0.4 * exact.means, 0.16 * exact.variances))
    return GaussianMixture(exact.weights, means, variances, exact.schedule, labels=[0, 1, 2])


def test_one_step_on_the_mixture_and_the_model_is_saved(tmp_path: Path) -> None:
    saved: dict[str, Student] = {}
    task = job(tmp_path, pictures(), 60, labels=True, width=24)
    task.save_student = saved.__setitem__
    student = DSNO(pairs=1024, pair_steps=16, lr=2e-3, largest=20.0, modes=3).distill(task)
    assert saved["student"] is student and student.steps == 1
    label, noise = _toy.proportional(1500), Noise(range(1500), (1, 1, 2))

    def one(denoiser: Any) -> Tensor:
        from hasten.samplers.ddim import DDIM

        return draw(denoiser, DDIM(), Trailing(), noise, steps=1, label=label)

    truth = 0.4 * _toy.truth()
    mine, teacher = (_toy.energy(one(d).flatten(1).detach(), truth) for d in (student.denoiser, pictures()))
    assert mine < 0.3 * teacher
    model = Model(student.denoiser, "paths", (1, 1, 2), ("a", "b", "c"), sampler="ddim", times="trailing", steps=1)
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(again.sample(6, seed=3), model.sample(6, seed=3))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="decreasing times in \\(0, 1\\)"):
        DSNO(states=(0.25, 0.5))
    with pytest.raises(BadInput, match="unknown loss of dsno"):
        DSNO(loss="lpips")
    with pytest.raises(BadInput, match="found Small"):
        DSNO().distill(_toy.task(tmp_path, 1))
