"""The folder of a comparison: finished rows, their images, and what a row's numbers depend on."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import BadInput
from .images import reserve, write

if TYPE_CHECKING:
    from .model import Model


SCHEMA = 1
QUALITY = (  # what a row holds None of where it was not measured
    "frechet", "frechet_low", "frechet_high", "kid", "precision", "recall", "density", "coverage", "inception_score",
    "accuracy", "psnr", "rms",
)  # fmt: skip


class Store:
    """The folder of a comparison: its finished rows and their images, each file written whole or not at all.

    Rows lie in results.jsonl under a `key`, the hash of all that their numbers depend on: weights, method, the
    reference's method, n, seed, runtime, features. Rows of other settings stay in the file and out of the report.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, reserve(out / "results.jsonl")
        self.rows: dict[str, dict[str, Any]] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                self.rows[row["key"]] = row
            except (json.JSONDecodeError, KeyError, TypeError) as e:
                raise BadInput(f"{self.path}, line {number}: not a row of hasten compare; choose another folder") from e

    def put(self, *rows: dict[str, Any]) -> None:
        """Add or replace rows on disk."""
        self.rows |= {row["key"]: row for row in rows}
        write(self.path, "".join(json.dumps(row) + "\n" for row in self.rows.values()).encode())

    def timing(self, machine: dict[str, Any], keys: Iterable[str]) -> dict[str, Any] | None:
        """What `put_timing` wrote, if it holds for this machine and has all rows."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = json.loads((self.out / "timing.json").read_text())
            if found["machine"] == machine and all(key in found["rows"] for key in keys):
                return found["rows"]
        return None

    def put_timing(self, machine: dict[str, Any], rows: dict[str, Any]) -> None:
        """Keep the seconds and counts of one interleaved run."""
        write(self.out / "timing.json", json.dumps({"machine": machine, "rows": rows}).encode())

    def keep(self, name: str, images: np.ndarray) -> None:
        """Keep an array beside the rows."""
        stream = io.BytesIO()
        np.save(stream, images)
        write(reserve(self.out / "samples" / f"{name}.npy"), stream.getvalue())

    def images(self, name: str) -> np.ndarray | None:
        """What `keep` wrote, or None if it is not there."""
        with contextlib.suppress(OSError, ValueError):
            return np.load(self.out / "samples" / f"{name}.npy")
        return None


def fingerprint(model: Model) -> str:
    """sha256 of weights, parts and statistics as they are now, and of what gives the weights their meaning."""
    digest = hashlib.sha256()
    tensors = {**model.denoiser.state_dict(), **model.statistics}
    for part, net in sorted(model.parts.items()):
        tensors |= {f"{part}.{name}": value for name, value in net.state_dict().items()}
    for name, value in tensors.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for part in ("schedule", "prediction", "clock"):
        digest.update(repr(getattr(model.denoiser, part, None)).encode())
    return digest.hexdigest()


def now() -> str:
    """The date and time, UTC, to the minute."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def earlier(file: Path, run: dict[str, Any], read: Callable[[dict[str, Any]], object]) -> dict[str, Any] | None:
    """What an unfinished run wrote down in `file`, if it was asked the same as `run`; None if there is none.

    Raises BadInput where it was asked for something else, where the file is damaged, and where its folder holds a
    model that no such run made. read: is given what was found, and raises where it cannot be used.
    """
    out = file.parent
    if not file.is_file():
        if (out / "model.json").exists():
            raise BadInput(f"{out} holds a model already: choose another folder")
        return None
    try:
        known = json.loads(file.read_text())
        different = [key for key, value in json.loads(json.dumps(run)).items() if known.get(key) != value]
        if not different:
            read(known)
            return known
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise BadInput(f"cannot read {file}: {e}") from e
    key = different[0]
    raise BadInput(
        f"{out} is a run with {key} {known.get(key)}, asked for {run[key]}: "
        "ask for the same, or write to another folder"
    )
