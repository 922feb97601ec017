"""`hasten evaluate --task speech`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..progress import progress
from .terminal import print_result


def evaluate_spoken(
    model: Any,
    name: str,
    data: Path,
    options: Mapping[str, Any],
    steps: int | None,
    vocoder: str | None,
    out: Path | None,
    json: bool,
) -> dict[str, Any]:
    """Measure a model that speaks, as the command line asks.

    Args:
        model: the model, opened.
        name: as typed, beside which its vocoder lies.
        data: recordings with their texts.
        options: fields of `SpeechRequest`.
        steps: model evaluations, or None.
        vocoder: as typed, or None.
        out: the file of a report, or None.
        json: print the result as JSON.

    Raises:
        BadInput: for a model that does not speak, and for data without recordings.
    """
    from ..audio.vocoder import load_vocoder
    from ..compare.speech import SpeechRequest, evaluate_speech, speech_table
    from ..compare.speech_report import write_speech_report
    from ..files import check_writable
    from ..loading import find_model_folder
    from ..tasks.speech.speech import Speech

    if out is not None:
        check_writable(out)
    speech = Speech(model)
    beside = find_model_folder(name) / "vocoder"
    path: Any = vocoder if vocoder is not None else beside if beside.is_dir() else "griffin_lim"
    speech = Speech(model, load_vocoder(path, speech.settings))
    request = SpeechRequest.measured(data, warn=lambda line: print(f"hasten: {line}", file=sys.stderr), **options)
    row = model.name if steps is None else f"{model.name}, {steps} step{'s' * (steps > 1)}"
    with progress("clips") as bar:
        result = evaluate_speech({row: (speech, steps)}, request, bar)
    if out is not None:
        write_speech_report(result, out, f"{model.name}: text to speech")
    table = speech_table(result)
    widths = [max(len(line[k]) for line in table) for k in range(len(table[0]))]
    lines = [
        "  ".join(cell.ljust(w) if not k else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths)))
        for line in table
    ]
    clips = [{"text": clip["text"], "understood": clip["understood"]} for clip in result["clips"]]
    result = {
        **result,
        "clips": clips,
        "steps": steps,
        "vocoder": str(path),
        "report": None if out is None else str(out),
    }
    print_result(result, "\n".join([*lines, *([] if out is None else [str(out)])]), json)
    return result
