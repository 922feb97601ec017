"""Speech of models and vocoders beside recordings: word errors, estimated opinions, distances, speed by stage.

    python benchmarks/speech.py DATA VOCODER                                        # copy-synthesis only
    python benchmarks/speech.py DATA VOCODER teacher=voice@4 student=voice-2@2 --out report.html

Rows are spoken in turn, clip by clip. Measures that are not installed are named and left out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from hasten.audio.griffin_lim import GriffinLim
from hasten.audio.mel import mel
from hasten.audio.vocoder import load_vocoder
from hasten.compare.speech import (
    COPIED,
    GRIFFIN_LIM,
    RECORDED,
    SpeechRequest,
    SpeechRow,
    evaluate_speech,
    measure_sound,
    speech_table,
)
from hasten.compare.speech_report import write_speech_report
from hasten.tasks import Speech


def copies(request: SpeechRequest, vocoder: Any) -> dict[str, Any]:
    """The recordings, and what a vocoder and Griffin-Lim make of their spectrograms, as `evaluate_speech` returns."""
    clips, settings = request.clips(), vocoder.settings
    makers = {COPIED: vocoder, GRIFFIN_LIM: GriffinLim(settings)}
    rows = [SpeechRow(name) for name in (RECORDED, *makers)]
    vocoder(torch.zeros(settings.mels, 10))
    for clip in clips:
        recording = clip.read(settings.sample_rate)
        spectrum = mel(recording, settings)
        rows[0].sounds.append(recording)
        measure_sound(rows[0], recording, request, settings, "none")
        for row, make in zip(rows[1:], makers.values()):
            start = time.perf_counter()
            row.sounds.append(make(spectrum)[: len(recording)])
            row.seconds["vocoder"] = row.seconds.get("vocoder", 0.0) + time.perf_counter() - start
            measure_sound(row, recording, request, settings, "aligned")
    found = []
    for k, clip in enumerate(clips):
        sounds = {row.name: row.sounds[k] for row in rows}
        understood = {row.name: row.texts[k] for row in rows if row.texts}
        found.append({"text": clip.text, "sounds": sounds, "understood": understood})
    rate = settings.sample_rate
    return {"rows": [row.figures(clips, rate) for row in rows], "sample_rate": rate, "clips": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("vocoder")
    parser.add_argument("models", nargs="*", help="NAME=FOLDER@STEPS")
    parser.add_argument("--split", default="test")
    parser.add_argument("--n", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    vocoder = load_vocoder(asked.vocoder)
    request = SpeechRequest.measured(asked.data, warn=print, split=asked.split, n=asked.n, seed=asked.seed)
    models = {}
    for text in asked.models:
        name, _, place = text.partition("=")
        folder, _, steps = place.partition("@")
        models[name] = (Speech.load(folder, vocoder), int(steps) if steps else None)
    result = evaluate_speech(models, request) if models else copies(request, vocoder)
    if asked.out is not None:
        write_speech_report(result, asked.out)
    for row in speech_table(result):
        print(" | ".join(row))
    print(json.dumps(result["rows"]))


if __name__ == "__main__":
    main()
