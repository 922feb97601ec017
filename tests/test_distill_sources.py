"""Distillation of models that read a source image: what the students learn, read and keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten import load
from hasten.cli import main
from hasten.degradations.low_resolution import LowResolution
from hasten.denoiser import Denoiser
from hasten.distillers import DistillTask
from hasten.distillers._ema_target import EMATarget
from hasten.distillers.dmd import DMD, FakeScore
from hasten.errors import BadInput
from hasten.nets.critic import Critic
from hasten.pick import method_names, pick
from hasten.schedules import VPCosine
from hasten.train.crops import open_crops
from hasten.train.data import Batches, to_float
from hasten.train.sources import Data
from hasten.utils.resizing import enlarge
from hasten.workflows.distill import distill_model
from hasten.workflows.source_data import PairSettings, paired_samples
from tests.factories import tiny_model
from tests.source_models import FACTOR, SIDE, Own, Points, pictures, source_model

FEW = {"progressive": "steps=(2,1)", "consistency": "nodes=4", "prodiff": "steps=(2,)", "tract": "phases=(4,1)"}
OPTIONS = {
    **FEW, "dmd": "steps=2,every=1", "mmd": "steps=2,features=random,width=4", "rcfd": "features=random,beta=0,width=4",
    "denoising_student": "pairs=8,pair_steps=2", "reflow": "pairs=8,pair_steps=2,own_steps=2", "sft_pg": "steps=2",
    "adversarial": "steps=2",
}  # fmt: skip
REFUSED = {
    "guided": "null label", "dsno": "UNet of hasten.nets", "encoder": "restyle has none",
}  # fmt: skip


def points_task(tmp_path: Path) -> tuple[DistillTask, dict[str, Tensor]]:
    """A teacher that is exact for one image a source, and a batch whose images are others."""
    teacher = Denoiser(Points(), VPCosine(offset=0.0), "x0").requires_grad_(False)
    source = torch.rand(6, 3, 8, 8) - 0.5
    data = Data(6, (3, SIDE, SIDE), lambda rows: torch.randn(len(rows), 3, SIDE, SIDE),
                conditions=lambda rows: {"source": source[rows]})  # fmt: skip
    task = DistillTask(teacher, teacher, Batches(data, 6), (3, SIDE, SIDE), tmp_path, show=False)
    return task, task.batches[0]


@pytest.mark.parametrize("name", ["progressive", "prodiff", "tract", "dmd"])
def test_the_target_of_a_teacher_of_one_image_a_source_is_that_image(name: str, tmp_path: Path) -> None:
    """So the loss of a student that has it is 0, whatever the images of the batch, and that of others is not."""
    torch.manual_seed(0)
    task, batch = points_task(tmp_path)
    assert task.conditions == ("source",)
    method: Any = pick("distillers", name)

    def loss(student: Denoiser) -> float:
        torch.manual_seed(1)
        if name == "dmd":  # the fake denoiser is that of the student's samples
            fake = FakeScore(student, task.shape, 0, task.one_cond())
            loss_fn = DMD(steps=2, gan=0).student_loss(task, student, fake)
        elif name == "tract":
            loss_fn = method.loss_fn(task, task.teacher, EMATarget(student), 2, 4)
        elif name == "prodiff":
            loss_fn = method.loss_fn(task, task.teacher, student, torch.linspace(0, 1, 5, dtype=torch.float64), 2)
        else:
            loss_fn = method.loss_fn(task, task.teacher, student, 2, 2)
        return float(loss_fn(batch).detach())

    assert loss(task.student()) < 1e-6
    assert loss(Denoiser(Points(-1.0), VPCosine(offset=0.0), "x0")) > 0.01


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_a_student_reads_its_source_and_keeps_what_the_samples_are(prediction: str, tmp_path: Path) -> None:
    teacher, out = source_model(prediction=prediction), tmp_path / "out"
    distill_model(teacher, out, "progressive:steps=(2,1)", pictures(tmp_path / "data"), steps=4, batch_size=4,
                  precision="fp32", show=False)  # fmt: skip
    for folder, steps in ((out, 1), (out / "steps2", 2)):
        student = load(folder)
        assert (student.codec, student.residual_std, student.source_shape) == ("residual", 0.2, (3, 8, 8))
        assert student.card["degrade"] == "low_resolution:factor=2" and student.card["flip"] and student.steps == steps
        source = torch.rand(3, 3, 8, 8) * 2 - 1
        noise = torch.randn(1, 3, SIDE, SIDE).expand(3, -1, -1, -1)
        x = student.sample(3, images=source, noise=noise)
        order = [2, 0, 1]
        torch.testing.assert_close(student.sample(3, images=source[order], noise=noise), x[order])
        # it learns residuals: what it adds differs from image to image
        added = x - enlarge(source, FACTOR).clamp(-1, 1)
        assert float((added[0] - added[1]).abs().max()) > 0.01
    assert (out / "steps1.png").is_file()


@pytest.mark.parametrize(("name", "own"), [*((n, True) for n in method_names("distillers")), ("dmd", False)])
def test_every_method_takes_sources_or_says_why_not(name: str, own: bool, tmp_path: Path) -> None:
    model, data = source_model(Own() if own else None), pictures(tmp_path / "data")
    method = name + (f":{OPTIONS[name]}" if name in OPTIONS else "")
    run: Any = lambda: distill_model(  # noqa: E731
        model, tmp_path / "out", method, data, steps=30, batch_size=4, precision="fp32", dry_run=True, show=False
    )
    if name in REFUSED:
        with pytest.raises(BadInput, match=REFUSED[name]):
            run()
    else:
        assert all(stage["evaluations"] > 0 for stage in run()["stages"])


def test_critics_judge_a_sample_with_its_source() -> None:
    """Of networks with features and of others."""
    x, source = torch.randn(2, 3, SIDE, SIDE), torch.randn(2, 3, 8, 8)
    for net in (None, Own()):
        denoiser = source_model(net).denoiser
        for critic in (
            Critic(denoiser, (3, SIDE, SIDE), cond={"source": source[:1]}),
            FakeScore(denoiser, (3, SIDE, SIDE), 0, {"source": source[:1]}).logits,
        ):
            logits = [critic(x, torch.full((2,), 0.5), source=one) for one in (source, source.flip(0))]
            assert float((logits[0] - logits[1]).detach().abs().max()) > 1e-4


def test_pairs_are_those_of_the_training(tmp_path: Path) -> None:
    model, folder = source_model(), pictures(tmp_path)
    data, rows = paired_samples(model, folder), [3, 1500, 7]
    images = open_crops(folder, SIDE, flip=True).images(rows)
    source = to_float(LowResolution(2)(images, rows))
    assert data.conditions is not None
    torch.testing.assert_close(data.conditions(rows)["source"], source, rtol=0, atol=0)
    torch.testing.assert_close(data.images(rows), (to_float(images) - enlarge(source, 2)) / 0.2)
    torch.testing.assert_close(model.decode(data.images(rows), source), to_float(images))
    other = PairSettings.of(model, degrade="low_resolution:factor=2,blur=3")
    found = paired_samples(model, folder, other).conditions
    assert found is not None and float((found(rows)["source"] - source).abs().max()) > 0.05


def test_what_cannot_be(tmp_path: Path) -> None:
    model, folder = source_model(), pictures(tmp_path / "data")
    for options, words in (
        ({}, "give --data"),
        ({"data": folder, "source": str(folder)}, "give --degrade, not --source"),
        ({"data": folder, "degrade": "low_resolution:factor=4"}, r"sources of shape \(3, 8, 8\), data has \(3, 4, 4\)"),
        ({"data": Data.of(torch.zeros(3, 3, 16, 16, dtype=torch.uint8), conditions=lambda rows: {"text": rows})},
         "need source, found text"),
        ({"data": folder, "init": source_model(residual_std=0.3)}, r"has codec \('residual', 0.3\)"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=words):
            distill_model(model, tmp_path / "out", "reflow", **options)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="--degrade makes the sources of the data, and tiny reads no source image"):
        distill_model(tiny_model(None), tmp_path / "out", "reflow", degrade="blur:std=1")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source_model().save(tmp_path / "teacher")
    data = pictures(tmp_path / "data")
    command = f"distill {tmp_path / 'teacher'} --data {data} --out {tmp_path / 'out'} --method progressive:steps=(1,)"
    more = "--steps 2 --batch-size 4 --precision fp32 --degrade low_resolution:factor=2,noise=5"
    assert main(f"{command} {more}".split()) == 0
    assert "try hasten upscale" in capsys.readouterr().out
    assert load(tmp_path / "out").card["degrade"] == "low_resolution:factor=2,noise=5"
