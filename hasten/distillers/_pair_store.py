"""The files of a store of pairs: complete blocks, each with its checksum, and a description that must match."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BadInput, HastenError
from ..files import atomic_open, remove_leftovers, sha256, write_atomic

DESCRIPTION = "pairs.json"


def to_storage(x: Tensor, dtype: str) -> np.ndarray:
    """Samples as an array of the stored dtype; `"uint8"` clips them to [-1, 1]."""
    if dtype == "uint8":
        return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8).numpy()
    return x.to("cpu", getattr(torch, dtype)).numpy()


def verify_blocks(folder: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of the blocks that a folder holds.

    Args:
        folder: of the store.
        config: settings of the pairs.

    Raises:
        BadInput: where the store has other settings, or files are missing or damaged.
    """
    file = folder / DESCRIPTION
    remove_leftovers(folder)
    if not file.is_file():
        return []
    try:
        description = json.loads(file.read_text())
        blocks, stored = list(description["blocks"]), dict(description["how"])
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise BadInput(f"cannot read {file} ({type(e).__name__}): remove the folder to generate the pairs again") from e
    for key, value in config.items():
        if stored.get(key) != value:
            raise BadInput(
                f"{folder} holds pairs with {key} {shorten(stored.get(key))}, not {shorten(value)}: use the same "
                "settings, or remove the folder to generate them again"
            )
    for number, entry in enumerate(blocks):
        for kind in sorted(entry.keys() - {"rows"}):
            path = folder / f"{kind}-{number:05d}.npy"
            if not path.is_file() or sha256(path) != entry[kind]:
                state = "damaged" if path.is_file() else "missing"
                raise BadInput(f"{path} is {state}: remove {folder} to generate the pairs again")
    return blocks


def write_description(folder: Path, config: dict[str, Any], blocks: list[dict[str, Any]]) -> None:
    """Write the settings and the list of complete blocks."""
    try:
        write_atomic(folder / DESCRIPTION, json.dumps({"how": config, "blocks": blocks}, indent=1) + "\n")
    except OSError as e:
        raise HastenError(f"cannot write the pairs in {folder}: {e.strerror or e}") from e


def write_block(folder: Path, name: str, array: np.ndarray) -> str:
    """Write one file atomically and return its checksum."""
    try:
        with atomic_open(folder / f"{name}.npy") as file:
            np.save(file, array)
    except OSError as e:
        raise HastenError(f"cannot write the pairs in {folder}: {e.strerror or e}") from e
    return sha256(folder / f"{name}.npy")


def teacher_fingerprint(teacher: nn.Module) -> str:
    """A teacher's weights, schedule, module classes and guides as 16 hexadecimal digits."""
    networks = [(type(module).__name__, repr(vars(module).get("guide"))) for module in teacher.modules()]
    schedule: Any = teacher.schedule
    digest = hashlib.sha256(json.dumps([networks, schedule.to_dict()], sort_keys=True).encode())
    for key, value in sorted(teacher.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def shorten(value: Any) -> str:
    """The text of a value, at most 40 characters."""
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
