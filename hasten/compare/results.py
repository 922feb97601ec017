"""The folder of a comparison: finished rows, their images, and their timing."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput
from ..files import check_writable, read_json_lines, write_file

SCHEMA = 1
# The fields of a row that are None where quality was not measured.
QUALITY = (
    "frechet", "frechet_low", "frechet_high", "kid", "precision", "recall", "density", "coverage", "inception_score",
    "accuracy", "psnr", "rms", "ssim", "prompt_match", "prompt_match_error", "diversity", "diversity_error",
    "diversity_by_prompt", "lpips", "feature_distance", "prompt_score", "image_reward", "paired",
)  # fmt: skip


class ResultStore:
    """The rows and images of a comparison on disk; each file is written atomically.

    Rows are lines of results.jsonl under a `key`, the hash of everything that their numbers depend on: weights, method,
    the reference's method, n, seed, number format, features. Rows of other settings remain in the file and are not part
    of the report.

    Args:
        out: The folder of the comparison.

    Raises:
        BadInput: if results.jsonl holds something else than rows of a comparison.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, check_writable(out / "results.jsonl")
        self.rows: dict[str, dict[str, Any]] = {}
        lines = read_json_lines(self.path)  # a truncated line is ignored, and its row is run again
        text = self.path.read_bytes().strip(b"\0 \r\n\t") if self.path.is_file() else b""
        if not lines and text and not text.startswith(b'{"key'):
            raise BadInput(f"{self.path} holds no rows of hasten compare: choose another folder")
        for number, row in enumerate(lines, 1):
            if not isinstance(row.get("key"), str) or "protocol" not in row:
                raise BadInput(f"{self.path}, row {number}: not a row of hasten compare; choose another folder")
            self.rows[row["key"]] = row

    def put(self, *rows: dict[str, Any]) -> None:
        """Add or replace rows."""
        self.rows |= {row["key"]: row for row in rows}
        self._write_rows()

    def remove(self, keys: Iterable[str]) -> None:
        """Remove rows, and their images."""
        for key in keys:
            if self.rows.pop(key, None) is not None:
                for path in (self.out / "samples").glob(f"{key}*.npy"):
                    path.unlink(missing_ok=True)
        self._write_rows()

    def _write_rows(self) -> None:
        """Write results.jsonl."""
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in self.rows.values()).encode())

    def timing(self, settings: dict[str, Any], keys: Iterable[str]) -> dict[str, Any] | None:
        """The stored timing by row key; None if it was taken with other settings or lacks a row."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            stored = json.loads((self.out / "timing.json").read_text())
            if stored["machine"] == settings and all(key in stored["rows"] for key in keys):
                return stored["rows"]
        return None

    def put_timing(self, settings: dict[str, Any], rows: dict[str, Any]) -> None:
        """Store the seconds and evaluation counts of one interleaved run."""
        write_file(self.out / "timing.json", json.dumps({"machine": settings, "rows": rows}).encode())

    def save_images(self, name: str, images: np.ndarray) -> None:
        """Store an array of images under a name."""
        stream = io.BytesIO()
        np.save(stream, images)
        write_file(check_writable(self.out / "samples" / f"{name}.npy"), stream.getvalue())

    def load_images(self, name: str) -> np.ndarray | None:
        """The images stored under a name, or None."""
        with contextlib.suppress(OSError, ValueError):
            return np.load(self.out / "samples" / f"{name}.npy")
        return None
