"""What a search has measured, on disk: the same command takes it from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput
from ..files import check_writable, write_file

__all__ = ["MeasurementStore"]


class MeasurementStore:
    """The measurements of a search, each written when it is made.

    Args:
        folder: to write.
        settings: what all measurements depend on.

    Raises:
        BadInput: for the folder of another search, naming the first setting that differs.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.path = folder, check_writable(folder / "state.json")
        plain = json.loads(json.dumps(settings))
        self.state: dict[str, Any] = {"settings": plain, "figures": {}, "failed": {}, "spent": {}}
        self.resumed = self.path.is_file()
        if not self.resumed:
            return
        try:
            state = json.loads(self.path.read_text())
            known = state["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{self.path} holds no search of hasten choose: give another --out") from error
        for name in sorted({*known, *plain}):
            if known.get(name) != plain.get(name):
                before, now = short(known.get(name)), short(plain.get(name))
                raise BadInput(
                    f"{folder} holds a search with {name} {before}, asked for {now}: "
                    "repeat that command, give another --out, or delete the folder"
                )
        self.state = state

    def save(self) -> None:
        """Write the state."""
        write_file(self.path, json.dumps(self.state, indent=1).encode())

    def figures(self, key: str) -> dict[str, Any]:
        """The numbers of a candidate, which may be changed and saved."""
        found: dict[str, Any] = self.state["figures"].setdefault(key, {})
        return found

    def rows(self, key: str, first: int, count: int) -> dict[str, Tensor] | None:
        """Arrays of these seeds, None where they were not measured."""
        path = self._path(key, first, count)
        if not path.is_file():
            return None
        try:
            with np.load(path) as stored:
                return {name: torch.from_numpy(stored[name]) for name in stored.files}
        except (OSError, ValueError, EOFError) as error:
            raise BadInput(f"{path} is damaged: delete it, and run the command again") from error

    def put_rows(self, key: str, first: int, count: int, rows: Mapping[str, Tensor]) -> None:
        """Store arrays of these seeds."""
        import io

        stream = io.BytesIO()
        arrays: dict[str, Any] = {name: value.cpu().numpy() for name, value in rows.items()}
        np.savez(stream, **arrays)
        write_file(check_writable(self._path(key, first, count)), stream.getvalue())

    def _path(self, key: str, first: int, count: int) -> Path:
        return self.folder / "seeds" / f"{key}-{first}-{count}.npz"


def short(value: Any) -> str:
    """A setting in an error message."""
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
