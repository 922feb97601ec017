"""`hasten speak`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ._common import explicit_options
from ._processes import on_main_process
from .terminal import print_result


@on_main_process
def speak(
    text: str | None = None,
    *,
    file: Path | None = None,
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
    stream: bool = False,
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Read a text aloud, by a model of train --task speech or a student distilled from one.

    Args:
        text: What to say.
        file: A text file to read aloud in place of text; of /dev/stdin each line is said as it comes.
        model: A folder, or a bundled name (see models).
        vocoder: A folder or file of a vocoder, or griffin_lim, which needs no weights. Default: the folder vocoder in
            that of the model, else griffin_lim.
        out: A sound file (.wav, .flac, .ogg), or a folder, for one file a sentence, each there as soon as it is made.
        steps: Model evaluations. Default: those of the model; a student has its own.
        speed: Of speech, from 0.25 to 4.
        speaker: The name of a speaker, for models of several. Default: the first one.
        seed: Of the noise.
        sampler: Such as ddim. Default: the model's recommended one, as for the next two.
        times: Time grid, such as uniform.
        plan: A plan of the model by name, or a plan's .json file.
        stream: Write samples of 16 bits to the standard output as soon as they are made, and no file (for a player such
            as aplay -f S16_LE -r 16000).
        device: auto, cpu, cuda, cuda:1, mps or xpu. auto uses the GPU if there is one.
        json: Print the result as JSON.

    Returns:
        Files, seconds of sound, seconds of computing, how many times faster than real time.
    """
    from ..performance.device import device_for
    from ..tasks.speech.speech import Speech
    from ..workflows.speak import SpeakRequest, speak_texts

    options = explicit_options(sampler=sampler, times=times, plan=plan)
    request = SpeakRequest("-" if stream else out, steps, speed, seed, speaker, options)
    texts = texts_of(text, file)
    speech = Speech.load(model, vocoder, device_for(device))
    speech.warm_up()
    quiet = json or stream
    result = speak_texts(speech, texts, request, (lambda line: None) if quiet else lambda line: print(line, flush=True))
    said = f"{result['seconds_of_sound']:.1f} s of speech"
    line = (
        f"{out}: {said}, {result['times_real_time']:.1f} times real time, "
        f"first sound after {1000 * result['first_sound_seconds']:.0f} ms"
    )
    if stream:
        print(f"hasten: {line}", file=sys.stderr)
    else:
        print_result(result, line, json)
    return result


def texts_of(text: str | None, file: Path | None) -> Iterable[str]:
    """What to say: a text, the paragraphs of a file, or the lines of a pipe as they come.

    Raises:
        BadInput: without either or with both, and for a file that cannot be read.
    """
    if (text is None) == (file is None):
        raise BadInput("give a text to say, or --file with one" if text is None else "give a text or --file, not both")
    if file is None:
        return [str(text)]
    if not file.exists():
        raise BadInput(f"there is no file {file}")
    try:
        opened = file.open(encoding="utf-8-sig")
        return [opened.read()] if file.is_file() else opened
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read {file} as UTF-8 text: {e}") from e
