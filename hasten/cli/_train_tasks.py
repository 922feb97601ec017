"""`hasten train --task` for tasks on sound, whose models are no models of images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadInput, check_choice
from ._common import processes
from .terminal import print_result

SOUND_TASKS = ("vocoder", "speech")
# Options of the command line under the names of the configs.
NAMES = {"optimizer": "optimiser", "blocks": "layers", "gan_weight": "gan"}


def train_sound(
    task: str, data: Path, out: Path, config: Path | None, options: Mapping[str, Any], device: str, json: bool
) -> dict[str, Any]:
    """Train for a task on sound, as the command line asks.

    Args:
        task: one of `SOUND_TASKS`.
        data: of the recordings.
        out: the folder to write.
        config: a file with its options, or None.
        options: of the command line by field; None where not given.
        device: as typed.
        json: print the result as JSON.

    Raises:
        BadInput: for an option that the task does not have.
    """
    if check_choice("task", task, SOUND_TASKS) == "speech":
        return train_to_speak(data, out, config, options, device, json)
    from ..workflows.vocoder import VocoderConfig, train_vocoder

    request = task_config(VocoderConfig, task, config, options)
    result = train_vocoder(
        data,
        out,
        request,
        device=str(processes(device).device),
        log=(lambda line: None) if json else lambda line: print(line, flush=True),
    )
    result = {"folder": str(out), **result}
    print_result(result, f'{out}: load it with hasten.audio.vocoder.load_vocoder("{out}")', json)
    return result


def train_to_speak(
    data: Path, out: Path, config: Path | None, options: Mapping[str, Any], device: str, json: bool
) -> dict[str, Any]:
    """`train_sound` for the task speech."""
    from ..workflows.speech import SpeechConfig, train_speech

    request = task_config(SpeechConfig, "speech", config, options)
    log = (lambda line: None) if json else lambda line: print(line, flush=True)
    speech = train_speech(data, out, request, device=str(processes(device).device), log=log)
    card = {key: value for key, value in speech.model.card.items() if key != "speech"}
    parameters = sum(p.numel() for net in (speech.model.denoiser, speech.encoder) for p in net.parameters())
    result = {"folder": str(out), "parameters": parameters, **card}
    last = card["last"].get("step")
    print_result(result, f'{out}: {last} steps; try hasten speak "Hello." --model {out} --out hello.wav', json)
    return result


def task_config(kind: Any, task: str, config: Path | None, options: Mapping[str, Any]) -> Any:
    """The config of a task: a file's, with the options of the command line in their place.

    Args:
        kind: class of the config.
        task: names the table of the file.
        config: the file, or None.
        options: by the names of the command line; None where not given.

    Raises:
        BadInput: for an option that the task does not have.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if given.get("precision") == "auto":
        del given["precision"]
    if stray := next((name for name in given if NAMES.get(name, name) not in kind.names()), None):
        raise BadInput(f"--{stray.replace('_', '-')} is not for --task {task}")
    given = {NAMES.get(name, name): value for name, value in given.items()}
    return (kind() if config is None else kind.load(config, task)).replace(**given)
