"""The files of a store of pairs: whole blocks, each with its checksum, and a description that must agree."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BadInput, HastenError
from ..files import atomic_open, remove_leftovers, write_atomic

DESCRIPTION = "pairs.json"


def stored(x: Tensor, dtype: str) -> np.ndarray:
    """Samples as they are kept."""
    if dtype == "uint8":
        return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8).numpy()
    return x.to("cpu", getattr(torch, dtype)).numpy()


def check(folder: Path, told: dict[str, Any]) -> list[dict[str, Any]]:
    """The blocks that `folder` holds. BadInput where they were made in another way, or are not what they were."""
    file = folder / DESCRIPTION
    remove_leftovers(folder)
    if not file.is_file():
        return []
    try:
        found = json.loads(file.read_text())
        blocks, how = list(found["blocks"]), dict(found["how"])
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise BadInput(f"cannot read {file} ({type(e).__name__}): remove the folder to make the pairs again") from e
    for key, value in told.items():
        if how.get(key) != value:
            raise BadInput(
                f"{folder} holds pairs made with {key} {short(how.get(key))}, not {short(value)}: ask for the same, or "
                "remove the folder to make them again"
            )
    for number, entry in enumerate(blocks):
        for kind in sorted(entry.keys() - {"rows"}):
            path = folder / f"{kind}-{number:05d}.npy"
            if not path.is_file() or digest(path) != entry[kind]:
                state = "damaged" if path.is_file() else "missing"
                raise BadInput(f"{path} is {state}: remove {folder} to make the pairs again")
    return blocks


def record(folder: Path, told: dict[str, Any], blocks: list[dict[str, Any]]) -> None:
    """List the blocks that are whole."""
    try:
        write_atomic(folder / DESCRIPTION, json.dumps({"how": told, "blocks": blocks}, indent=1) + "\n")
    except OSError as e:
        raise HastenError(f"cannot write the pairs in {folder}: {e.strerror or e}") from e


def write(folder: Path, name: str, array: np.ndarray) -> str:
    """Write one file, whole or not at all; its checksum."""
    try:
        with atomic_open(folder / f"{name}.npy") as file:
            np.save(file, array)
    except OSError as e:
        raise HastenError(f"cannot write the pairs in {folder}: {e.strerror or e}") from e
    return digest(folder / f"{name}.npy")


def digest(path: Path) -> str:
    """sha256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def fingerprint(teacher: nn.Module) -> str:
    """A teacher's weights, its schedule and the classes that it is made of, as 16 hexadecimal digits."""
    told = [(type(module).__name__, repr(vars(module).get("guide"))) for module in teacher.modules()]
    total = hashlib.sha256(json.dumps([told, teacher.schedule.to_dict()], sort_keys=True).encode())
    for key, value in sorted(teacher.state_dict().items()):
        total.update(key.encode() + value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def short(value: Any) -> str:
    """A value in few letters."""
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
