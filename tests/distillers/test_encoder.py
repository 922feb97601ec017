"""Encoder distillation: targets that are exact and finite at the image, exact jumps that can be undone, a student."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.denoiser import Denoiser
from hasten.distillers.encoder import Encoder
from hasten.errors import BadInput
from hasten.guides.cfg import CFG
from hasten.inversion import (
    encode,
    eps_to_raw,
    increasing_times,
    inversion_step,
    invert_along,
    make_eps_fn,
    raw_to_eps,
    teacher_eps_fn,
)
from hasten.model import Model
from hasten.nets.unet import UNet
from hasten.predictions import EDM as EDMPrediction
from hasten.predictions import X0, Eps, Flow, Prediction, V
from hasten.schedules import EDM, Schedule, VPCosine
from hasten.schedules import Flow as FlowSchedule
from hasten.workflows.distill import distill_model

from ._toy import Exact, mixture, task, toy

F64 = torch.float64


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def angle(model: Exact, t: Tensor) -> Tensor:
    return torch.atan2(model.schedule.sigma(t), model.schedule.alpha(t))


def flow(model: Exact, z: Tensor, t: float, s: float, count: int, **cond: Tensor) -> Tensor:
    """Where the probability-flow equation dz/df = v takes z from t to s, either way: RK4 in the angle f = pi t / 2."""

    def v(z: Tensor, t: float) -> Tensor:
        return Exact.raw(model, z, min(max(t, 0.0), 1.0), **cond)

    d = (s - t) / count
    h = d * math.pi / 2
    for k in range(count):
        a = v(z, t + k * d)
        b = v(z + h / 2 * a, t + k * d + d / 2)
        c = v(z + h / 2 * b, t + k * d + d / 2)
        z = z + h / 6 * (a + 2 * b + 2 * c + v(z + h * c, t + (k + 1) * d))
    return z


# ---- the target ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_one_jump_with_the_target_lands_where_the_steps_do(steps: int, m: int) -> None:
    """At every node, t = 0 too; and the target is the v-form of the jump, which is singular nowhere."""
    model = mixture()
    nodes = increasing_times(model, steps * m)
    i = torch.arange(steps).repeat_interleave(20)
    times = [nodes[m * i + k] for k in range(m + 1)]
    t, s = times[0], times[-1]
    assert float(t.min()) == 0 and float(s.max()) == 1
    x = model.sample(len(i), torch.Generator().manual_seed(1))
    z = model.schedule.alpha(t)[:, None] * x + model.schedule.sigma(t)[:, None] * normals(len(i), 2)
    end, noise = invert_along(make_eps_fn(model), model.schedule, z, times)
    target = eps_to_raw(model, z, t, noise)
    assert torch.isfinite(target).all() and torch.isfinite(noise).all()
    torch.testing.assert_close(inversion_step(model.schedule, z, noise, t, s), end, rtol=0, atol=1e-12)
    d = (angle(model, s) - angle(model, t))[:, None]
    torch.testing.assert_close(target, (end - d.cos() * z) / d.sin(), rtol=0, atol=1e-11)
    if m == 2:  # two equal steps, in closed form
        c, q = (d / 2).cos(), (d / 2).sin()
        first = model.raw(z, t)
        middle = c * z + q * first
        second = model.raw(middle, times[1])
        torch.testing.assert_close(target, (q * z + c * first + second) / (2 * c), rtol=0, atol=1e-11)


def test_the_target_at_the_image_is_small_steps_own() -> None:
    """The noise in z at t = 0 is 0 on average given z, so a single tiny step from there predicts 0; in float32, too."""
    model = mixture()
    x = model.sample(50, torch.Generator().manual_seed(0)).float()
    zero = torch.zeros(50, dtype=F64)
    _, noise = invert_along(make_eps_fn(model), model.schedule, x, [zero, zero + 1e-4, zero + 2e-4])
    target = eps_to_raw(model, x, zero, noise)
    assert target.dtype == torch.float32 and target.abs().max() < 1e-2
    _, far = invert_along(make_eps_fn(model), model.schedule, x, [zero, zero + 0.5, zero + 1])
    assert torch.isfinite(far).all() and far.std() > 0.3


class FixedOutput(nn.Module):
    """A network with the right output for a known image and noise."""

    def __init__(self) -> None:
        super().__init__()
        self.output = torch.zeros(1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.output


@pytest.mark.parametrize("schedule", [VPCosine(offset=0.0), FlowSchedule(), EDM()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("prediction", [V(), Flow(), Eps(), EDMPrediction()], ids=lambda p: p.name)
def test_the_noise_is_read_from_every_kind_of_network(prediction: Prediction, schedule: Schedule) -> None:
    denoiser = Denoiser(FixedOutput(), schedule, prediction)
    t = torch.tensor([0.0, 1e-4, 0.3, 0.7, 0.95], dtype=F64)
    x, e = normals(2, len(t), 3)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    z = alpha[:, None] * x + sigma[:, None] * e
    denoiser.net.output = prediction.target(x, e, alpha, sigma)
    noise = make_eps_fn(denoiser)(z, t)
    torch.testing.assert_close(noise, e, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(eps_to_raw(denoiser, z, t, e), denoiser.net.output, rtol=1e-9, atol=1e-9)
    assert raw_to_eps(denoiser, z.float(), t, denoiser.net.output.float()).dtype == torch.float32


def test_guidance_is_the_same_in_what_is_said_as_in_x0() -> None:
    model, label = mixture(), torch.tensor([0, 1, 2, 0])
    z, t = normals(4, 2), torch.full((4,), 0.6, dtype=F64)
    alpha, sigma = model.schedule.alpha(t)[:, None], model.schedule.sigma(t)[:, None]
    guided = CFG(scale=2.5).wrap(model)
    wanted = (z - alpha * guided(z, t, label=label)) / sigma
    each = torch.tensor([2.5, 2.5, 1.0, 1.0])
    task_like = teacher_eps_fn(guided, model, 2.5)
    torch.testing.assert_close(task_like(z, t, label=label), wanted, rtol=1e-10, atol=1e-10)
    mixed = make_eps_fn(model, each)(z, t, label=label)
    plain = (z - alpha * model(z, t, label=label)) / sigma
    torch.testing.assert_close(mixed, torch.where(each[:, None] > 1, wanted, plain), rtol=1e-7, atol=1e-7)


# ---- exact jumps --------------------------------------------------------------------------------------------------


def test_what_exact_jumps_encode_the_flow_decodes() -> None:
    """16 jumps, each with the v that lands where the flow does; the flow back returns the image to 1e-8, and what is
    encoded is N(0, I)."""
    model = mixture()
    x = model.sample(2000, torch.Generator().manual_seed(0))

    class Jumps(Exact):
        def raw(self, x_t: Tensor, t: Tensor, label: Tensor | None = None, **cond: Tensor) -> Tensor:
            s = float(t[0]) + 1 / 16
            d = math.pi / 32
            return (flow(model, x_t, float(t[0]), s, 30) - math.cos(d) * x_t) / math.sin(d)

    exact = Jumps(model.weights, model.means.reshape(3, 2), model.variances.reshape(3, 2), model.schedule)
    z = encode(exact, x, 16)
    assert z.mean(0).abs().max() < 0.06 and (z.T.cov() - torch.eye(2)).abs().max() < 0.06
    assert (flow(model, z[:250], 1.0, 0.0, 800) - x[:250]).abs().max() < 1e-8
    assert (encode(model, x, 16) - z).square().mean().sqrt() > 0.03  # which plain DDIM does not reach


# ---- the student --------------------------------------------------------------------------------------------------


def test_a_student_encodes_in_four_jumps_as_the_flow_does(tmp_path: Path) -> None:
    """On the exact mixture: the noise that the student reads is nearer the flow's than that of 4 and of 8 steps of DDIM."""
    model = mixture()
    student = Encoder(steps=(8, 4), lr=4e-3).distill(task(tmp_path, 150, teacher=model))
    assert student.figures["direction"] == "encode" and (student.steps, student.guidance) == (4, None)
    label = torch.arange(3).repeat_interleave(300)
    x = torch.cat([model.sample(300, torch.Generator().manual_seed(c), c) for c in range(3)])
    wanted = flow(model, x, 0.0, 1.0, 150, label=label)

    def off(z: Tensor) -> float:
        return (z - wanted).square().mean(1).sqrt().median().item()

    mine = off(encode(student.denoiser, x.float(), 4, label=label).double())
    plain = [off(encode(model, x, steps, label=label)) for steps in (4, 8)]
    assert mine < 0.5 * plain[0] and mine < plain[1], (mine, plain)


@pytest.mark.slow
def test_a_student_takes_the_guidance_scale(tmp_path: Path) -> None:
    model = mixture()
    student = Encoder(steps=(4,), start=16, guidance=(1.0, 3.0), lr=4e-3).distill(task(tmp_path, 300))
    assert student.guidance == (1.0, 3.0) == student.denoiser.guidance_range
    x, label = model.sample(1000, torch.Generator().manual_seed(3), label=1), torch.full((1000,), 1)
    for scale in (1.0, 2.0, 3.0):
        wanted = encode(toy(), x.float(), 128, scale, label=label)
        mine, plain = (
            (encode(denoiser, x.float(), 4, scale, label=label) - wanted).square().mean(1).sqrt().median().item()
            for denoiser in (student.denoiser, toy())
        )
        assert mine < 0.6 * plain, (scale, mine, plain)


def test_a_saved_encoder_is_a_model(tmp_path: Path) -> None:
    """All of `distill_model`: dry run, two stages, folders; an encoder has no preview."""
    torch.manual_seed(0)
    net = UNet(channels=1, widths=(8,), classes=2, embedding=16)
    teacher = Model(Denoiser(net, VPCosine(offset=0.0), V()), "tiny", (1, 4, 4), ("a", "b"), guidance_scale=2.0)
    np.savez(tmp_path / "data.npz", images=np.random.default_rng(0).integers(0, 255, (16, 4, 4), dtype=np.uint8), labels=np.arange(16) % 2)  # fmt: skip
    out = tmp_path / "run"
    result = distill_model(teacher, out, "encoder:steps=(4,2)", tmp_path / "data.npz", steps=4, batch_size=8, show=False, precision="fp32")  # fmt: skip
    assert [s["name"] for s in result["stages"]] == ["encode4", "encode2"] and not list(out.glob("*.png"))
    assert result["stages"][0]["evaluations"] == pytest.approx(8 * (2 * 2 + 3), rel=0.1)
    for folder, steps in ((out, 2), (out / "encode4", 4)):
        loaded = hasten.load(folder)
        assert loaded.steps == steps and loaded.card["distilled"]["figures"]["direction"] == "encode"
        z = encode(loaded.denoiser, torch.zeros(2, 1, 4, 4), steps, 2.0, label=torch.tensor([0, 1]))
        assert torch.isfinite(z).all() and z.shape == (2, 1, 4, 4)


# ---- what cannot be -----------------------------------------------------------------------------------------------


def test_where_the_clock_has_no_image_it_begins_beside_it() -> None:
    schedule = VPCosine(offset=0.0)
    denoiser = Denoiser(FixedOutput(), schedule, V(), clock="lam")
    assert (
        float(increasing_times(denoiser, 4)[0]) == schedule.t_min
        and float(increasing_times(denoiser.replace(clock="t"), 4)[0]) == 0
    )


def test_bad_input_is_refused() -> None:
    with pytest.raises(BadInput, match="divisor"):
        Encoder(steps=(8, 3))
    with pytest.raises(BadInput, match="low < high"):
        Encoder(guidance=(3.0, 1.0))
    with pytest.raises(BadInput, match="predicts x0"):
        increasing_times(Denoiser(FixedOutput(), VPCosine(), X0()), 4)
    with pytest.raises(BadInput, match="label"):
        make_eps_fn(mixture(), 2.0)(normals(2, 2), torch.tensor([0.5, 0.5], dtype=F64))
    ranged = type("Net", (FixedOutput,), {"guidance_range": (1.0, 3.0)})()
    with pytest.raises(BadInput, match="1 to 3"):
        Encoder(guidance=(1.0, 5.0)).span(Denoiser(ranged, VPCosine(), V()))
    fixed = Denoiser(FixedOutput(), VPCosine(), V(), guidance_range=(2.0, 2.0))
    with pytest.raises(BadInput, match="2 to 2"):
        Encoder(guidance=(1.0, 5.0)).span(fixed)
    assert Encoder().span(fixed) is None
    assert Encoder().span(Denoiser(ranged, VPCosine(), V())) == (1.0, 3.0)
