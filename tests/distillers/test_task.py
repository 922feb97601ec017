"""What a task does for all distillers: float32 students, labels of any count, pairs of latents, limits of time."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.distillers import DistillTask, Student
from hasten.distillers import _dry_run as dry_run
from hasten.distillers._batch_keys import RESERVED_KEYS
from hasten.distillers._dry_run import DryRun, StagePlan, time_limits
from hasten.distillers._features import random_classifier
from hasten.distillers._notices import run_notices
from hasten.distillers._pairs import pair_labels
from hasten.distillers.dmd import FakeScore
from hasten.errors import BadInput
from hasten.nets.critic import Critic
from hasten.nets.unet import UNet
from hasten.pick import pick
from hasten.predictions import V
from hasten.schedules import VPCosine
from hasten.train.trained_module import TrainedModule

from ._images import Squares, image_task
from ._toy import Draws, Steady, task, toy

# ---- half precision ----


def test_a_half_precision_teacher_trains_the_student_of_its_float32_copy(tmp_path: Path) -> None:
    """In float16 a hundred steps of AdamW move the weights by 20 times their size, or not at all."""
    students: dict[torch.dtype, Denoiser] = {}
    for dtype in (torch.float16, torch.float32):
        base = toy().to(torch.float16).to(dtype)
        job = DistillTask(base, base, Draws(128), (2,), tmp_path / str(dtype), steps=Steady(60), show=False)  # type: ignore[arg-type]
        students[dtype] = pick("distillers", "progressive:steps=(4,),lr=0.001").distill(job).denoiser
        assert next(base.parameters()).dtype == dtype, "the teacher is unchanged"
    narrow, wide = students.values()
    assert all(p.dtype == torch.float32 for p in narrow.parameters())
    start = toy().half().float().state_dict()
    moved = sum((v - start[k]).square().sum() for k, v in wide.state_dict().items()) ** 0.5
    apart = sum((v - narrow.state_dict()[k]).square().sum() for k, v in wide.state_dict().items()) ** 0.5
    assert moved > 0.1 and apart < 0.3 * moved, (moved, apart)


@pytest.mark.parametrize(
    "method", ["dmd", "adversarial", "diffusion_gan:critic=heads", "diffusion_gan", "sft_pg:steps=2"]
)
def test_critics_take_the_features_of_a_half_precision_network(method: str, tmp_path: Path) -> None:
    job = image_task(tmp_path, steps=1)
    job.denoiser.to(torch.bfloat16)
    students: list[Student] = []
    job.save_student = lambda name, student: students.append(student)
    pick("distillers", method).distill(job)
    assert students and all(p.dtype == torch.float32 for p in students[-1].denoiser.parameters())
    assert next(job.denoiser.parameters()).dtype == torch.bfloat16


def test_averages_follow_steps_that_half_precision_would_lose() -> None:
    """The average of a weight that drifts by less than its last bit a step: both are made float32."""
    net = nn.Linear(8, 8).to(torch.bfloat16)
    trained = task(Path()).trained_module("student", net, lambda batch: torch.zeros(()), 1e-3)
    assert trained.module.weight.dtype == torch.float32  # type: ignore[union-attr]
    assert trained.optimizer().param_groups[0]["params"][0].dtype == torch.float32


def test_weights_of_eight_bits_are_refused(tmp_path: Path) -> None:
    net = nn.Linear(8, 8)
    net.weight.data = net.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(BadInput, match="weights weight are float8_e4m3fn .*cannot be trained"):
        task(tmp_path).trained_module("student", net, lambda batch: torch.zeros(()), 1e-3)


def test_a_custom_loop_refuses_half_precision_weights() -> None:
    trained = TrainedModule("model", nn.Linear(2, 2).half(), lambda batch: torch.zeros(()))
    with pytest.raises(BadInput, match="model: the weights weight are float16, .*float32"):
        trained.optimizer()


def test_a_notice_says_that_students_are_float32() -> None:
    assert run_notices(pick("distillers", "dmd"), toy().half(), 8, 1) == [
        "the teacher's weights are float16: students are trained and saved in float32"
    ]
    assert run_notices(pick("distillers", "dmd"), toy(), 8, 4) == []


@pytest.mark.parametrize(
    "method, notice", [("mmd", True), ("rcfd", True), ("rcfd:beta=0", False), ("reflow:coupling=ot", True), ("reflow", False),
                     ("progressive", False)],
)  # fmt: skip
def test_a_method_that_compares_samples_says_that_its_batches_are_split(method: str, notice: bool) -> None:
    lines = run_notices(pick("distillers", method), toy(), 128, 4)
    assert bool(lines) == notice and all("32 of the 128" in line for line in lines)
    assert not run_notices(pick("distillers", method), toy(), 128, 1)


# ---- labels ----


def labelled(
    out: Path, classes: int = 2, null: int | None = None, known: int | None = None, steps: int = 1
) -> DistillTask:
    """A task on the squares whose network knows `classes` labels and has this null label."""
    torch.manual_seed(0)
    net = UNet(1, widths=(8,), classes=classes, embedding=16)
    net.null_label = None
    base = Denoiser(net, VPCosine(offset=0.0), V(), null_label=null)
    base.requires_grad_(False).eval()
    return DistillTask(
        base, base, Squares(), (1, 16, 16), out, steps=Steady(steps), show=False, classes=known, codec="image"
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("null", [None, 0, 1, 2])
def test_any_null_label_or_none_leaves_the_classes_as_they_are(null: int | None, tmp_path: Path) -> None:
    job = labelled(tmp_path, null=null)
    assert job.label_count == 2
    pairs = job.pairs("x", 8, steps=2)
    assert set(pairs[list(range(8))]["label"].tolist()) == {0, 1} - {null}
    for condition in (
        FakeScore(job.student(), job.shape).head.condition, Critic(job.denoiser, job.shape).heads.condition,
        FakeScore(job.student(), job.shape, job.label_count, job.one_cond()).head.condition,
    ):  # fmt: skip
        assert condition.label.num_embeddings == 3  # type: ignore[union-attr]
    assert random_classifier(job).classes == 2


@pytest.mark.parametrize("method", ["dmd", "adversarial", "diffusion_gan:critic=heads", "mmd", "rcfd:steps=(2,),share=1",
                                    "sft_pg:steps=2", "denoising_student:pairs=8,pair_steps=2"])  # fmt: skip
def test_a_network_with_classes_and_no_null_label_is_distilled(method: str, tmp_path: Path) -> None:
    """Every evaluation passes a label, also where a critic reads its features for the first time."""
    job = labelled(tmp_path, known=2)
    embed = job.denoiser.net.embed

    def checked(time: Tensor, label: Tensor | None = None, **more: Any) -> Tensor:
        assert label is not None, "needs label="
        return embed(time, label=label, **more)

    job.denoiser.net.embed = checked  # type: ignore[method-assign, assignment]
    assert isinstance(pick("distillers", method).distill(job), Student)


def test_labels_of_pairs_exclude_the_null_label() -> None:
    config = {"labels": "turns", "classes": 4, "block": 8, "seed": 0}
    indices = torch.arange(12)
    assert pair_labels(config, indices).tolist() == [0, 1, 2, 3] * 3
    assert pair_labels({**config, "null_label": 1}, indices).tolist() == [0, 2, 3] * 4
    random = pair_labels({**config, "labels": "random", "null_label": 0}, torch.arange(400))
    assert set(random.tolist()) == {1, 2, 3}


@pytest.mark.parametrize("method", ["dmd", "mmd:share=1", "denoising_student:pairs=130,pair_steps=2"])
def test_a_hundred_classes(method: str, tmp_path: Path) -> None:
    class Many:
        batch_size = 4

        def __getitem__(self, step: int) -> dict[str, Tensor]:
            g = torch.Generator().manual_seed(step)
            return {"x": torch.randn(4, 1, 16, 16, generator=g), "label": torch.tensor([99, 3, 65, 64])}

    job = labelled(tmp_path, classes=100, known=100)
    job.batches = Many()  # type: ignore[assignment]
    assert isinstance(pick("distillers", method).distill(job), Student)


# ---- pairs ----


class LargeSamples(nn.Module):
    """A teacher whose samples lie far outside of [-1, 1], as latents do."""

    schedule = VPCosine(offset=0.0)

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        return torch.full_like(x, 3.21)


@pytest.mark.parametrize("codec, dtype", [("latent", "float32"), (None, "float32"), ("image", "uint8")])
def test_only_images_are_stored_in_eight_bits(codec: str | None, dtype: str, tmp_path: Path) -> None:
    job = image_task(tmp_path, codec=codec)
    job.teacher = LargeSamples()
    pairs = job.pairs("x", 4, steps=2)
    assert pairs.config["dtype"] == dtype
    assert pairs[0]["x"].max().item() == pytest.approx(1.0 if dtype == "uint8" else 3.21)


@pytest.fixture
def file_limit() -> Iterator[int]:
    """A process that may have only 20 files more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len(list(Path("/proc/self/fd").iterdir())) + 20 if Path("/proc/self/fd").is_dir() else 128
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_store_of_many_files_is_read_with_few_open(
    file_limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasten.distillers._pairs.MAX_OPEN_FILES", 8)
    job = image_task(tmp_path)
    job.teacher = LargeSamples()
    pairs = job.pairs("x", 160, steps=2, states=(0.5,), sampler="ddim", times="trailing", block=2, batch_size=2)
    assert len(list(pairs.folder.glob("*.npy"))) == 160 > file_limit
    batch = pairs[torch.randperm(160)]
    assert len(batch["x"]) == len(batch["states"]) == 160 and len(pairs._maps) <= 8


def test_an_ordinary_limit_holds_as_many_files_as_are_open() -> None:
    from hasten.distillers._pairs import MAX_OPEN_FILES

    assert MAX_OPEN_FILES <= 128  # of the 256 that macOS gives a process, 1,024 on Linux


# ---- batches ----


@pytest.mark.parametrize("key", RESERVED_KEYS)
@pytest.mark.parametrize("kind", [DistillTask, DryRun])
def test_keys_that_distillers_use_are_refused(kind: type[DistillTask], key: str, tmp_path: Path) -> None:
    class More(Draws):
        def __getitem__(self, step: int) -> dict[str, Tensor]:
            return {**super().__getitem__(step), key: torch.zeros(self.batch_size)}

    base = toy()
    job = kind(base, base, More(8), (2,), tmp_path, steps=Steady(1), show=False)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=f"batches have the key '{key}'"):
        pick("distillers", "progressive:steps=(2,)").distill(job)
    assert not any(tmp_path.iterdir())


# ---- time ----


def test_a_slow_stage_ends_when_its_minutes_are_over(tmp_path: Path) -> None:
    job = task(tmp_path, 1000, batch_size=8, minutes={"steps2": 0.2 / 60})
    pick("distillers", "progressive:steps=(2,)").distill(job)
    log = (tmp_path / "stages" / "0-steps2" / "log.jsonl").read_text().splitlines()
    last = json.loads(log[-1])
    assert 0 < last["step"] < 1000 and last["lr_factor"] < 1e-6, "the learning rate still ends at zero"


def test_the_minutes_of_the_stages_are_a_tenth_more_than_the_budget() -> None:
    stages = [StagePlan("pairs", 1.0, 0.6, pairs=100), StagePlan("a", 1.0, 1.0), StagePlan("b", 1.0, 1.0, share=3.0)]
    assert time_limits(stages, 5.0) == pytest.approx({"a": 1.1, "b": 3.3})


def test_times_are_read_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: waits.append(1))
    assert dry_run.synchronized_clock(torch.device("cpu")) > 0 and not waits
    assert dry_run.synchronized_clock(torch.device("cuda")) > 0 and waits


def test_every_time_of_a_dry_run_is_read_that_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a clock that only advances with synchronisation, the cost of each loss is exact."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(dry_run, "synchronized_clock", lambda device: float(next(ticks)))
    job = task(tmp_path, batch_size=32)
    measured = DryRun(job.teacher, job.denoiser, job.batches, job.shape, tmp_path, show=False)
    pick("distillers", "denoising_student:pairs=32,pair_steps=2").distill(measured)
    assert [stage.seconds for stage in measured.stages] == [pytest.approx(1 / 32), 1.0]


def test_event_files_are_written_where_tensorboard_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pick("distillers", "progressive:steps=(2,)").distill(task(tmp_path, 2, batch_size=8))
    assert list((tmp_path / "stages" / "0-steps2" / "tensorboard").iterdir())
