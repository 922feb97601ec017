"""Which runtime a network gets on this machine: the one that was asked for, or one probed once and remembered."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput, nearest
from ..files import write_atomic
from ..utils.environment import cache_folder
from .device import processor
from .runtime import Runtime, probe

FORMATS = {"fp32": "float32", "bf16": "bfloat16"}
EXTRAS: dict[str, dict[str, Any]] = {
    "medium": {"matmul": "medium"},
    "high": {"matmul": "high"},
    "channels_last": {"channels_last": True},
}


def parse_runtime(text: str, device: str = "cpu") -> Runtime:
    """`fp32` or `bf16` (autocast), with `+medium` or `+high` (matrix products) and `+channels_last` as wanted."""
    first, *rest = text.split("+") if isinstance(text, str) else [str(text)]
    if first not in FORMATS:
        raise BadInput(f"unknown precision {text!r}: {nearest(first, ['auto', *FORMATS])}")
    settings: dict[str, Any] = {}
    for word in rest:
        if word not in EXTRAS:
            raise BadInput(f"unknown part {word!r} of precision {text!r}: {nearest(word, EXTRAS)}")
        settings |= EXTRAS[word]
    return Runtime(dtype=FORMATS[first], device=device, **settings)


def format_runtime(runtime: Runtime) -> str:
    """What `parse` reads back: number format, matrix products and layout, not what was measured."""
    first = next(name for name, dtype in FORMATS.items() if dtype == runtime.dtype)
    matmul = [] if runtime.matmul == "highest" else [runtime.matmul]
    return "+".join([first, *matmul, *(["channels_last"] if runtime.channels_last else [])])


def autotune(denoiser: nn.Module, x: Tensor, identity: str, budget: float = 2.0, **cond: Any) -> Runtime:
    """The runtime that `probe` finds for batches like `x (B, *S)`, from the notes of this machine if it is there.

    identity: of the network, such as the hash of its weights. The notes make a repeated command take the same
    decision, so that it gives the same images, and spare it the probe. They depend on the machine, torch, the
    threads, the network and the batch size.
    """
    device = x.device.type
    chip = [platform.machine(), processor(x.device), torch.backends.cpu.get_cpu_capability()]
    told = [identity, list(x.shape), device, *chip, torch.__version__]
    key = hashlib.sha256(json.dumps([*told, torch.get_num_threads()]).encode()).hexdigest()[:16]
    notes = autotune_cache()
    try:
        known = json.loads(notes.read_text())
    except (OSError, ValueError):
        known = {}
    try:
        return parse_runtime(known[key], device)
    except (KeyError, TypeError, AttributeError, BadInput):
        found = dataclasses.replace(probe(denoiser, x, budget=budget, **cond), threads=0)
    note(notes, {**(known if isinstance(known, dict) else {}), key: format_runtime(found)})
    return found


def autotune_cache() -> Path:
    """The file of notes: in $HASTEN_CACHE, or in hasten's folder of the user's cache (`environment.cache_folder`)."""
    return cache_folder() / "runtime.json"


def note(file: Path, known: dict[str, str]) -> None:
    """Write the notes down; a machine where that cannot be done probes again next time."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(known, indent=1))
