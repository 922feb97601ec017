"""`hasten train --kind autoencoder` and `--kind decoder`, and its `--task`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadInput, check_choice
from ._common import processes
from ._train_tasks import SOUND_TASKS
from .terminal import print_result

KINDS = ("model", "autoencoder", "decoder")
CROP = 128  # of super-resolution


def train_kind(
    kind: str, data: Path, out: Path, config: Path | None, options: Mapping[str, Any], device: str, json: bool
) -> dict[str, Any]:
    """Train an autoencoder, or distil a decoder, as the command line asks.

    Args:
        kind: `autoencoder` or `decoder`.
        data: of the images.
        out: the folder to write.
        config: a file with its options, or None.
        options: of the command line by field, `init` and `base` among them; None where not given.
        device: as typed.
        json: print the result as JSON.

    Raises:
        BadInput: for an option that the kind does not have.
    """
    check_choice("kind", kind, KINDS)
    given = {name: value for name, value in options.items() if value is not None}
    if "optimizer" in given:
        given["optimiser"] = given.pop("optimizer")
    if "blocks" in given:
        given["layers"] = given.pop("blocks") - (kind == "decoder")  # a decoder has one block more than that
    if given.get("precision") == "auto":
        del given["precision"]  # the kinds' own default
    source = given.pop("init" if kind == "autoencoder" else "base", None)
    request: Any
    if kind == "autoencoder":
        from ..workflows.autoencoder import AutoencoderConfig, train_autoencoder

        kinds: Any = AutoencoderConfig
    else:
        from ..workflows.decoder import DecoderConfig, distill_decoder

        kinds = DecoderConfig
        if source is None:
            raise BadInput("a decoder is distilled from an autoencoder: give --base, a pipeline's or its folder")
    stray = [name for name in given if name not in kinds.names()]
    if stray:
        flag = "from" if stray[0] == "init_from" else stray[0].replace("_", "-")
        raise BadInput(f"--{flag} is not for --kind {kind}")
    request = (kinds() if config is None else kinds.load(config, kind)).replace(**given)
    common: dict[str, Any] = {
        "device": str(processes(device).device),
        "log": (lambda line: None) if json else lambda line: print(line, flush=True),
    }
    if kind == "autoencoder":
        result = train_autoencoder(data, out, request, init=source, **common)
        text = f'{out}: load it with diffusers.AutoencoderKL.from_pretrained("{out}")'
    else:
        result = distill_decoder(source, data, out, request, **common)
        text = f"{out}: try hasten sample {source} --decoder {out}"
    result = {"folder": str(out), **result}
    print_result(result, text, json)
    return result


def task_options(task: str, factor: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a training run for a task.

    Args:
        task: `super-resolution`.
        factor: as typed, or None.
        options: of the command line, as given.

    Returns:
        the options with the process of the task.

    Raises:
        BadInput: for another task, and for options that contradict it.
    """
    check_choice("task", task, ("super-resolution", *SOUND_TASKS))
    process = str(options.get("process") or "super_resolution")
    if process.split(":")[0] != "super_resolution":
        raise BadInput(f"--task super-resolution is the process super_resolution, not {process}: leave one of them out")
    if factor is not None and "factor=" in process:
        raise BadInput(f"--factor and --process {process} both give the factor: leave one out")
    if factor is not None:
        process += f"{',' if ':' in process else ':'}factor={factor}"
    crop = {} if "size" in options else {"crop": CROP}
    return {**crop, **options, "process": process}
