"""Prompts of a model that takes them, and the shape of what a model samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import BadInput
from ..model.model import Model

BUNDLED = Path(__file__).with_name("default_prompts.txt")
KEYS = ("prompt", "text", "caption")  # of a line of JSON


def prompts_for(model: Model, prompts: Sequence[str] | str | None, where: str) -> list[str] | None:
    """The prompts of a comparison or evaluation, of which image k gets `k mod their number`; None for other models.

    Raises:
        BadInput: for a model of prompts without any (the empty one must be explicit, ""), and the other way round.
    """
    if model.conditioning is None:
        if prompts:
            raise BadInput(f"{model.name} takes no prompts: leave out --prompt, --prompts and the prompts of {where}")
        return None
    texts = [prompts] if isinstance(prompts, str) else list(prompts or ())
    if not texts:
        raise BadInput(
            f"{model.name} takes prompts: give --prompt TEXT (several times for several), --prompts FILE with one a "
            "line, or prompts = [...] in the set of variants"
        )
    if not all(isinstance(text, str) for text in texts):
        raise BadInput(f"prompts must be texts, got {texts!r}")
    return texts


def read_prompts(file: Path) -> list[str]:
    """The prompts in a file.

    Args:
        file: text with a prompt a line, of which empty lines are passed over; or `.jsonl` (`.json` lines), of which
            each line is a text or an object with one under `prompt`, `text` or `caption`.

    Raises:
        BadInput: for a file that cannot be read, has no prompts, or a line that holds none, with its number.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read the prompts in {file}: {getattr(e, 'strerror', None) or e}") from e
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if file.suffix.lower() in (".jsonl", ".ndjson"):
        prompts = [prompt_in(line, f"{file}, line {number}") for number, line in numbered]
    else:
        prompts = [line for _, line in numbered]
    if not prompts:
        raise BadInput(f"{file} holds no prompts: write one a line")
    return prompts


def prompt_in(line: str, where: str) -> str:
    """The prompt in a line of JSON. Raises BadInput, which begins with `where`."""
    try:
        value = json.loads(line)
    except ValueError as e:
        raise BadInput(f"{where}: not JSON ({e})") from e
    if isinstance(value, dict):
        value = next((value[key] for key in KEYS if key in value), None)
    if not isinstance(value, str):
        raise BadInput(f"{where}: neither a text nor an object with a text under {', '.join(KEYS)}")
    return " ".join(value.split())


def bundled_prompts() -> list[str]:
    """The 200 prompts that a model of prompts gets where none are given."""
    return read_prompts(BUNDLED)


def image_shape(model: Model) -> tuple[int, ...]:
    """The shape of what `sample` gives: that of the decoded image for a model of latents."""
    if model.decoder is None:
        return tuple(model.shape)
    if (known := getattr(model.decoder, "image_shape", None)) is not None:
        return tuple(known)
    return tuple(model.decoder.decode(torch.zeros(1, *model.shape, device=model.device)).shape[1:])


def is_image(shape: Sequence[int]) -> bool:
    """Whether samples of this shape can be looked at: grey or RGB images."""
    return len(shape) == 3 and shape[0] in (1, 3)
