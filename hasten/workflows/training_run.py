"""The folder of a training run: what it holds, and whether a run may write there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..files import describe_contents
from ..train.checkpoint import read_log


def last_log_entry(log: Path) -> dict[str, Any]:
    """The last entry of a training log: step, seconds, loss; {} without one."""
    entries = read_log(log)
    return entries[-1] if entries else {}


def check_output_folder(out: Path, finished: bool) -> None:
    """Raise BadInput if training would overwrite what `out` holds. finished: the run in it is complete."""
    content = describe_contents(out)
    if content is not None and not (out / "checkpoint.pt").is_file():
        raise BadInput(f"{out} holds {content} already: choose another folder, or remove it")
    card = saved_card(out)
    changed = [key for key in ("tuned", "quantized", "distilled", "exported") if key in card]
    if changed and not finished:
        raise BadInput(f"{out} holds a model that was {changed[0]} since: train in another folder, or remove it")
    if content == "a pipeline of diffusers":
        raise BadInput(f"{out} holds {content} already: choose another folder, or remove it")


def saved_card(out: Path) -> dict[str, Any]:
    """The card of the model in a folder; {} without a model."""
    try:
        card = json.loads((out / "model.json").read_text(encoding="utf-8"))["card"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return card if isinstance(card, dict) else {}


def saved_model_at(out: Path, step: int) -> str | None:
    """The folder if its model is that of step `step`, else None."""
    last = saved_card(out).get("last")
    return str(out) if isinstance(last, dict) and last.get("step") == step else None


def remove_earlier_model(out: Path) -> None:
    """Make room for the pipeline of an extended run: without its descriptions, the earlier one is no model any more."""
    for name in ("model.json", "model_index.json"):
        (out / name).unlink(missing_ok=True)
