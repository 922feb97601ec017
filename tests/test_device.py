"""Every sampler, guide, start, tuner, distiller, accelerator and metric on a second device (a pretended MPS).

What mixes devices raises there, and so does float64. Results must be those of the CPU. What makes the host wait for the
device, and copies to it, are counted: in the loop over the steps there are none but the draws of noise.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.distillers import Student
from hasten.guides import CFG
from hasten.metrics import evaluate_images
from hasten.metrics.evaluate import reference_from_images
from hasten.model import Model
from hasten.nets.prior import SharedPrior
from hasten.nets.vae import VAE
from hasten.pick import method_names, pick
from hasten.schedules import VPLinear
from hasten.times import UniformLambda
from hasten.tuning import Tuned, TuningTask
from tests.distillers._images import image_task, unet
from tests.pretend import Pretended, put, taken

SHAPE, STEPS = (1, 16, 16), 4


@functools.cache
def pictures() -> tuple[Tensor, Tensor]:
    """Images (64, 1, 16, 16) in [-1, 1] of two classes, and their labels."""
    batches = image_task(Path("unused")).batches
    found = [batches[k] for k in range(8)]
    return torch.cat([one["x"] for one in found]), torch.cat([one["label"] for one in found])


class Corners(nn.Module):
    """Features (N, 4): the mean of each quarter of an image; logits of two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.adaptive_avg_pool2d(x.mean(1), 2).flatten(1))

    def features(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x.mean(1), 2).flatten(1)


# Options with which a tuner is quick.
TUNERS: dict[str, dict[str, Any]] = {
    "attributes": {"steps": 4, "views": 1},
    "auxiliary": {"iterations": 2, "rank": 4},
    "dynamic_programming": {"candidates": 20, "images": 16, "points": 8},
    "first_step": {"steps": 2, "batch_size": 4},
    "fitted_plan": {"fine": 5, "iterations": 1, "held_out": 2, "batch": 4, "warm": 1, "search": "sampler"},
    "guided_plan": {
        "fine": 5,
        "iterations": 1,
        "held_out": 2,
        "batch": 4,
        "warm": 1,
        "search": "sampler",
        "teleport": False,
        "uncond": 1,
    },
    "moments": {"images": 16, "times": 8},
    "noise_level": {"steps": 2, "images": 16, "batch_size": 4},
    "optimized_steps": {"objective": "trajectory", "fine": 5, "iterations": 1, "restarts": 1, "starts": ("lambda",)},
    "second_moment": {"steps": 2, "images": 32, "batch": 4, "width": 8},
}


SAMPLES = {
    "moments": None,
    "second_moment": None,
    "auxiliary": 20,
    "first_step": 12,
    "noise_level": 12,
    "fitted_plan": 4,
    "guided_plan": 4,
    "optimized_steps": 4,
}


def tuned(name: str, denoiser: nn.Module, device: str) -> Tuned:
    """What a tuner finds for the tiny network."""
    images, labels = pictures()

    def real(n: int) -> tuple[Tensor, Tensor]:
        chosen = torch.arange(n) % len(images)
        return images[chosen].to(device), labels[chosen]

    if name == "guided_plan":
        denoiser = CFG(2.0).wrap(denoiser)
    task = TuningTask(
        denoiser=denoiser, sampler=hasten.UniPC(order=2), times=UniformLambda()(denoiser.schedule, STEPS), shape=SHAPE,
        labels=lambda n: torch.arange(n) % 2, images=real, seed=5, n=SAMPLES.get(name, 8),
    )  # fmt: skip
    options = dict(TUNERS.get(name, {}))
    if name == "attributes":
        options["classifier"] = Corners().to(device)
    return type(pick("tuning", name))(**options).tune(task)


@functools.cache
def tiny() -> Model:
    """A model on the CPU with everything beside it that some sampler, guide or start needs."""
    torch.manual_seed(0)
    denoiser = unet().replace(schedule=VPLinear())  # alpha > 0 at t = 1, which singdiffusion wants
    model = Model(denoiser, "tiny", SHAPE, ("left", "right"), sampler="ddim", times="lambda:low=0.03", steps=STEPS)
    for name in ("moments", "second_moment", "noise_level", "auxiliary", "first_step", "attributes"):
        found = tuned(name, model.denoiser, "cpu")
        model.statistics = {**model.statistics, **found.statistics}
        model.parts = {**model.parts, **found.parts}
    model.parts |= {"prior": SharedPrior(0.5), "generator": VAE(SHAPE, 4, 2, (8,)).eval().requires_grad_(False)}
    return model


def on_device() -> Model:
    """The same with its weights and parts on the pretended device."""
    model = copy.deepcopy(tiny())
    put(model.denoiser)
    with Pretended("mps"):
        model.parts = {name: part.to("mps") for name, part in model.parts.items()}  # one with float64 stays where it is
    return model


def both(n: int = 2, kind: str = "mps", **how: Any) -> tuple[Tensor, Tensor, Pretended]:
    """The same call of `Model.sample` on the device and on the CPU, and what happened on the device."""
    expected = copy.deepcopy(tiny()).sample(n, **how)
    model = on_device()
    with Pretended(kind) as device:
        made = model.sample(n, callback=device.watch(), **how)
    return taken(made), expected, device


def events_of(device: Pretended, kind: str) -> int:
    """The events of a kind in the loop over the steps."""
    return sum(number for (what, _), number in device.loop.items() if what == kind)


def close(made: Tensor, expected: Tensor, atol: float = 2e-4) -> None:
    assert expected.std() > 0.05
    torch.testing.assert_close(made, expected, atol=atol, rtol=0)


# ---- samplers ----

# These look at values, so the host must wait for them.
LOOKS = {"adaptive", "probability_flow", "picard", "predictor_corrector", "noise_level"}
SAMPLERS = {"adaptive": "adaptive:e_rel=1", "probability_flow": "probability_flow:rtol=0.02,atol=0.02"}
STUDENTS = {"consistency", "stochastic_distilled"}  # of distilled models


# for x_t = alpha x + sigma eps; those of other processes have no bundled model
ORDINARY = [name for name in method_names("samplers") if not getattr(pick("samplers", name), "processes", ())]


@pytest.mark.parametrize("name", [name for name in ORDINARY if name not in STUDENTS])
def test_a_sampler(name: str) -> None:
    how: dict[str, Any] = {"times": "lambda:low=0.03", "steps": STEPS, "guidance_scale": 1.5}
    made, expected, device = both(sampler=SAMPLERS.get(name, name), **how)
    close(made, expected, 1e-2 if name in LOOKS else 2e-4)
    if name not in LOOKS:  # the images at the end; the start, the labels, and the draws, whose seeds are on the CPU
        assert device.count("wait") <= 2, device.lines()
        assert device.count("upload") <= 4 + STEPS, device.lines()
        assert events_of(device, "wait") == 0, device.lines(events=device.loop)
        draws = STEPS if "hasten/utils/devices.py" in device.lines("upload", device.loop) else 0
        assert events_of(device, "upload") <= draws, device.lines(events=device.loop)


@pytest.mark.parametrize("name", ["unipc", "sn"])
def test_what_a_sampling_keeps_on_the_device_is_copied_once(name: str) -> None:
    counts = []
    for steps in (4, 8):
        model = on_device()
        how: dict[str, Any] = {"sampler": name, "times": "lambda:low=0.03", "steps": steps, "guidance_scale": 2}
        with Pretended() as device:
            model.sample(2, **how)  # the plan, and what it keeps on the device
            device.clear()
            model.sample(2, **how)
        counts.append((device.count("wait"), device.count("upload")))  # draws of noise come from pinned memory
    assert counts[0] == counts[1], device.lines()


# ---- guides and starts ----

GUIDES = {"distribution": "distribution:classes=uniform", "interval": "interval:low=0.2,high=5"}
STARTS = {"ccdf": "ccdf:time=0.5,task=inpainting", "early_stop": "early_stop:time=0.5"}


@pytest.mark.filterwarnings("ignore:distribution guidance of a batch")
@pytest.mark.parametrize("name", [name for name in method_names("guides") if name != "cfg"])
def test_a_guide(name: str, tmp_path: Path) -> None:
    if name == "autoguidance":
        tiny().save(tmp_path / "weak")
        GUIDES[name] = f"autoguidance:weak={tmp_path / 'weak'}"
    plain = {"label": "none", "guidance_scale": 1.0} if name == "distribution" else {"guidance_scale": 2.0}
    made, expected, device = both(guides=[GUIDES.get(name, name)], **plain)
    close(made, expected)
    assert device.count("wait") <= 2, device.lines()
    assert not device.loop, device.lines(events=device.loop)


# diffuse_vae is for networks that read a second image
@pytest.mark.parametrize("name", [name for name in method_names("starts") if name != "diffuse_vae"])
def test_a_start(name: str) -> None:
    images = None
    if name == "ccdf":
        images = pictures()[0][:2].clone()
        images[:, :, :, 10:] = float("nan")  # what is to be filled in
    made, expected, device = both(start=STARTS.get(name, name), images=images, guidance_scale=1.0)
    close(made, expected)
    assert device.count("wait") <= 4, device.lines()


# ---- accelerators ----

ACCELERATORS = {
    "deep_cache": "deep_cache:every=3",
    "encoder_propagation": "encoder_propagation:keys=uniform,every=3",
    "quantize": "quantize:images=2,steps=2,ranges=minmax",
}
# compile needs real kernels; the others need other processes
ELSEWHERE = {"compile", "patch_parallel", "cfg_parallel", "torchao"}
# caches of diffusers run in its pipelines only
ELSEWHERE |= {"faster_cache", "first_block_cache", "mag_cache", "pyramid_attention_broadcast", "sea_cache"}
ELSEWHERE |= {"taylor_seer_cache"}


@pytest.mark.parametrize("name", [name for name in method_names("accelerators") if name not in ELSEWHERE])
def test_an_accelerator(name: str) -> None:
    how: dict[str, Any] = {"times": "trailing", "steps": 12, "guidance_scale": 2.0}
    kind = "cuda" if name == "quantize" else "mps"  # with CUDA's integer products
    made, expected, device = both(**how, kind=kind, accelerators=[ACCELERATORS.get(name, name)])
    if name == "quantize":  # other kernels round a few integers otherwise; calibration looks at values
        assert (made - expected).square().mean().sqrt() < 0.03
    else:
        close(made, expected)
        # an output-level cache decides by the values it sees: once an evaluation, and once after a run of the network
        assert device.count("wait") <= (28 if name == "output_cache" else 4), device.lines()
    if name != "output_cache":
        assert not device.loop, device.lines(events=device.loop)


# ---- tuners ----


SLOW = {"fitted_plan", "guided_plan", "optimized_steps"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in method_names("tuning")]
)
def test_a_tuner(name: str) -> None:
    torch.manual_seed(0)
    denoiser = put(unet())
    with Pretended("mps"):
        found = tuned(name, denoiser, "mps")
    plain = tuned(name, unet(), "cpu")
    assert found.statistics.keys() == plain.statistics.keys() and found.parts.keys() == plain.parts.keys()
    for key, tensor in found.statistics.items():
        torch.testing.assert_close(taken(tensor), plain.statistics[key], rtol=2e-2, atol=2e-3)
    if plain.plan is not None:
        torch.testing.assert_close(taken(found.plan.B), plain.plan.B, rtol=1e-2, atol=1e-2)


# ---- distillers ----

DISTILLERS = {
    "dsno": "dsno:pairs=16",
    "denoising_student": "denoising_student:pairs=16",
    "reflow": "reflow:pairs=16",
    "progressive": "progressive:steps=(2,)",
    "guided": "guided:steps=(2,)",
    "adversarial": "adversarial:r1=0",  # the pretended device has no second derivative of group norm
}


@pytest.mark.parametrize("name", method_names("distillers"))
def test_a_distiller(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of every stage."""
    monkeypatch.setattr("hasten.distributed.ranks.own_device", lambda *_: torch.device("mps"))
    torch.manual_seed(0)
    task = image_task(tmp_path)
    put(task.denoiser)
    task.device = "mps"
    before = [p.clone() for p in task.denoiser.parameters()]
    with Pretended("mps"):
        last = pick("distillers", DISTILLERS.get(name, name)).distill(task)
    assert isinstance(last, Student)
    after = [taken(p) for p in last.denoiser.parameters()]
    assert all(torch.isfinite(p).all() for p in after)
    assert len(after) != len(before) or any(not torch.equal(taken(a), b) for a, b in zip(before, after))


# ---- metrics ----


def test_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.inference_mode", lambda mode=True: torch.no_grad())  # the pretended device lacks it
    torch.manual_seed(0)
    images, labels = pictures()
    net = Corners().eval()
    known = reference_from_images(images.flip(0), "corners", "train", net, labels)
    expected = evaluate_images(images * 0.8, labels, net, known, range(64))
    with Pretended("mps"):
        made = evaluate_images(images.to("mps") * 0.8, labels, put(copy.deepcopy(net)), known, range(64))
    assert made.keys() == expected.keys()
    for name, measure in expected.items():
        assert made[name].value == pytest.approx(measure.value, rel=1e-3, abs=1e-4), name
