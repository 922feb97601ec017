"""Public paths beside the methods on a second device (a pretended one): models, pipelines, training, comparisons, files.

As in `test_device`: tensors of two devices in one operation raise, and float64 on MPS; results are those of the CPU; in
the loop over the steps nothing waits for the device and nothing is copied to it.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.compare import compare, comparison
from hasten.denoiser import device_of
from hasten.metrics import make_reference
from hasten.metrics.difference import image_difference, structural_similarity
from hasten.metrics.frechet import frechet_distance, moments
from hasten.metrics.kid import polynomial_mmd2
from hasten.metrics.nearest_images import nearest_distances
from hasten.metrics.paired import psnr_by_image
from hasten.metrics.precision_recall import manifold
from hasten.metrics.prompt_match import prompt_diversity, prompt_match
from hasten.performance import cost
from hasten.performance.runtime import probe
from hasten.train.coupling import optimal_assignment
from hasten.train.data import Batches
from hasten.train.fit import Fit
from hasten.train.losses import DenoisingLoss
from hasten.train.trained_module import TrainedModule

from .factories import noise_data, noise_images, tiny_denoiser, tiny_model
from .pretend import Pretended, put, put_pipeline, taken

STEPS = 4


def close(made: Any, expected: Any, atol: float = 2e-4) -> None:
    torch.testing.assert_close(taken(made), expected, atol=atol, rtol=1e-4)


# ---- models and pipelines ----


def test_a_model_moves_and_samples() -> None:
    how: dict[str, Any] = {"sampler": "unipc", "times": "lambda", "steps": STEPS, "guidance_scale": 2.0}
    expected = tiny_model().sample(2, **how)
    with Pretended("mps") as device:
        model = tiny_model().to("mps")
        assert model.device.type == "mps"
        made = model.sample(2, callback=device.watch(), **how)
    assert made.device.type == "cpu" and not device.loop, device.lines(events=device.loop)
    close(made, expected)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_pipeline_as_a_model(name: str) -> None:
    tiny = pytest.importorskip("tests.adapters.tiny")
    how: dict[str, Any] = {"steps": STEPS, "guidance_scale": 3.0, "sampler": "unipc"}
    make = getattr(tiny, f"{name}_pipeline")
    expected = hasten.load(make()).sample(2, "a cat", **how)
    with Pretended("mps") as device:
        made = hasten.load(put_pipeline(make())).sample(2, "a cat", callback=device.watch(), **how)
    assert not device.loop, device.lines(events=device.loop)
    close(made, expected)


@pytest.mark.parametrize(("name", "sampler"), [("sd", "unipc"), ("sd", "ddpm"), ("sd3", "heun")])
def test_the_scheduler_in_a_pipeline(name: str, sampler: str) -> None:
    tiny = pytest.importorskip("tests.adapters.tiny")

    def run(pipe: Any, callback: Any) -> Any:
        pipe.scheduler = hasten.as_scheduler(sampler, like=pipe)

        def step(_: Any, number: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
            callback(number)
            return values

        call = {"prompt": "a cat", "num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 3.0}
        generator = torch.Generator().manual_seed(2)
        return pipe(**call, generator=generator, callback_on_step_end=step).images

    make = getattr(tiny, f"{name}_pipeline")
    expected = run(make(), lambda number: None)
    with Pretended("mps") as device:
        made = run(put_pipeline(make()), device.watch())
    kinds = {kind for kind, _ in device.loop}
    assert kinds <= ({"upload"} if sampler == "ddpm" else set()), device.lines(events=device.loop)  # draws on the CPU
    close(made, expected)


def test_what_other_pipelines_ask_of_a_scheduler() -> None:
    tiny = pytest.importorskip("tests.adapters.tiny")
    x, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)

    def run(device: str) -> list[Tensor]:
        scheduler = hasten.as_scheduler("ddim", like=tiny.sd_pipeline())
        scheduler.set_timesteps(STEPS, device=device)
        times = scheduler.timesteps[1:3]
        noised = scheduler.add_noise(x.to(device), noise.to(device), times)
        return [noised, scheduler.get_velocity(x.to(device), noise.to(device), times)]

    expected = run("cpu")
    with Pretended("mps"):
        made = run("mps")
    close(made, expected)


def test_a_lora_and_another_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = pytest.importorskip("tests.adapters.tiny")
    from hasten.storage.lora_files import LoRAFile, write_lora

    from .adapters.test_lora import factors_for

    pipe = tiny.sd_pipeline()
    file = write_lora(LoRAFile({"unet": factors_for(pipe.unet)}), tmp_path / "lora.safetensors", "diffusers")
    light = tiny.vae()
    for p in light.decoder.parameters():
        p.mul_(1.1)
    monkeypatch.setattr("hasten.adapters.diffusers.autoencoders.open_autoencoder", lambda *_: copy.deepcopy(light))
    how: dict[str, Any] = {"steps": 2, "guidance_scale": 3.0}

    def run(model: Any) -> tuple[Tensor, Any]:
        changed = model.with_lora(file).with_decoder(tmp_path / "decoder")
        return changed.sample(1, "a cat", **how), changed

    expected, _ = run(hasten.load(pipe))
    with Pretended("mps"):
        made, changed = run(hasten.load(put_pipeline(tiny.sd_pipeline())))
        assert device_of(changed.denoiser).type == device_of(changed.decoder.vae).type == "mps"
    close(made, expected)


def test_an_autoencoder_is_measured() -> None:
    tiny = pytest.importorskip("tests.adapters.tiny")
    from hasten.workflows.reconstruction import latent_deviation, reconstruction_quality

    data = noise_data(images=noise_images(4, 16, 3))
    expected = latent_deviation(tiny.vae(), data), reconstruction_quality(tiny.vae(), data)
    with Pretended("mps"):
        vae = put(tiny.vae())
        made = latent_deviation(vae, data), reconstruction_quality(vae, data)
    assert made[0] == pytest.approx(expected[0], rel=1e-4) and made[1] == pytest.approx(expected[1], rel=1e-4)


def test_inversion() -> None:
    x = torch.randn(2, 1, 8, 8).clamp(-1, 1)
    label = torch.tensor([0, 1])
    times = torch.linspace(1, 0, 5, dtype=torch.float64)
    expected = hasten.invert(tiny_denoiser(3), x, times, iterations=1, label=label)
    with Pretended("mps"):
        made = hasten.invert(put(tiny_denoiser(3)), x.to("mps"), times, iterations=1, label=label.to("mps"))
    close(made, expected, 1e-3)


def test_noise_reaches_cuda_without_waiting() -> None:
    expected = hasten.Noise([3, 4], (1, 4, 4)).initial()
    for kind, moved in (("cuda", "async"), ("mps", "upload")):
        with Pretended(kind) as device:
            made = hasten.Noise([3, 4], (1, 4, 4), device=kind).initial()
            assert [event for event, _ in device.events] == [moved] and device.count(moved) == 1, device.lines()
        assert torch.equal(taken(made), expected)


# ---- training ----


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_training_waits_only_where_it_logs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.distributed.ranks.own_device", lambda *_: torch.device(kind))
    denoiser = tiny_denoiser(3, trainable=True)
    counts: dict[int, int] = {}
    with Pretended(kind) as device:

        def loss(batch: dict[str, Tensor]) -> Tensor:
            assert batch["x"].device.type == kind
            counts[len(counts)] = device.count("wait", "")
            return DenoisingLoss()(denoiser, {"x": batch["x"]})

        fit = Fit(steps=12, warmup=2, log_steps=10, tensorboard=False)
        averaged = fit([TrainedModule("net", denoiser, loss)], Batches(noise_data(40, 8), 8), tmp_path)["net"]
    assert counts[9] == counts[1], device.lines("wait")  # the tenth step looks at the clock and the losses
    moved = "async" if kind == "cuda" else "upload"  # from pinned memory
    assert device.count(moved, "train/transfer") == 12, device.lines()
    assert all(torch.isfinite(taken(p)).all() for p in averaged.parameters())


def test_optimal_assignment() -> None:
    x, noise = torch.randn(6, 1, 4, 4), torch.randn(6, 1, 4, 4)
    with Pretended("mps"):
        made = optimal_assignment(x.to("mps"), noise.to("mps"))
    assert torch.equal(taken(made), optimal_assignment(x, noise))


def test_autocast_is_of_the_device_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    named = re.compile(r"""autocast\(\s*["']""")
    files = sorted(Path(hasten.__file__).parent.rglob("*.py"))
    assert not [path.name for path in files if named.search(path.read_text())]
    kinds: list[str] = []
    original = torch.autocast

    def noted(device_type: str, *args: Any, **kwargs: Any) -> Any:
        kinds.append(device_type)
        return original(device_type, *args, **{**kwargs, "enabled": False})

    monkeypatch.setattr("hasten.performance.runtime.torch.autocast", noted)
    for kind in ("mps", "cuda"):
        with Pretended(kind):
            tiny_model().to(kind).sample(1, steps=1, precision="bf16", guidance_scale=1.0)
    assert kinds[0] == "mps" and kinds[-1] == "cuda" and set(kinds) == {"mps", "cuda"}


# ---- comparisons and measurements ----

ROWS = """
n = 10
rounds = 1
[reference]
sampler = "unipc"
times = "lambda"
steps = 3
guidance_scale = 2.0
[[variant]]
name = "fewer"
steps = 2
"""


class Corner(nn.Module):
    """Features of four pixels, in the numbers of a weight."""

    name = "corner"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images[:, 0, :2, :2].flatten(1) @ self.weight, images.new_tensor([[0.0, 1.0, 0.0]]).expand(
            len(images), 3
        )


def test_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.inference_mode", lambda mode=True: torch.no_grad())  # the pretended device lacks it
    monkeypatch.setattr(comparison.report, "write_report", lambda out, *_: out / "report.html")
    (tmp_path / "set.toml").write_text(ROWS)
    images = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    features, logits = Corner()(images)
    real = make_reference(features.detach(), "noise", "test", "corner", torch.arange(60) % 3, logits)
    real = dataclasses.replace(real, floor={**real.floor, "frechet": {10: 0.25}})

    def run(model: Any, net: nn.Module, out: str) -> dict[str, Any]:
        options: dict[str, Any] = {"reference": real, "features": net, "precision": "fp32", "timing_batch": 2}
        rows = compare(model, tmp_path / "set.toml", out=tmp_path / out, show=False, **options)
        return {row["name"]: row for row in rows}

    expected = run(tiny_model(), Corner(), "cpu")
    with Pretended("mps"):
        model = tiny_model()
        put(model.denoiser)
        made = run(model, put(Corner()), "there")
    assert made.keys() == expected.keys() == {"reference", "fewer"}
    for name, row in expected.items():
        for key in ("frechet", "precision", "coverage", "psnr", "nfe"):
            wanted = None if row[key] is None else pytest.approx(row[key], rel=1e-3, abs=1e-4)
            assert made[name][key] == wanted, (name, key)
    assert expected["fewer"]["psnr"] is not None and expected["fewer"]["frechet"] is not None


def test_settings_are_timed_and_memory_is_measured() -> None:
    with Pretended("mps") as device:
        denoiser, x = put(tiny_denoiser()), torch.randn(2, 1, 8, 8).to("mps")
        device.clear()
        runtime = probe(denoiser, x, budget=0.2)
        assert runtime.device == "mps" and device.count("wait", "utils/devices") >= 2, device.lines()
    with Pretended() as device:
        cost.interleave({"a": lambda: None}, repeats=1, warmup=0)
        with cost.peak_memory("cpu") as peak:
            pass
        assert not device.events and peak.method.endswith("resident size")


def test_metrics_of_images_and_features() -> None:
    torch.manual_seed(0)
    images, others = (torch.rand(6, 3, 12, 12) * 2 - 1 for _ in range(2))
    x, y = torch.randn(12, 5), torch.randn(10, 5)
    unit = nn.functional.normalize(torch.randn(4, 3), dim=1)
    words = ["a", "b", "c", "d"]

    def measure(images: Tensor, others: Tensor, x: Tensor, y: Tensor, unit: Tensor) -> list[Any]:
        return [
            psnr_by_image(images, others).mean(),
            *image_difference(images, others).values(),
            structural_similarity(images, others).mean(),
            polynomial_mmd2(x, y),
            nearest_distances(x, [y])[0].sum(),
            frechet_distance(*moments(x), *moments(y)),
            *dataclasses.asdict(manifold(x, y)).values(),
            prompt_diversity(x.reshape(3, 4, 5)).within,
            prompt_match(unit, words, unit, words).value,
        ]

    expected = measure(images, others, x, y, unit)
    with Pretended("mps"):
        made = measure(*(value.to("mps") for value in (images, others, x, y, unit)))
        found = [float(value) for value in made]
    assert found == pytest.approx([float(value) for value in expected], rel=1e-4)


@pytest.mark.slow
def test_quantisation_calibrates_on_the_device() -> None:
    def run(model: Any) -> Tensor:
        return model.sample(2, steps=4, accelerators=["quantize:images=1,steps=2,groups=2"], guidance_scale=1.0)

    plain, expected = tiny_model().sample(2, steps=4, guidance_scale=1.0), run(tiny_model())
    with Pretended("mps"):
        model = copy.deepcopy(tiny_model())
        put(model.denoiser)
        made = run(model)
    assert (taken(made) - expected).square().mean().sqrt() < 0.05 * plain.std()
