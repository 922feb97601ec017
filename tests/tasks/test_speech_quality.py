"""What few steps leave of the quality, on a made-up language: the point of ProDiff, and its student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.denoiser import Denoiser
from hasten.distillers.prodiff import prodiff_schedule
from hasten.pick import pick
from hasten.plan.draw import draw
from hasten.sampling import Noise
from hasten.tasks.speech.acoustic_model import AcousticModel, make_acoustic_model
from hasten.tasks.speech.batches import SpeechBatches, collate
from hasten.tasks.speech.features import Corpus
from hasten.tasks.speech.speech import speech_model, teacher_times
from hasten.workflows.distill import distill_model
from tests.tasks.speech_toy import SYMBOLS, toy_clip, toy_corpus

CLIPS = 200


def trained(prediction: str, entries: int, steps: int) -> tuple[AcousticModel, Corpus]:
    """A model trained on the made-up language."""
    torch.manual_seed(0)
    corpus = toy_corpus(CLIPS)
    model = make_acoustic_model(len(SYMBOLS), 20, "tiny", schedule=prodiff_schedule(entries - 1), prediction=prediction)
    batches = SpeechBatches(corpus, 16)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for step in range(steps):
        loss = model(batches[step])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()
    return model.eval().requires_grad_(False), corpus


def mel_error(model: AcousticModel, denoiser: Denoiser, corpus: Corpus, sampler: str, times: Tensor) -> float:
    """Mean |mel - true mel|, standardised, of clips that were not trained on, with their true durations and pitch."""
    unseen = Corpus([*corpus.clips, *(toy_clip(1000 + k) for k in range(16))], SYMBOLS, (), corpus.settings)
    batch = collate(SpeechBatches(unseen, 1).rows[CLIPS:])
    v = model.encoder(batch["tokens"], batch["durations"], batch["f0"], batch["energy"])
    shape = tuple(batch["x"].shape[1:])
    noise = Noise(range(16), shape, torch.float32, torch.device("cpu"))
    x = draw(denoiser, sampler, times, noise, cond={"frames": v.frames, "mask": v.mask})
    error = (x - batch["x"]).abs() * v.mask[:, None]
    return float(error.sum() / (v.mask.sum() * shape[0]))


def times_of(entries: int, steps: int) -> Tensor:
    """As the task samples."""
    grid: Any = pick("times", teacher_times(entries))
    times: Tensor = grid(prodiff_schedule(entries - 1), steps)
    return times


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_model_of_the_sample_needs_few_steps_and_a_model_of_the_noise_does_not() -> None:
    errors: dict[str, list[float]] = {}
    for prediction in ("x0", "eps"):
        model, corpus = trained(prediction, 101, 300)
        errors[prediction] = [
            mel_error(model, model.denoiser, corpus, "ddpm", times_of(101, steps)) for steps in (4, 100)
        ]
    print(errors)
    assert errors["x0"][0] <= 1.15 * errors["x0"][1]
    assert errors["eps"][0] >= 1.5 * errors["x0"][0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_student_of_two_steps_keeps_the_quality_of_four(tmp_path: Path) -> None:
    model, corpus = trained("x0", 5, 300)
    four = mel_error(model, model.denoiser, corpus, "ddpm", times_of(5, 4))
    teacher: Any = speech_model(model, corpus, "teacher", {})
    result = distill_model(teacher, tmp_path, "prodiff", corpus, steps=120, batch_size=16, precision="fp32", show=False)
    from hasten.loading import load

    student = load(result["folder"])
    times = torch.tensor([1.0, 0.6, 0.0], dtype=torch.float64)
    two = mel_error(model, student.denoiser, corpus, "ddim", times)
    untrained = mel_error(model, model.denoiser, corpus, "ddim", times)
    print({"teacher 4": four, "student 2": two, "teacher 2": untrained})
    assert two <= 1.1 * four
