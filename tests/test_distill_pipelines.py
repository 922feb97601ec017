"""Pipelines of diffusers: their students open again in hasten and in diffusers, or are refused before training."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hasten
from hasten.adapters.diffusers import saving as _saving
from hasten.cli import main
from hasten.errors import BadInput
from hasten.model import Model
from hasten.pick import pick
from hasten.plan import plan as compile_plan
from hasten.workflows.distill import distill_model
from tests.adapters import tiny

COMMON: Any = {"steps": 6, "batch_size": 4, "precision": "fp32", "show": False}
OPENS = """
import json, sys
from diffusers import DiffusionPipeline
def kind(folder):
    try:
        return type(DiffusionPipeline.from_pretrained(folder).scheduler).__name__
    except ValueError as e:
        return str(e)
alone = [kind(folder) for folder in sys.argv[1:]]
import hasten
print(json.dumps([alone, [kind(folder) for folder in sys.argv[1:]]]))
"""


def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The scheduler's class, or the error, where nobody has imported hasten, and where somebody has."""
    from diffusers import DiffusionPipeline

    def kind() -> str:
        try:
            return type(DiffusionPipeline.from_pretrained(folder).scheduler).__name__
        except ValueError as e:
            return str(e)

    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name == "hasten" or name.startswith("hasten.")]:
            patch.delitem(sys.modules, name)
        alone = kind()
    return alone, kind()


def classes(pipe_classes: int = 5, null: bool = True) -> Model:
    """Of a class-conditional U-Net; null: the last of its classes means none."""
    import diffusers

    net = tiny.unet2d(num_class_embeds=pipe_classes)
    model = hasten.load(diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(prediction_type="v_prediction")))
    if not null:
        return model
    denoiser = model.denoiser.replace(null_label=pipe_classes - 1)
    return replace(model, denoiser=denoiser, classes=tuple(f"c{k}" for k in range(pipe_classes - 1)))


def data(folder: Path, side: int = 8, count: int | None = None) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (16, side, side, 3), dtype=np.uint8)
    np.savez(folder / "data.npz", images=pixels, **({} if count is None else {"labels": np.arange(16) % count}))  # type: ignore[arg-type]
    return folder / "data.npz"


def test_students_open_in_hasten_and_in_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDIM's students and consistency's on the trailing grid with diffusers alone, any other after `import hasten`."""
    images = data(tmp_path)
    distill_model(hasten.load(tiny.ddpm_pipeline()), tmp_path / "ddim", "progressive:steps=(2,)", images, **COMMON)
    distill_model(hasten.load(tiny.ddpm_pipeline()), tmp_path / "lcm", "diffusion_gan:steps=4", images, **COMMON)
    few("consistency", 2, times="angle").save(tmp_path / "own")
    for name in ("ddim", "lcm", "own"):
        student = hasten.load(tmp_path / name)
        assert student.card["distilled"]["steps"] == student.plan.nfe and student.sample(2).isfinite().all()  # type: ignore[union-attr]
        card = (tmp_path / name / "README.md").read_text()
        assert f"num_inference_steps={student.plan.nfe}" in card and ("import hasten" in card) == (name == "own")  # type: ignore[union-attr]
    pipe = tiny.ddpm_pipeline()
    pipe.scheduler = hasten.as_scheduler("unipc:order=3", like=pipe)
    pipe.save_pretrained(tmp_path / "saved")
    for name, kind in (("ddim", "DDIMScheduler"), ("lcm", "LCMScheduler")):
        assert opened(tmp_path / name, monkeypatch) == (kind, kind)
    for name in ("own", "saved"):
        alone, after = opened(tmp_path / name, monkeypatch)
        assert "import hasten before calling `from_pretrained`" in alone and after == "PlanScheduler"
    assert hasten.load(tmp_path / "saved").shape == (3, 8, 8), "hasten needs no import of its own"


@pytest.mark.slow
def test_in_a_fresh_process_too(tmp_path: Path) -> None:
    few("ddim", 4).save(tmp_path / "ddim")
    few("unipc", 4).save(tmp_path / "own")
    folders = [str(tmp_path / name) for name in ("ddim", "own")]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", OPENS, *folders], capture_output=True, text=True)
    alone, after = json.loads(done.stdout.splitlines()[-1])
    assert alone[0] == after[0] == "DDIMScheduler" and after[1] == "PlanScheduler"
    assert "import hasten before calling `from_pretrained`" in alone[1]


def few(sampler: str, n: int, prediction: str = "epsilon", times: str = "trailing", **table: Any) -> Model:
    """A model with a plan of n steps, as a student has."""
    model = hasten.load(tiny.ddpm_pipeline(prediction_type=prediction, **table))
    law = pick("times", times)(model.denoiser.schedule, n)
    compiled = compile_plan(pick("samplers", sampler), model.denoiser.schedule, law)
    return replace(model, plan=compiled, steps=n, sampler=sampler, times=times, card={"distilled": {"steps": n}})


def run(scheduler: Any, x: torch.Tensor, n: int) -> torch.Tensor:
    """As a pipeline runs it, with a network that returns half of its input and a little of the time."""
    scheduler.set_timesteps(n)
    g = torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        prediction = 0.5 * scheduler.scale_model_input(x, t) + 0.01 * float(t) / 1000
        x = scheduler.step(prediction, t, x, generator=g).prev_sample
    return x


@pytest.mark.parametrize("sampler", ["ddim", "consistency", "ddpm"])
@pytest.mark.parametrize("table", [{"prediction": "epsilon"}, {"prediction": "sample", "beta_schedule": "scaled_linear"},
                                   {"prediction": "v_prediction", "rescale_betas_zero_snr": True}])  # fmt: skip
def test_a_scheduler_of_diffusers_makes_exactly_the_plans_steps(sampler: str, table: dict[str, Any]) -> None:
    for n, kind in ((1, "DDIM"), (2, sampler), (4, sampler), (8, sampler)):
        model = few(sampler, n, **table)
        stock = _saving.stock_scheduler(model)
        if not (table.get("rescale_betas_zero_snr") and n == 2):  # from pure noise DDPM forgets as consistency does
            names = {"ddim": "DDIM", "consistency": "LCM", "ddpm": "DDPM"}
            assert type(stock).__name__ == names.get(kind, kind) + "Scheduler"
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        ours = run(hasten.as_scheduler(model.plan, like=model), x, n)
        torch.testing.assert_close(run(stock, x, n), ours, rtol=2e-4, atol=2e-4)


def test_a_scheduler_that_would_only_come_near_is_not_taken() -> None:
    assert _saving.stock_scheduler(few("ddim", 16)) is None  # which does not divide 1000: its times are fractional
    assert _saving.stock_scheduler(few("ddim", 4, times="angle")) is None
    assert _saving.stock_scheduler(few("unipc", 4)) is None
    assert _saving.stock_scheduler(few("ddim:eta=0.5", 4)) is None
    assert type(_saving.stock_scheduler(few("ddim", 4))).__name__ == "DDIMScheduler"
    learned = few("ddim", 4)  # a learned variance would go to a scheduler that does not know it
    learned.denoiser.net.net.register_to_config(out_channels=6)
    assert _saving.stock_scheduler(learned) is None
    assert type(_saving.scheduler_of(few("unipc", 4))).__name__ == "PlanScheduler"


def test_what_diffusers_cannot_express_is_a_folder_of_hasten(tmp_path: Path) -> None:
    """A further input, and an encoder: a pipeline would draw something else from them, or nothing."""
    images = data(tmp_path, count=4)
    for method in ("encoder:steps=(4,)", "guided:steps=(4,2),guidance=(1,3),shared=true"):
        out = tmp_path / method.replace(":", "-").replace("(", "").replace(")", "")
        distill_model(classes(), out, method, images, **{**COMMON, "steps": 12})
        assert not (out / "model_index.json").exists()
        student = hasten.load(out)
        assert student.classes == ("c0", "c1", "c2", "c3") and student.denoiser.null_label == 4
        if method.startswith("guided"):
            assert student.denoiser.guidance_range == (1.0, 3.0)
            one, two = (student.sample(1, guidance_scale=scale) for scale in (1.0, 3.0))
            assert one.isfinite().all() and one.shape == two.shape == (1, 3, 8, 8)
            assert not torch.equal(one, two), "the network reads the scale"


def test_classes_and_null_label_come_back_with_a_pipelines_student(tmp_path: Path) -> None:
    images = data(tmp_path, count=4)
    distill_model(classes(), tmp_path / "o", "progressive:steps=(2,)", images, guidance_scale=2.0, **COMMON)
    student = hasten.load(tmp_path / "o")
    assert (tmp_path / "o" / "unet").is_dir() and student.classes == ("c0", "c1", "c2", "c3")
    assert student.denoiser.null_label == 4 and student.denoiser.guidance_range == (2.0, 2.0)
    assert not torch.equal(student.sample(1, label="c0"), student.sample(1, label="c1"))


def test_latents_of_images(tmp_path: Path) -> None:
    """A DiT: images are encoded, the student is a pipeline with the same autoencoder, its pictures are pixels."""
    import diffusers

    pipe = tiny.quiet(diffusers.DiTPipeline(tiny.dit(num_embeds_ada_norm=4), tiny.vae(), tiny.scheduler()))
    images = data(tmp_path, side=16, count=4)
    distill_model(hasten.load(pipe), tmp_path / "o", "progressive:steps=(2,)", images, **COMMON)
    student = hasten.load(tmp_path / "o")
    assert student.shape == (4, 8, 8) and student.sample(1).shape == (1, 3, 16, 16) and student.codec == "latent"
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "o").scheduler).__name__ == "DDIMScheduler"
    distill_model(hasten.load(pipe), tmp_path / "g", "guided:steps=(2,),guidance=(1,3)", images, **COMMON)
    guided = hasten.load(tmp_path / "g")  # a hasten folder, which holds the decoder too
    assert guided.sample(1, guidance_scale=2).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(("arguments", "message"), [(["quantize", "--steps", "4"], "takes prompts: give --prompt")])
def test_prompts_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    tiny.sd_pipeline().save_pretrained(tmp_path / "sd")
    verb, *rest = arguments
    assert main([verb, str(tmp_path / "sd"), *rest, "--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])
    assert not (tmp_path / "out").exists()


def test_an_export_of_prompts_is_refused_before_it_is_made(tmp_path: Path) -> None:
    from hasten.adapters._export import ExportedNetwork, export_network

    with pytest.raises(BadInput, match="takes prompts"):
        export_network(
            ExportedNetwork, hasten.load(tiny.sd_pipeline()), tmp_path / "out", "fp32", 1, 0, lambda *_: None
        )


def test_tune_and_quantize_of_a_pipelines_folder_end_in_a_model(tmp_path: Path) -> None:
    """Tuned: the pipeline with a scheduler that runs the plan. Quantised: a hasten folder."""
    tiny.ddpm_pipeline().save_pretrained(tmp_path / "pipe")
    tiny.sd_pipeline().save_pretrained(tmp_path / "sd")
    tune = ["--method", "optimized_steps", "--steps", "4", "--n", "2"]
    for name in ("pipe", "sd"):
        more = ["--guidance-scale", "1"] if name == "sd" else []
        assert main(["tune", str(tmp_path / name), "--out", str(tmp_path / f"{name}-t"), *tune, *more]) == 0
        tuned = hasten.load(tmp_path / f"{name}-t")
        assert tuned.plan is not None and tuned.plan.nfe == 4 and tuned.pipeline is not None
        saved = json.loads((tmp_path / f"{name}-t" / "model_index.json").read_text())["scheduler"]
        assert saved == ["hasten", "PlanScheduler"]
        assert torch.equal(tuned.denoiser.net.state_dict()["net.conv_in.weight"],
                           hasten.load(tmp_path / name).denoiser.net.state_dict()["net.conv_in.weight"])  # fmt: skip
    small = tmp_path / "small"
    assert main(["quantize", str(tmp_path / "pipe"), "--steps", "4", "--images", "2", "--out", str(small)]) == 0
    assert hasten.load(small).sample(1, steps=4).isfinite().all() and not (small / "model_index.json").exists()


def test_a_damaged_weights_file_is_refused(tmp_path: Path) -> None:
    hasten.load(tiny.ddpm_pipeline()).save(tmp_path / "p")
    file = next((tmp_path / "p" / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(BadInput, match="is not the file that model.json names"):
        hasten.load(tmp_path / "p")


def test_only_networks_with_an_adapter_are_built(tmp_path: Path) -> None:
    model = replace(hasten.load(tiny.ddpm_pipeline()), pipeline=None)
    model.save(tmp_path / "m")
    file = tmp_path / "m" / "model.json"
    description = json.loads(file.read_text())
    assert description["net"]["library"] == "diffusers" and description["net"]["class"] == "UNet2DModel"
    assert torch.equal(hasten.load(tmp_path / "m").sample(1, steps=2), model.sample(1, steps=2))
    description["net"]["class"] = "DiffusionPipeline"
    file.write_text(json.dumps(description))
    with pytest.raises(BadInput, match="unknown network 'DiffusionPipeline' of diffusers: known are UNet2DModel"):
        hasten.load(tmp_path / "m")


def test_a_flow_takes_sigma_in_a_folder_of_hasten_too(tmp_path: Path) -> None:
    import diffusers

    pipe = diffusers.DDPMPipeline(tiny.unet2d(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    model = replace(hasten.load(pipe), pipeline=None)
    model.save(tmp_path / "m")
    t = torch.tensor(0.3)
    again = hasten.load(tmp_path / "m")
    assert float(again.denoiser.time_input(t)) == pytest.approx(float(model.denoiser.time_input(t)))
    assert torch.equal(again.sample(1, steps=2), model.sample(1, steps=2))


def test_a_network_that_its_config_does_not_describe_is_refused(tmp_path: Path) -> None:
    """Adapters, fused projections, reparametrised weights: diffusers would open it with random weights in their place."""
    pipe = tiny.ddpm_pipeline()
    torch.nn.utils.parametrizations.weight_norm(pipe.unet.conv_in)
    for call in (
        lambda: hasten.load(pipe).save(tmp_path / "o"),
        lambda: distill_model(hasten.load(pipe), tmp_path / "o", "progressive", data(tmp_path), **COMMON),
    ):
        with pytest.raises(BadInput, match=r"other tensors than its config describes, first conv_in.parametrizations"):
            call()
    assert not (tmp_path / "o").exists()


def test_a_prediction_that_diffusers_does_not_know_is_a_folder_of_hasten(tmp_path: Path) -> None:
    """A consistency student of an x0 network is anchored at the clean end; a flow runs by hasten's scheduler."""
    import diffusers

    images = data(tmp_path)
    x0 = diffusers.DDPMPipeline(tiny.unet2d(), diffusers.DDPMScheduler(prediction_type="sample"))
    distill_model(hasten.load(x0), tmp_path / "x0", "consistency", images, **COMMON)
    assert hasten.load(tmp_path / "x0").denoiser.prediction.name == "anchored"
    assert not (tmp_path / "x0" / "model_index.json").exists()
    flow = diffusers.DDPMPipeline(tiny.unet2d(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    distill_model(hasten.load(flow), tmp_path / "flow", "progressive:steps=(2,)", images, **COMMON)
    student = hasten.load(tmp_path / "flow")
    assert type(student.pipeline.scheduler).__name__ == "PlanScheduler"
    x = hasten.Noise(range(1), (3, 8, 8)).initial()
    scheduler, net = student.pipeline.scheduler, student.pipeline.unet
    scheduler.set_timesteps(2)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t).sample, t, x).prev_sample
    assert torch.allclose(x.clamp(-1, 1), student.sample(1, seed=0), atol=1e-4)


def test_images_are_encoded_for_a_tuner_too(tmp_path: Path) -> None:
    from hasten.workflows.tune import calibration_images

    model = hasten.load(tiny.dit_pipeline())
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "i.npy", pixels)
    x, _ = calibration_images(model, tmp_path / "i.npy")(4)
    assert x.shape == (4, 4, 8, 8)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)[order].float() / 127.5 - 1
    torch.testing.assert_close(x, model.decoder.encode(images))
