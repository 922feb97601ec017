"""`hasten speak`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ._common import explicit_options
from ._processes import on_main_process
from .terminal import print_result


@on_main_process
def speak(
    text: str,
    *,
    model: str = "speech",
    vocoder: str | None = None,
    out: str = "speech.wav",
    steps: int | None = None,
    speed: float = 1.0,
    speaker: str | None = None,
    seed: int = 0,
    sampler: str | None = None,
    times: str | None = None,
    plan: str | None = None,
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Read a text aloud, by a model of train --task speech or a student distilled from one.

    Args:
        text: What to say, or a text file (.txt), or - for the standard input, which is read line by line.
        model: A folder, or a bundled name (see models).
        vocoder: A folder or file of a vocoder, or griffin_lim, which needs no weights. Default: the folder vocoder in
            that of the model, else griffin_lim.
        out: A sound file (.wav, .flac, .ogg); a folder, for one file a sentence, each there as soon as it is made; or -
            for samples of 16 bits on the standard output, as soon as they are made (such as for aplay -f S16_LE -r
            16000).
        steps: Model evaluations. Default: those of the model; a student has its own.
        speed: Of speech, from 0.25 to 4.
        speaker: The name of a speaker, for models of several. Default: the first one.
        seed: Of the noise.
        sampler: Such as ddim. Default: the model's recommended one, as for the next two.
        times: Time grid, such as uniform.
        plan: A plan of the model by name, or a plan's .json file.
        device: auto, cpu, cuda, cuda:1, mps or xpu. auto uses the GPU if there is one.
        json: Print the result as JSON.

    Returns:
        Files, seconds of sound, seconds of computing, how many times faster than real time.
    """
    from ..performance.device import device_for
    from ..tasks.speech.speech import Speech
    from ..workflows.speak import SpeakRequest, speak_texts

    options = explicit_options(sampler=sampler, times=times, plan=plan)
    request = SpeakRequest(out, steps, speed, seed, speaker, options)
    lines = text_lines(text)
    speech = Speech.load(model, vocoder, device_for(device))
    speech.warm_up()
    quiet = json or out == "-"
    result = speak_texts(speech, lines, request, (lambda line: None) if quiet else lambda line: print(line, flush=True))
    said = f"{result['seconds_of_sound']:.1f} s of speech"
    line = (
        f"{out}: {said}, {result['times_real_time']:.1f} times real time, "
        f"first sound after {1000 * result['first_sound_seconds']:.0f} ms"
    )
    if out == "-":
        print(f"hasten: {line}", file=sys.stderr)
    else:
        print_result(result, line, json)
    return result


def text_lines(text: str) -> Iterator[str] | list[str]:
    """The lines of what the command line names: a text, a text file, or `-`. Raises BadInput for an unreadable file."""
    if text == "-":
        return iter(sys.stdin)
    path = Path(text) if len(text) < 1024 and "\n" not in text else None
    if path is None or path.suffix.lower() not in (".txt", ".md") or len(text.split()) > 1:
        return [text]
    if not path.is_file():
        raise BadInput(f"there is no file {text}")
    try:
        return path.read_text(encoding="utf-8-sig").split("\n\n")
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read {text} as UTF-8 text: {e}") from e
