"""Calibration inputs of a pipeline: recorded from the user's call, or from samplings of prompts in bounded batches."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.accelerators import SamplingContext, _calls
from hasten.accelerators._calls import concat_calls, merge_calls, rows_at_once
from hasten.accelerators.quantize import Quantize, batch_of
from hasten.adapters.diffusers.calibration import record_model_calls
from hasten.errors import BadInput

from . import tiny

STEPS = 9
CALL: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}


def image() -> Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def controlled() -> Any:
    return tiny.sd_pipeline("StableDiffusionControlNetPipeline", controlnet=tiny.controlnet())


def inpainting() -> Any:
    return tiny.sd_pipeline("StableDiffusionInpaintPipeline", unet=tiny.unet2d_condition(in_channels=9))


class Look:
    """An accelerator that keeps what it is shown, and changes nothing."""

    stage, claims = 10, frozenset[str]()

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def apply(self, denoiser: Any, context: SamplingContext) -> Any:
        self.calls = context.calibration("look", 2, 5)
        return denoiser


def test_a_call_of_the_user_is_recorded() -> None:
    """With ControlNet: every evaluation, at its time, with the residuals; the same seed gives the same; the RNG is restored."""
    pipe, look, again = controlled(), Look(), Look()

    def call(pipe: Any) -> Any:
        return pipe("a cat", image=image(), height=16, width=16, **CALL)

    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    hasten.accelerate(pipe, [look], steps=STEPS, calls=call)
    hasten.accelerate(pipe, [again], steps=STEPS, calls=call)
    assert torch.equal(before, torch.random.get_rng_state()) and not pipe.unet._forward_pre_hooks
    assert len(look.calls) == STEPS
    x, _, cond = look.calls[0]
    assert x.shape == (2, 4, 8, 8) and cond["mid_residual"].abs().max() > 0 and "down_residual_1" in cond
    pipe.scheduler.set_timesteps(STEPS)
    read = hasten.adapters.diffusers.schedules.read_scheduler(pipe.scheduler)
    assert [t for _, t, _ in look.calls] == pytest.approx(read.time(pipe.scheduler.timesteps).tolist())
    assert all(torch.equal(a[0], b[0]) for a, b in zip(look.calls, again.calls))


@pytest.mark.parametrize("make", [controlled, inpainting])
def test_networks_that_load_refuses_are_quantised_by_a_call(make: Any) -> None:
    pipe = make()
    masks = {"mask_image": torch.ones(1, 1, 16, 16)} if make is inpainting else {}
    options: dict[str, Any] = {**CALL, "image": image(), "height": 16, "width": 16, **masks}

    def call(pipe: Any) -> Any:
        return pipe("a cat", generator=torch.Generator().manual_seed(0), **options).images

    with pytest.raises(BadInput, match="calls=lambda pipe"):
        hasten.accelerate(pipe, ["quantize"], steps=STEPS, prompts="a cat")
    plain, fast = call(pipe), hasten.accelerate(pipe, ["quantize:groups=2,steps=3"], steps=STEPS, calls=call)
    error = float((call(fast) - plain).norm() / plain.norm())
    assert 1e-5 < error < 0.2
    assert torch.equal(call(pipe), plain)


def test_key_steps_are_searched_in_a_call() -> None:
    pipe = controlled()
    options: dict[str, Any] = {**CALL, "image": image(), "height": 16, "width": 16}
    spec = "encoder_propagation:keys=found,budget=0.5"
    fast = hasten.accelerate(pipe, [spec], steps=STEPS, calls=lambda pipe: pipe("a cat", **options))
    assert torch.isfinite(fast("a cat", **options).images).all()
    with pytest.raises(
        BadInput, match="cannot calibrate: the calibration samples took 12 model evaluations, expected 9"
    ):
        more = {**options, "num_inference_steps": 12}
        hasten.accelerate(pipe, [spec], steps=STEPS, calls=lambda pipe: pipe("a cat", **more))


def test_calls_without_inputs_are_refused() -> None:
    pipe = tiny.sd_pipeline()
    for calls, messages in [
        (lambda pipe: None, "must call the pipeline"),
        ("a cat", "use prompts=, or calls="),
        (lambda pipe: [pipe("a cat", height=side, width=side, **CALL) for side in (16, 32)], "several shapes"),
    ]:
        with pytest.raises(BadInput, match=messages):
            hasten.accelerate(pipe, [Look()], steps=STEPS, calls=calls)
    with pytest.raises(BadInput, match="use prompts=, or calls="):
        hasten.accelerate(pipe, [Look()], steps=STEPS, prompts="a cat", calls=lambda pipe: pipe("a cat"))


def test_the_empty_prompt_warns() -> None:
    pipe = tiny.sd_pipeline()
    with pytest.warns(UserWarning, match="empty prompt alone"):
        hasten.accelerate(pipe, [Look()], steps=STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hasten.accelerate(pipe, [Look()], steps=STEPS, prompts=["", "a cat"])
        hasten.accelerate(tiny.ddpm_pipeline(), [Look()], steps=STEPS)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_large_samples_run_in_several_batches(monkeypatch: pytest.MonkeyPatch, guidance: float) -> None:
    """What is seen is the same, each image with its prompt, guidance's halves apart."""
    model = hasten.load(tiny.sd_pipeline())
    setting: dict[str, Any] = {"sampler": "ddim", "times": "trailing", "steps": 3, "guidance_scale": guidance}
    grid = [1.0, 2 / 3, 1 / 3]
    prompts = ["a cat", "the dog", "a red photo"]
    whole = record_model_calls(model, 5, prompts, 3, grid, setting)
    monkeypatch.setattr(_calls, "PIXELS", 2 * 8 * 8)
    assert rows_at_once(model.shape, 5) == 2 and rows_at_once((4, 128, 128), 5) == 1
    parts = record_model_calls(model, 5, prompts, 3, grid, setting)
    assert [t for _, t, _ in parts] == [t for _, t, _ in whole] and len(whole) == 3
    half = 5 if guidance == 4.0 else 0

    def ordered(x: Tensor) -> Tensor:
        rows = x.flatten(1)
        return rows[rows[:, 0].argsort()]

    for (x, _, cond), (y, _, same) in zip(whole, parts):
        assert x.shape == y.shape and torch.allclose(ordered(x), ordered(y), atol=1e-4)
        assert torch.allclose(x[:half], y[:half], atol=1e-4) if half else True
        assert torch.allclose(cond["text"][:half], same["text"][:half], atol=1e-5)
        assert torch.allclose(cond["text"][half:].sum(0), same["text"][half:].sum(0), atol=1e-4)
    one = torch.zeros(2, 1), 0.5, {"option": "kept"}
    assert concat_calls([one, one])[2] == {"option": "kept"}


def test_a_models_samplings_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image has the class and the seed that it has in one batch; without prompts there is a warning."""
    from ._tiny import tiny as small

    model = small()
    whole = model.calls(5, 3, steps=3)
    monkeypatch.setattr(_calls, "PIXELS", 2 * 8 * 8)
    parts = model.calls(5, 3, steps=3)
    assert len(parts) == len(whole) == 3
    for (x, _, cond), (y, _, same) in zip(whole, parts):
        assert torch.allclose(x, y, atol=1e-4) and torch.equal(cond["label"], same["label"])
    assert merge_calls([[1, 2], [3]]) == [1, 2, 3]
    with pytest.warns(UserWarning, match="empty prompt alone"):
        hasten.load(tiny.sd_pipeline()).calls(1, 0, steps=2)


def test_the_network_gets_few_large_samples_at_once() -> None:
    assert batch_of((100, 4, 8, 8)) == 32 and batch_of((100, 4, 128, 128)) == 8 and batch_of((9, 3, 1024, 1024)) == 1
    model = hasten.load(tiny.sd_pipeline())
    calls = [(torch.zeros(2, 4, 512, 512), 0.5, {})]
    seen: dict[str, Any] = {}

    def build(*args: Any, **options: Any) -> Any:
        seen["batch"] = options["batch"]
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hasten.accelerators.quantize.QuantizationSession", build)
        with pytest.raises(InterruptedError):
            Quantize(groups=1).start(model.denoiser, calls)
    assert seen["batch"] == 1
