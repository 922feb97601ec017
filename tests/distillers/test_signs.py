"""Signs of the adversarial terms, which module is updated when, what is augmented, clipped, and seeded.

Each of these survived as a mutation once: the loss was finite with either sign.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.distillers import DistillTask
from hasten.distillers import adversarial as adversarial_module
from hasten.distillers._gan import build_critic
from hasten.distillers._targets import noised
from hasten.distillers.adversarial import Adversarial
from hasten.distillers.consistency import Consistency
from hasten.distillers.diffusion_gan import DiffusionGAN
from hasten.distillers.dmd import DMD
from hasten.distillers.rcfd import Rcfd
from hasten.distillers.sft_pg import SFTPG, DDPMChain
from hasten.nets.classifier import Classifier
from hasten.nets.layers import ResBlock
from hasten.nets.unet import UNet
from hasten.predictions import V
from hasten.schedules import VPCosine

from ._images import Squares, image_task
from ._toy import Draws, Small, Steady, mixture, task


def captured(job: Any, run: bool = True) -> dict[str, Any]:
    """The results of the stages by module, and under "fit" their arguments."""
    results: dict[str, Any] = {"fit": []}
    fit = job.fit

    def watched(name: str, modules: list[Any], **options: Any) -> Any:
        results["fit"].append((name, {p.name: p for p in modules}, options))
        trained = fit(name, modules, **options) if run else {p.name: p.module for p in modules}
        results.update(trained)
        return trained

    job.fit = watched
    return results


# ---- DMD ----


class FakeCritic(nn.Module):
    """A fake denoiser and critic whose logit is the mean of z, times w."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
        self.seen: list[Tensor] = []
        self.denoiser = denoiser

    def logits(self, z: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.seen.append(z.detach())
        return self.w * z.flatten(1).mean(1, keepdim=True)


class Free(nn.Module):
    """A student that is one parameter a sample."""

    def __init__(self, value: float, n: int = 256) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.full((n, 2), value))

    def forward(self, z: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return 1.0 * self.x


def test_the_student_of_dmd_moves_to_what_the_critic_takes_for_real(tmp_path: Path) -> None:
    """Teacher and fake denoiser agree, so that only the GAN's term remains: it lowers softplus(-C)."""
    job, student = task(tmp_path), Free(0.0)
    job.teacher = lambda z, t, **cond: torch.zeros_like(z)  # type: ignore[assignment]
    fake = FakeCritic(job.teacher)
    torch.manual_seed(0)
    value = DMD(gan=1.0).student_loss(job, student, fake)(job.batches[0])  # type: ignore[arg-type]
    value.backward()
    assert (student.x.grad < 0).all(), "higher values are taken for real, so x goes up"
    logits = fake.seen[-1].flatten(1).mean(1)
    assert value.item() == pytest.approx(nn.functional.softplus(-logits).mean().item(), rel=1e-5)


def test_the_critic_of_dmd_is_taught_that_the_data_are_real(tmp_path: Path) -> None:
    job, student = task(tmp_path), Free(-5.0)
    fake = FakeCritic(job.student())
    batch = {**job.batches[0], "x": torch.full((256, 2), 5.0)}
    DMD(critic=1.0).fake_loss(job, student, fake)(batch).backward()  # type: ignore[arg-type]
    assert sorted(float(z.mean()) > 0 for z in fake.seen) == [False, True]
    assert fake.w.grad is not None and fake.w.grad < 0, "a larger w tells 5 from -5"


@pytest.mark.parametrize("every", [1, 3])
def test_the_student_of_dmd_learns_at_each_every_th_step_and_the_fake_denoiser_at_all(
    every: int, tmp_path: Path
) -> None:
    job = task(tmp_path, 6, batch_size=8)
    calls = {"student_loss": 0, "fake_loss": 0}

    class CountedDMD(DMD):
        def __getattribute__(self, name: str) -> Any:
            method = super().__getattribute__(name)
            if name not in calls:
                return method

            def counting(*args: Any) -> Any:
                loss = method(*args)

                def count(batch: Any) -> Any:
                    calls[name] += 1
                    return loss(batch)

                return count

            return counting

    CountedDMD(every=every).distill(job)
    assert calls == {"student_loss": 6 // every, "fake_loss": 6}


def test_dmd_of_images_ends_with_a_critic_that_tells_them_apart(tmp_path: Path) -> None:
    job = image_task(tmp_path, steps=25)
    results = captured(job)
    student = DMD(steps=2, every=1, critic=1.0, lr=1e-5, fake_lr=1e-2).distill(job)
    assert (student.sampler, student.times, student.steps) == ("consistency", "trailing", 2)
    batch, t = Squares()[99], torch.full((8,), 0.3, dtype=torch.float64)
    cond = job.cond(batch)
    with torch.no_grad():
        generated = DMD(steps=2).generate(job, student.denoiser, batch)
        real, fake = (
            results["fake"].logits(noised(job.schedule, x, t), t, **cond).mean() for x in (batch["x"], generated)
        )
    assert real > fake + 0.1, (real, fake)
    assert apart(student.denoiser, job.denoiser) > 0


def apart(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of two modules' parameters."""
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---- the other adversarial ones ----


def test_real_and_generated_images_are_augmented_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the augmentation does, the critic sees it on both, and the student's gradient passes it."""
    monkeypatch.setattr(adversarial_module, "Augment", lambda: lambda x: 0 * x + 7.0 + x)
    job, method = image_task(tmp_path), Adversarial(level=(-9.0, 0.1), strength=0.0, r1=0.0)
    student, critic = job.student(), build_critic(job)
    seen: list[Tensor] = []
    features = critic.features
    critic.features = lambda x, t, **cond: seen.append(x) or features(x, t, **cond)  # type: ignore[method-assign, func-returns-value]
    batch = Squares()[0]
    method.student_loss(job, student, critic)(batch).backward()
    method.critic_loss(job, student, critic)(batch)
    plain = [batch["fake"], batch["x"], batch["fake"]]
    assert len(seen) == 3
    for x, without in zip(seen, plain, strict=True):
        assert ((x.detach() - without) - 7).abs().mean() < 0.2
    assert sum(float(p.grad.norm()) for p in student.parameters()) > 0  # type: ignore[union-attr]


def test_adversarial_images_end_with_a_critic_that_tells_them_apart(tmp_path: Path) -> None:
    job = image_task(tmp_path, steps=25)
    results = captured(job)
    student = Adversarial(steps=1, lr=1e-5, critic_lr=1e-2, augment=False).distill(job).denoiser
    critic, batch = build_critic(job), Squares()[99]
    critic.heads = results["critic"]
    t, cond = torch.full((8,), 0.3, dtype=torch.float64), job.cond(batch)
    with torch.no_grad():
        generated = student(torch.randn(8, 1, 16, 16), 1.0, **cond)
        real, fake = (critic(noised(job.schedule, x, t), t, **cond).mean() for x in (batch["x"], generated))
    assert real > fake + 0.1 and apart(student, job.denoiser) > 0


@pytest.mark.parametrize("bound", ["gradient", "spectral"])
def test_sft_pg_of_images_ends_with_a_critic_that_is_higher_on_generated_ones(bound: str, tmp_path: Path) -> None:
    job = image_task(tmp_path, steps=20)
    results = captured(job)
    student = SFTPG(steps=2, bound=bound, critic_lr=1e-2).distill(job).denoiser
    batch = Squares()[99]
    chain = DDPMChain(student, job.schedule, 2, 1e-3)
    with torch.no_grad():
        generated = chain.run(batch["x"], **job.cond(batch))[-1]
        f_generated, f_real = (results["critic"](x, 0.0, **job.cond(batch)).mean() for x in (generated, batch["x"]))
    assert f_generated > f_real + 0.01 and apart(student, job.denoiser) > 0


@pytest.mark.parametrize("options", [{}, {"critic": "heads", "r1": 0.1}, {"posterior": True}])
def test_diffusion_gan_of_images_trains_student_and_critic(options: dict[str, Any], tmp_path: Path) -> None:
    job = image_task(tmp_path, steps=3)
    results = captured(job)
    student = DiffusionGAN(steps=2, every=1, **options).distill(job).denoiser
    assert apart(student, job.denoiser) > 0
    module = results["fit"][0][1]["critic"].module
    before = job.student().net if module is not results["critic"] and not options else None
    moved = [p.abs().max() for p in results["critic"].parameters() if p.abs().max() > 0]
    assert moved and (before is None or apart(results["critic"], nn.ModuleDict({"net": before})) > 0)


# ---- how a stage is trained ----


@pytest.mark.parametrize("weight, clip", [("one", 1.0), ("gap", None)])
def test_weights_that_span_orders_of_magnitude_are_not_clipped(weight: str, clip: float | None, tmp_path: Path) -> None:
    job = task(tmp_path, 1, batch_size=8)
    results = captured(job)
    Consistency(weight=weight).distill(job)
    assert results["fit"][0][2]["clip"] == clip


def test_random_numbers_after_a_stage_do_not_depend_on_whether_it_was_trained(tmp_path: Path) -> None:
    """Trained or loaded: the numbers that follow are the same, and those of another stage differ."""
    numbers = []
    for turn in range(3):
        job = task(tmp_path / "same", 2 + (turn == 2), batch_size=8)
        torch.manual_seed(100 + turn)
        for name in ("first", "second")[: 1 + (turn == 2)]:
            net = nn.Linear(2, 2)
            trained = job.trained_module("student", net, lambda batch, net=net: net(batch["x"]).square().mean(), 1e-3)
            job.fit(name, [trained])
        numbers.append(torch.rand(4))
    assert torch.equal(numbers[0], numbers[1]) and not torch.equal(numbers[1], numbers[2])


def test_a_float64_teacher_guides_a_classifier_of_float32(tmp_path: Path) -> None:
    """The exact mixture predicts in float64: target and features equal those of its float32 predictions."""
    torch.manual_seed(0)
    base = Denoiser(Small(), VPCosine(offset=0.0), V())
    job = DistillTask(base, base, Draws(16), (2,), tmp_path, steps=Steady(1), show=False)  # type: ignore[arg-type]
    net = Classifier((2,), 3, 8).eval()
    exact, student = mixture(), base
    losses = []
    for dtype in (torch.float64, torch.float32):

        def teacher(z: Tensor, t: Tensor, dtype: torch.dtype = dtype, **cond: Any) -> Tensor:
            return exact(z.double(), t, **cond).to(dtype)

        torch.manual_seed(0)
        losses.append(Rcfd(steps=(2,), beta=0.0).loss_fn(job, net, teacher, student, 2, 2)(job.batches[0]))
    assert losses[0].dtype == torch.float32 and losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)


# ---- dropout ----


def test_dropout_drops_its_fraction_in_training_and_nothing_otherwise() -> None:
    torch.manual_seed(0)
    block = ResBlock(4, 4, 8, dropout=0.5)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    x, emb = torch.randn(2, 4, 8, 8), torch.randn(2, 8)
    expected = block.eval()(x, emb)
    assert torch.equal(expected, block(x, emb))
    block.train()
    draws = torch.stack([block(x, emb) for _ in range(400)])
    assert draws.std(0).mean() > 0.1
    # what remains is doubled, which preserves the mean
    assert (draws.mean(0) - expected).abs().mean() < 4 * draws.std(0).mean() / 20


def test_a_unet_applies_its_dropout() -> None:
    torch.manual_seed(0)
    net = UNet(1, widths=(8,), embedding=16, dropout=0.3)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    assert not torch.equal(net(x, t), net(x, t)) and torch.equal(net.eval()(x, t), net(x, t))
