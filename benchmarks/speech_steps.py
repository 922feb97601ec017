"""Acoustic models by number of network evaluations: the error of their spectrograms, and speed.

    python -m benchmarks.speech_steps quality --data speech.zip --split test --models ProDiff=runs/x0@4,100 \
        eps=runs/eps@4,100 student=runs/student@2 --features features.pt
    python -m benchmarks.speech_steps speed --models teacher=runs/x0@4 student=runs/student@2 paper@2 \
        --vocoder runs/vocoder --threads 2

`quality`: mean |mel - true mel| of the clips of a split, in log mel and standardised, with the true durations, pitch
and energy, so that both spectrograms have the same frames; with the standard error over clips. eps and x0 models that
are compared with 100 steps are trained with `entries = 101` (SpeechConfig).

`speed`: all rows in turns in one run: seconds of text, acoustic model and vocoder for a sentence, and how many times
faster than real time; the median of --rounds. `paper@2` is a model of the preset `paper` with random weights.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from hasten.audio.mel import MelSettings
from hasten.audio.vocoder import load_vocoder
from hasten.performance.device import processor
from hasten.plan.draw import draw
from hasten.sampling import Noise
from hasten.tasks import Speech
from hasten.tasks.speech.acoustic_model import make_acoustic_model
from hasten.tasks.speech.features import Corpus
from hasten.tasks.speech.samples import speech_samples
from hasten.tasks.speech.speech import speech_model

SENTENCE = "Please stay on the line, and the next available agent will answer your call in about 3 minutes."


def rows_of(texts: list[str]) -> list[tuple[str, str, list[int]]]:
    """Name, folder and step counts of `NAME=FOLDER@4,100`."""
    rows = []
    for text in texts:
        head, _, counts = text.rpartition("@")
        name, _, folder = head.partition("=")
        rows.append((name, folder, [int(count) for count in counts.split(",")]))
    return rows


@torch.no_grad()
def quality(arguments: argparse.Namespace) -> None:
    """Print a row for each model and number of steps."""
    for name, folder, counts in rows_of(arguments.models):
        speech = Speech.load(folder)
        model, std = speech.model, speech.encoder.mel_std[None, :, None]
        out = Path(arguments.features).parent if arguments.features else None
        data = speech_samples(model, arguments.data, out, arguments.split)
        for steps in counts:
            resolved = model.resolve(steps=steps)
            errors: list[tuple[float, float]] = []
            for first in range(0, len(data), 16):
                rows = list(range(first, min(first + 16, len(data))))
                assert data.conditions is not None
                x, cond = data.images(rows), data.conditions(rows)
                noise = Noise(rows, model.shape, torch.float32, model.device)
                made = draw(resolved.denoiser, resolved.sampler, resolved.times, noise, plan=resolved.plan, cond=cond)
                error = (made - x).abs() * cond["mask"][:, None]
                each = cond["mask"].sum(1) * x.shape[1]
                errors += zip((error * std).sum((1, 2)).div(each).tolist(), error.sum((1, 2)).div(each).tolist())
            for what, values in (("log mel", [e[0] for e in errors]), ("standardised", [e[1] for e in errors])):
                spread = statistics.stdev(values) / len(values) ** 0.5
                print(
                    f"{name} steps {steps}: L1 {statistics.mean(values):.4f} +- {spread:.4f} ({what}, n {len(values)})"
                )


def speed(arguments: argparse.Namespace) -> None:
    """Print a row for each model: the parts in milliseconds, and how many times faster than real time."""
    torch.set_num_threads(arguments.threads)
    vocoder = load_vocoder(arguments.vocoder)
    made = []
    for name, folder, counts in rows_of(arguments.models):
        speech = Speech.load(folder, vocoder) if folder else untrained(name, made[0][1], vocoder)
        speech.warm_up()
        made += [(f"{name} steps {steps}", speech, steps) for steps in counts]
    seconds: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for name, speech, steps in made:
            spoken = next(speech.sentences(arguments.text, steps=steps))
            seconds.setdefault(name, []).append({**spoken.seconds, "sound": len(spoken.audio) / speech.sample_rate})
    print(f"{processor()}, {arguments.threads} threads, {arguments.rounds} rounds in turns")
    for name, turns in seconds.items():
        median = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        total = median["text"] + median["acoustic"] + median["vocoder"]
        parts = ", ".join(f"{key} {1000 * median[key]:.0f} ms" for key in ("text", "acoustic", "vocoder"))
        print(f"{name}: {parts}, {median['sound']:.2f} s of sound, {median['sound'] / total:.1f} x real time")


def untrained(preset: str, like: Speech, vocoder: Any) -> Speech:
    """A model of a preset with random weights, of the tokens of another one."""
    about = like.model.card["speech"]
    corpus = Corpus([], like.front.symbols, like.speakers, MelSettings.from_dict(about["mel"]), about["text"])
    trained = make_acoustic_model(len(corpus.symbols), corpus.settings.mels, preset, len(corpus.speakers))
    return Speech(speech_model(trained.eval(), corpus, preset, {}, about["energy"]), vocoder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--data")
    parser.add_argument("--split", default="test")
    parser.add_argument("--features", help="a file in whose folder features.pt is kept")
    parser.add_argument("--vocoder", default="griffin_lim")
    parser.add_argument("--text", default=SENTENCE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    {"quality": quality, "speed": speed}[arguments.what](arguments)


if __name__ == "__main__":
    main()
