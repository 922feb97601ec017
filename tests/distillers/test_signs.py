"""Who pulls where: signs of the adversarial terms, who learns when, what is augmented, clipped, and drawn anew.

Each of these survived as a mutation once: the loss was finite with either sign.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.distillers import Task
from hasten.distillers import adversarial as adversarial_module
from hasten.distillers._gan import critic_of
from hasten.distillers._targets import noised
from hasten.distillers.adversarial import Adversarial
from hasten.distillers.consistency import Consistency
from hasten.distillers.diffusion_gan import DiffusionGAN
from hasten.distillers.dmd import DMD
from hasten.distillers.rcfd import Rcfd
from hasten.distillers.sft_pg import SFTPG, Chain
from hasten.nets.classifier import Classifier
from hasten.nets.layers import ResBlock
from hasten.nets.unet import UNet
from hasten.predictions import V
from hasten.schedules import VPCosine

from ._images import Squares, image_task
from ._toy import Draws, Small, Steady, mixture, task


def captured(job: Any, run: bool = True) -> dict[str, Any]:
    """What the stages of a job give back by player, filled in as it goes, and under "fit" how they were asked."""
    found: dict[str, Any] = {"fit": []}
    fit = job.fit

    def watched(name: str, players: list[Any], **how: Any) -> Any:
        found["fit"].append((name, {p.name: p for p in players}, how))
        modules = fit(name, players, **how) if run else {p.name: p.module for p in players}
        found.update(modules)
        return modules

    job.fit = watched
    return found


# ---- DMD ----


class Judge(nn.Module):
    """A fake side whose logit is the mean of z, times w."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
        self.seen: list[Tensor] = []
        self.denoiser = denoiser

    def judge(self, z: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.seen.append(z.detach())
        return self.w * z.flatten(1).mean(1, keepdim=True)


class Free(nn.Module):
    """A student that is one parameter a sample."""

    def __init__(self, value: float, n: int = 256) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.full((n, 2), value))

    def forward(self, z: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return 1.0 * self.x


def test_the_student_of_dmd_is_pulled_to_what_the_critic_takes_for_real(tmp_path: Path) -> None:
    """The teacher says what the fake denoiser says, so that the GAN's term is all: it lowers softplus(-C)."""
    job, student = task(tmp_path), Free(0.0)
    job.teacher = lambda z, t, **cond: torch.zeros_like(z)  # type: ignore[assignment]
    fake = Judge(job.teacher)
    torch.manual_seed(0)
    value = DMD(gan=1.0).lesson(job, student, fake)(job.batches[0])  # type: ignore[arg-type]
    value.backward()
    assert (student.x.grad < 0).all(), "higher values are taken for real, so x goes up"
    logits = fake.seen[-1].flatten(1).mean(1)
    assert value.item() == pytest.approx(nn.functional.softplus(-logits).mean().item(), rel=1e-5)


def test_the_critic_of_dmd_is_taught_that_the_data_are_real(tmp_path: Path) -> None:
    job, student = task(tmp_path), Free(-5.0)
    fake = Judge(job.student())
    batch = {**job.batches[0], "x": torch.full((256, 2), 5.0)}
    DMD(critic=1.0).chase(job, student, fake)(batch).backward()  # type: ignore[arg-type]
    assert sorted(float(z.mean()) > 0 for z in fake.seen) == [False, True]
    assert fake.w.grad is not None and fake.w.grad < 0, "a larger w tells 5 from -5"


@pytest.mark.parametrize("every", [1, 3])
def test_the_student_of_dmd_learns_at_each_every_th_step_and_the_fake_side_at_all(every: int, tmp_path: Path) -> None:
    job = task(tmp_path, 6, batch_size=8)
    asked = {"lesson": 0, "chase": 0}

    class Counted(DMD):
        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            if name not in asked:
                return found

            def counting(*args: Any) -> Any:
                loss = found(*args)

                def count(batch: Any) -> Any:
                    asked[name] += 1
                    return loss(batch)

                return count

            return counting

    Counted(every=every).distill(job)
    assert asked == {"lesson": 6 // every, "chase": 6}


def test_dmd_of_images_ends_with_a_critic_that_tells_them_apart(tmp_path: Path) -> None:
    job = image_task(tmp_path, steps=25)
    found = captured(job)
    student = DMD(steps=2, every=1, critic=1.0, lr=1e-5, fake_lr=1e-2).distill(job)
    assert (student.sampler, student.times, student.steps) == ("consistency", "trailing", 2)
    batch, t = Squares()[99], torch.full((8,), 0.3, dtype=torch.float64)
    cond = job.cond(batch)
    with torch.no_grad():
        made = DMD(steps=2).make(job, student.denoiser, batch)
        real, fake = (found["fake"].judge(noised(job.schedule, x, t), t, **cond).mean() for x in (batch["x"], made))
    assert real > fake + 0.1, (real, fake)
    assert apart(student.denoiser, job.denoiser) > 0


def apart(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of two modules' parameters."""
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---- the other adversarial ones ----


def test_real_and_made_images_are_augmented_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the augmentation does, the critic sees it on both, and the student's gradient passes it."""
    monkeypatch.setattr(adversarial_module, "Augment", lambda: lambda x: 0 * x + 7.0 + x)
    job, method = image_task(tmp_path), Adversarial(level=(-9.0, 0.1), strength=0.0, r1=0.0)
    student, critic = job.student(), critic_of(job)
    seen: list[Tensor] = []
    look = critic.features
    critic.features = lambda x, t, **cond: seen.append(x) or look(x, t, **cond)  # type: ignore[method-assign, func-returns-value]
    batch = Squares()[0]
    method.lesson(job, student, critic)(batch).backward()
    method.trial(job, student, critic)(batch)
    plain = [batch["fake"], batch["x"], batch["fake"]]
    assert len(seen) == 3
    for x, without in zip(seen, plain, strict=True):
        assert ((x.detach() - without) - 7).abs().mean() < 0.2
    assert sum(float(p.grad.norm()) for p in student.parameters()) > 0  # type: ignore[union-attr]


def test_adversarial_images_end_with_a_critic_that_tells_them_apart(tmp_path: Path) -> None:
    job = image_task(tmp_path, steps=25)
    found = captured(job)
    student = Adversarial(steps=1, lr=1e-5, critic_lr=1e-2, augment=False).distill(job).denoiser
    critic, batch = critic_of(job), Squares()[99]
    critic.heads = found["critic"]
    t, cond = torch.full((8,), 0.3, dtype=torch.float64), job.cond(batch)
    with torch.no_grad():
        made = student(torch.randn(8, 1, 16, 16), 1.0, **cond)
        real, fake = (critic(noised(job.schedule, x, t), t, **cond).mean() for x in (batch["x"], made))
    assert real > fake + 0.1 and apart(student, job.denoiser) > 0


@pytest.mark.parametrize("bound", ["gradient", "spectral"])
def test_sft_pg_of_images_ends_with_a_critic_that_is_higher_where_they_are_made(bound: str, tmp_path: Path) -> None:
    job = image_task(tmp_path, steps=20)
    found = captured(job)
    student = SFTPG(steps=2, bound=bound, critic_lr=1e-2).distill(job).denoiser
    batch = Squares()[99]
    chain = Chain(student, job.schedule, 2, 1e-3)
    with torch.no_grad():
        made = chain.run(batch["x"], **job.cond(batch))[-1]
        f_made, f_real = (found["critic"](x, 0.0, **job.cond(batch)).mean() for x in (made, batch["x"]))
    assert f_made > f_real + 0.01 and apart(student, job.denoiser) > 0


@pytest.mark.parametrize("options", [{}, {"critic": "heads", "r1": 0.1}, {"posterior": True}])
def test_diffusion_gan_of_images_trains_student_and_critic(options: dict[str, Any], tmp_path: Path) -> None:
    job = image_task(tmp_path, steps=3)
    found = captured(job)
    student = DiffusionGAN(steps=2, every=1, **options).distill(job).denoiser
    assert apart(student, job.denoiser) > 0
    asked = found["fit"][0][1]["critic"].module
    before = job.student().net if asked is not found["critic"] and not options else None
    moved = [p.abs().max() for p in found["critic"].parameters() if p.abs().max() > 0]
    assert moved and (before is None or apart(found["critic"], nn.ModuleDict({"net": before})) > 0)


# ---- how a stage is trained ----


@pytest.mark.parametrize("weight, clip", [("one", 1.0), ("gap", None)])
def test_weights_that_span_orders_of_magnitude_are_not_clipped(weight: str, clip: float | None, tmp_path: Path) -> None:
    job = task(tmp_path, 1, batch_size=8)
    found = captured(job)
    Consistency(weight=weight).distill(job)
    assert found["fit"][0][2]["clip"] == clip


def test_what_is_drawn_after_a_stage_does_not_depend_on_how_it_was_had(tmp_path: Path) -> None:
    """Trained, or read: the numbers that follow are the same, and those of another stage are others."""
    drawn = []
    for turn in range(3):
        job = task(tmp_path / "same", 2 + (turn == 2), batch_size=8)
        torch.manual_seed(100 + turn)
        for name in ("first", "second")[: 1 + (turn == 2)]:
            net = nn.Linear(2, 2)
            player = job.player("student", net, lambda batch, net=net: net(batch["x"]).square().mean(), 1e-3)
            job.fit(name, [player])
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_a_float64_teacher_guides_a_classifier_of_float32(tmp_path: Path) -> None:
    """The exact mixture answers in float64: target and features are what those of its float32 answers are."""
    torch.manual_seed(0)
    base = Denoiser(Small(), VPCosine(offset=0.0), V())
    job = Task(base, base, Draws(16), (2,), tmp_path, steps=Steady(1), show=False)  # type: ignore[arg-type]
    net = Classifier((2,), 3, 8).eval()
    exact, student = mixture(), base
    found = []
    for dtype in (torch.float64, torch.float32):

        def teacher(z: Tensor, t: Tensor, dtype: torch.dtype = dtype, **cond: Any) -> Tensor:
            return exact(z.double(), t, **cond).to(dtype)

        torch.manual_seed(0)
        found.append(Rcfd(steps=(2,), beta=0.0).lesson(job, net, teacher, student, 2, 2)(job.batches[0]))
    assert found[0].dtype == torch.float32 and found[0].item() == pytest.approx(found[1].item(), rel=1e-4)


# ---- dropout ----


def test_dropout_drops_its_share_in_training_and_nothing_otherwise() -> None:
    torch.manual_seed(0)
    block = ResBlock(4, 4, 8, dropout=0.5)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    x, emb = torch.randn(2, 4, 8, 8), torch.randn(2, 8)
    still = block.eval()(x, emb)
    assert torch.equal(still, block(x, emb))
    block.train()
    draws = torch.stack([block(x, emb) for _ in range(400)])
    assert draws.std(0).mean() > 0.1
    # what is kept is doubled, so that the mean is what nothing dropped gives
    assert (draws.mean(0) - still).abs().mean() < 4 * draws.std(0).mean() / 20


def test_a_unet_has_the_dropout_that_it_is_given() -> None:
    torch.manual_seed(0)
    net = UNet(1, widths=(8,), embedding=16, dropout=0.3)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    assert not torch.equal(net(x, t), net(x, t)) and torch.equal(net.eval()(x, t), net(x, t))
