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

from ..errors import BadInput
from ..files import contents, difference, read_json_lines
from ..images import reserve, write

if TYPE_CHECKING:
    from ..model.model import Model


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
        found = read_json_lines(self.path)  # a line that was cut is left out, and its row is made again
        text = self.path.read_bytes().strip(b"\0 \r\n\t") if self.path.is_file() else b""
        if not found and text and not text.startswith(b'{"key'):
            raise BadInput(f"{self.path} holds no rows of hasten compare: choose another folder")
        for number, row in enumerate(found, 1):
            if not isinstance(row.get("key"), str) or "protocol" not in row:
                raise BadInput(f"{self.path}, row {number}: not a row of hasten compare; choose another folder")
            self.rows[row["key"]] = row

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
        if not isinstance(value, torch.Tensor):  # a module's extra state
            digest.update(f"{name} {value!r}".encode())
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for part in ("schedule", "prediction", "clock", "null_label", "guidance_range"):
        digest.update(repr(getattr(model.denoiser, part, None)).encode())
    net = getattr(model.denoiser, "net", None)
    digest.update(f"{type(net).__name__} {model.classes} {model.codec}".encode())
    config = getattr(net, "config", None)  # of a network of ours; those of diffusers hold paths and versions
    digest.update(json.dumps(config, sort_keys=True, default=str).encode() if type(config) is dict else b"")
    return digest.hexdigest()


def hash_of(*tensors: torch.Tensor) -> str:
    """16 hexadecimal digits of tensors."""
    digest = hashlib.sha256()
    for value in tensors:
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


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
        if found := contents(out):
            raise BadInput(f"{out} holds {found} already: choose another folder")
        return None
    try:
        known = json.loads(file.read_text())
        different = difference(known, run)
        if different is None:
            read(known)
            return known
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise BadInput(f"cannot read {file}: {e}") from e
    key, old, new = different
    raise BadInput(
        f"{out} is a run with {key} {old}, asked for {new}: ask for the same, write to another folder, or remove it"
    )
