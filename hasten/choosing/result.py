"""What a search leaves: `best.toml`, the Pareto front and the certificate as JSON, a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..compare.variants import Variant
from ..files import check_writable, write_file
from ..plan.config import SamplingConfig
from ..utils.config import to_toml
from .search import Entry, format_seconds

__all__ = ["best_toml", "entry_row", "table_lines", "variant_config", "write_result"]


def variant_config(variant: Variant, precision: str | None) -> SamplingConfig:
    """How a candidate samples, without its files."""
    config = variant.config.replace(precision=precision)
    fixed = variant.model is not None or variant.lora is not None
    if fixed and not variant.sampler:  # a student's own method; its number of steps may be one of several
        return config.replace(sampler=None, times=None)
    return config


def best_toml(
    head: str, variant: Variant, precision: str | None, certificate: Mapping[str, Any] | None, why_not: str | None
) -> str:
    """The file of a choice: the table [sampling] is a `SamplingConfig`, [model] has the files that belong to it.

    Args:
        head: A comment.
        variant: The choice.
        precision: Of the network.
        certificate: Its promise; None for the plain model.
        why_not: Why `hasten.apply` cannot put it into a pipeline; None where it can.
    """
    tables: dict[str, Any] = {"sampling": variant_config(variant, precision).to_dict()}
    files = {key: getattr(variant, key) for key in ("model", "lora", "decoder") if getattr(variant, key) is not None}
    if files:
        tables["model"] = {("name" if key == "model" else key): value for key, value in files.items()}
    if certificate is not None:
        tables["certificate"] = {
            key: value for key, value in certificate.items() if not isinstance(value, float) or math.isfinite(value)
        }
    lines = [head] + ([] if why_not is None else [f"not for hasten.apply: {why_not}"])
    return "".join(f"# {line}\n" for line in lines) + to_toml(tables)


def entry_row(entry: Entry, rejected: Mapping[str, str], precision: str | None) -> dict[str, Any]:
    """A candidate as JSON."""
    v, loss = entry.variant, entry.loss
    files = {key: getattr(v, key) for key in ("model", "lora", "decoder") if getattr(v, key) is not None}
    return {
        "name": entry.name,
        "seconds_per_image": entry.seconds,
        "speedup": 1 / entry.relative if entry.relative else None,
        "timed": entry.timed,
        "nfe": entry.nfe,
        "loss": loss.value,
        "loss_error": loss.error if math.isfinite(loss.error) else None,
        "seeds": loss.count,
        "config": variant_config(v, precision).to_dict(),
        **files,
        "rejected": rejected.get(entry.name),
    }


def table_lines(front: Sequence[Entry], chosen: str, show: Any) -> list[str]:
    """The Pareto front as a short table; times that were predicted from the evaluations have a ~.

    Args:
        front: The candidates, fastest first.
        chosen: Name of the choice, which has a *.
        show: A loss in words.
    """
    rows = []
    for entry in front:
        mark = "" if entry.timed else "~"
        times = f"{mark}{format_seconds(entry.seconds)}", f"{mark}{1 / max(entry.relative, 1e-9):.2f}x"
        rows.append((f"{'* ' if entry.name == chosen else '  '}{entry.name}", *times, show(entry.loss.value)))
    heads = ("  candidate", "an image", "speedup", "loss")
    widths = [max(len(row[k]) for row in (heads, *rows)) for k in range(4)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in (heads, *rows)]


def write_result(out: Path, folder: Path, text: str, result: Mapping[str, Any]) -> None:
    """Write the file of the choice, and beside the state of the search `result.json`."""
    write_file(check_writable(folder / "result.json"), (json.dumps(result, indent=2) + "\n").encode())
    write_file(check_writable(out), text.encode())
