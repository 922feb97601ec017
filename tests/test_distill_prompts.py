"""Pipelines that read prompts: their students open in hasten and in diffusers alike, or are refused before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hasten
from hasten.cli import main
from hasten.distillers import DistillTask
from hasten.errors import BadInput
from hasten.model import Model
from hasten.train.data import Data
from hasten.train.trained_module import TrainedModule
from hasten.workflows import students
from hasten.workflows.distill import distill_model
from tests.adapters import tiny

TEXTS = ("a cat", "a dog", "the red cat", "blue dog", "big red dog", "a photo of the cat", "a cat", "the dog")
COMMON: Any = {"steps": 4, "batch_size": 4, "precision": "fp32", "show": False, "guidance_scale": 3.0}
DETERMINISTIC = [
    "guided:steps=(2,)", "guided:steps=(2,),guidance=none",
    "consistency:nodes=8,grid=trailing,solver=euler,guidance=(1,4),steps=1", "diffusion_gan:steps=1",
]  # fmt: skip
OTHERS = [
    "progressive:steps=(2,)", "tract:phases=(4,2)", "consistency:steps=1", "adversarial:steps=1", "dmd",
    "rcfd:features=random,beta=0,steps=(4,2)", "mmd:features=random,steps=2", "prodiff",
    "diffusion_gan:critic=heads,steps=1", "denoising_student:pairs=8,pair_steps=2", "reflow:pairs=8,pair_steps=2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(students, "PREVIEW_PROMPTS", 1)


def data(**more: Any) -> Data:
    images = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Data.of(images, **{"captions": TEXTS, **more})


def same_in_diffusers(folder: Path, scale: float, text: str = "the red cat") -> Model:
    """The student, whose image is that of the stock pipeline at this guidance scale."""
    from diffusers import DiffusionPipeline

    student = hasten.load(folder)
    pipe = tiny.quiet(DiffusionPipeline.from_pretrained(folder))
    latents = hasten.Noise(range(1), student.shape).initial()
    ours = student.sample(1, text, seed=0, guidance_scale=scale)
    theirs = pipe(text, latents=latents, num_inference_steps=student.steps, guidance_scale=scale, output_type="pt")
    torch.testing.assert_close(2 * theirs.images - 1, ours, rtol=0, atol=2e-3)
    assert not torch.allclose(ours, student.sample(1, "a dog", seed=0, guidance_scale=scale), atol=1e-4)
    return student


def check(method: str, out: Path, pipe: Any) -> None:
    """Distil, and compare; a student with one scale needs guidance switched off in diffusers."""
    distill_model(hasten.load(pipe), out, method, data(), **COMMON)
    student = hasten.load(out)
    low, high = student.denoiser.guidance_range or (0.0, 0.0)
    built_in = 1.0 if method.startswith("mmd") else 3.0
    assert (low, high) == (
        (1.0, 5.0) if method == "guided:steps=(2,)" else (1.0, 4.0) if low < high else (built_in,) * 2
    )
    readme = (out / "README.md").read_text()
    if low < high:
        same_in_diffusers(out, 2.5)
        assert f"guidance_scale={student.guidance_scale:g}" in readme
        one, two = (student.sample(1, "a cat", guidance_scale=scale) for scale in (low, high))
        assert not torch.equal(one, two), "the network reads the scale"
    else:
        from diffusers import DiffusionPipeline

        opened = tiny.quiet(DiffusionPipeline.from_pretrained(out))
        latents = hasten.Noise(range(1), student.shape).initial()
        theirs = opened(
            "a cat", latents=latents, num_inference_steps=student.steps, guidance_scale=1.0, output_type="pt"
        )
        torch.testing.assert_close(2 * theirs.images - 1, student.sample(1, "a cat"), rtol=0, atol=2e-3)
        assert "guidance_scale=1)" in readme
    with pytest.raises(BadInput, match="this student was distilled for guidance_scale"):
        student.sample(1, "a cat", guidance_scale=7.0)


@pytest.mark.parametrize("method", [*DETERMINISTIC, *(pytest.param(m, marks=pytest.mark.slow) for m in OTHERS)])
def test_a_student_draws_the_same_in_hasten_and_in_diffusers(tmp_path: Path, method: str) -> None:
    check(method, tmp_path / "o", tiny.sd_pipeline(scheduler=tiny.scheduler(prediction_type="v_prediction")))


@pytest.mark.parametrize("method", ["guided:steps=(1,),guidance=(1,4)", pytest.param("diffusion_gan:steps=1", marks=pytest.mark.slow)])  # fmt: skip
def test_students_of_sdxl(tmp_path: Path, method: str) -> None:
    """Whose network has a pooled embedding and sizes as conditions too."""
    check(method, tmp_path / "o", tiny.sdxl_pipeline())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_trained_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    pipe = tiny.sd_pipeline().to(dtype)
    distill_model(hasten.load(pipe), tmp_path / "o", "progressive:steps=(1,)", data(), **COMMON)
    assert pipe.unet.dtype == dtype and hasten.load(tmp_path / "o").denoiser.net.dtype == torch.float32
    from diffusers import DiffusionPipeline

    assert f"torch_dtype={dtype})" in (tmp_path / "o" / "README.md").read_text()
    opened = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path / "o", torch_dtype=dtype))
    assert opened("a cat", num_inference_steps=1, guidance_scale=1.0, output_type="pt").images.isfinite().all()
    assert hasten.load(tmp_path / "o").sample(1, "a cat").isfinite().all()


def test_prompts_alone_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.sd_pipeline().save_pretrained(tmp_path / "sd")
    (tmp_path / "p.txt").write_text("\n".join(TEXTS))
    out = tmp_path / "o"
    rest = ["--device", "cpu", "--steps", "2", "--batch-size", "4", "--precision", "fp32", "--out", str(out)]
    given = ["--prompts", str(tmp_path / "p.txt")]
    method = ["--method", "denoising_student:pairs=8,pair_steps=2,sampler=ddim,times=trailing"]
    assert main(["distill", str(tmp_path / "sd"), *given, *method, *rest, "--guidance-scale", "2"]) == 0
    student = hasten.load(out)
    assert student.sample(1, "a cat").shape == (1, 3, 16, 16) and student.denoiser.guidance_range == (2.0, 2.0)
    stored = json.loads((out / "pairs/teacher/pairs.json").read_text())["how"]
    assert stored["captions"] == 8 and stored["guidance_scale"] == 2.0
    np.save(tmp_path / "x.npy", np.zeros((4, 16, 16, 3), np.uint8))
    for arguments, message in (
        ([*given, "--method", "progressive"], "progressive needs real images, with captions"),
        (["--method", "denoising_student"], "takes prompts: give some, --prompts FILE"),
        ([*given, *method, "--data", str(tmp_path / "x.npy")], "--data has its own captions"),
        (["--method", "progressive", "--data", str(tmp_path / "x.npy")], "x.npy has no captions"),
        ([*given, *method, "--optimizer", "adamw8bit"], "the optimizer adamw8bit|the optimiser adamw8bit runs on CUDA"),
        ([*given, "--method", "dsno"], "has no place for"),
        ([*given, "--method", "encoder", "--data", str(tmp_path)], "give --data or --prompts|has its own captions"),
    ):
        capsys.readouterr()
        assert main(["distill", str(tmp_path / "sd"), *arguments, *rest[:-1], str(tmp_path / "no")]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert any(part in error for part in message.split("|")), error
    assert not (tmp_path / "no").exists()


def test_what_a_pipeline_has_no_place_for_is_refused(tmp_path: Path) -> None:
    model = hasten.load(tiny.sd_pipeline())
    for method, message in (
        ("guided:shared=true", "has no place for"),
        ("encoder", "cannot be saved: pipelines make images from noise"),
        ("rcfd", "takes prompts: use rcfd:features=random,beta=0"),
        ("mmd", "takes prompts: use mmd:features=random"),
    ):
        with pytest.raises(BadInput, match=message):
            distill_model(model, tmp_path / "o", method, data(), **COMMON)
    sd3 = hasten.load(tiny.sd3_pipeline())
    with pytest.raises(BadInput, match="cannot take a guidance scale as an input"):
        distill_model(sd3, tmp_path / "o", "guided:steps=(2,)", data(), **COMMON)
    with pytest.raises(BadInput, match="samples alone are not enough"):
        distill_model(model, tmp_path / "o", "progressive", torch.zeros(4, 4, 8, 8), **COMMON)
    with pytest.raises(BadInput, match="has no gradient checkpointing"):
        task_of(hasten.load("fashion"), gradient_checkpointing=True).student()
    assert not (tmp_path / "o").exists()


def task_of(model: Model, **more: Any) -> DistillTask:
    batches: Any = [{"x": torch.zeros(1, *model.shape)}]
    return DistillTask(model.denoiser, model.denoiser, batches, model.shape, Path("unused"), **more)


def test_a_run_that_was_interrupted_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = "guided:steps=(2,),guidance=none"
    distill_model(hasten.load(tiny.sd_pipeline()), tmp_path / "one", method, data(), **COMMON)
    real = DistillTask.fit

    def stopped(self: DistillTask, name: str, *rest: Any, **more: Any) -> Any:
        if name == "steps2" and type(self) is DistillTask:
            raise KeyboardInterrupt
        return real(self, name, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(DistillTask, "fit", stopped)
        with pytest.raises(KeyboardInterrupt):
            distill_model(hasten.load(tiny.sd_pipeline()), tmp_path / "two", method, data(), **COMMON)
    with pytest.raises(BadInput, match="another data"):  # the same images under other captions are another run
        distill_model(hasten.load(tiny.sd_pipeline()), tmp_path / "two", method, data(captions=TEXTS[::-1]), **COMMON)
    distill_model(hasten.load(tiny.sd_pipeline()), tmp_path / "two", method, data(), **COMMON)
    one, two = (hasten.load(tmp_path / name).denoiser.state_dict() for name in ("one", "two"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_a_scale_that_is_an_input_can_be_built_in() -> None:
    """An LCM's network at one scale ignores that input, and is the same up to rounding."""
    from hasten.adapters.diffusers.wrap import split_network

    net: Any = split_network(tiny.unet2d_condition())
    ranged = net.with_guidance()
    x, time, text = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 500.0]), torch.randn(2, 5, 16)
    scale = torch.full((2,), 4.5)
    with torch.no_grad():
        torch.testing.assert_close(ranged(x, time, text=text, guidance=scale), net(x, time, text=text))  # zero at first
        torch.nn.init.normal_(ranged.net.time_embedding.cond_proj.weight, std=0.2)
        expected = ranged(x, time, text=text, guidance=scale)
        assert not torch.allclose(expected, net(x, time, text=text), atol=1e-3)
        torch.testing.assert_close(ranged.fixed(4.5)(x, time, text=text), expected, rtol=1e-4, atol=1e-4)
        other = ranged.fixed(4.5)(x, time, text=text, guidance=torch.full((2,), 9.0))
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-4)  # an LCM's pipeline passes its own


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = hasten.load(tiny.sd_pipeline())
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), {"text": torch.randn(2, 5, 16)}
    gradients = []
    for on in (False, True):
        student = task_of(model, gradient_checkpointing=on).student()
        assert student.net.net.is_gradient_checkpointing == on  # type: ignore[union-attr]
        student.raw(x, t, **cond).square().mean().backward()
        gradients.append([p.grad for p in student.parameters()])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two)


def test_8_bit_adamw_needs_cuda_and_its_package() -> None:
    net = torch.nn.Linear(2, 2)
    module = TrainedModule("net", net, lambda batch: net.weight.sum(), optimiser="paged-adamw8bit")
    with pytest.raises(BadInput, match="paged-adamw8bit runs on CUDA, not on cpu"):
        module.optimizer()
