"""The folder of a comparison: finished rows, their images, and what a row's numbers depend on."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BadInput
from ..files import check_writable, read_json_lines, write_file

if TYPE_CHECKING:
    pass


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
        self.out, self.path = out, check_writable(out / "results.jsonl")
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
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in self.rows.values()).encode())

    def timing(self, machine: dict[str, Any], keys: Iterable[str]) -> dict[str, Any] | None:
        """What `put_timing` wrote, if it holds for this machine and has all rows."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = json.loads((self.out / "timing.json").read_text())
            if found["machine"] == machine and all(key in found["rows"] for key in keys):
                return found["rows"]
        return None

    def put_timing(self, machine: dict[str, Any], rows: dict[str, Any]) -> None:
        """Keep the seconds and counts of one interleaved run."""
        write_file(self.out / "timing.json", json.dumps({"machine": machine, "rows": rows}).encode())

    def keep(self, name: str, images: np.ndarray) -> None:
        """Keep an array beside the rows."""
        stream = io.BytesIO()
        np.save(stream, images)
        write_file(check_writable(self.out / "samples" / f"{name}.npy"), stream.getvalue())

    def images(self, name: str) -> np.ndarray | None:
        """What `keep` wrote, or None if it is not there."""
        with contextlib.suppress(OSError, ValueError):
            return np.load(self.out / "samples" / f"{name}.npy")
        return None
