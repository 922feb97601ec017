"""The method of each row of a comparison as a `SamplingConfig` file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import check_writable, write_file
from ..plan.config import SamplingConfig

__all__ = ["row_config", "write_configs"]


def row_config(row: Mapping[str, Any]) -> SamplingConfig:
    """How a row was sampled, for `--config`. Of another model's recommended method nothing but the guidance is set."""
    fixed = row["sampler"] == "plan"  # a plan, or another model's recommended method
    return SamplingConfig(
        sampler=None if fixed else row["sampler"],
        times=None if fixed else row["times"],
        steps=None if fixed else row["steps"],
        guidance_scale=row["guidance_scale"],
        guides=row.get("guides") or (),
        start=row.get("start"),
        plan=row.get("plan"),
        accelerators=row.get("accelerators") or (),
        precision=row["protocol"].get("dtype"),
    )


def write_configs(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `configs/ROW.toml` for each row: `hasten sample MODEL --config` samples as the row did."""
    written: set[str] = set()
    for row in rows:
        name = re.sub(r"[^a-z0-9.]+", "-", row["name"].lower()).strip("-")
        name = row["key"] if not name or name in written else name
        written.add(name)
        model = row.get("model") or row["protocol"]["model"]
        files = "".join(f" --{key} {row[key]}" for key in ("lora", "decoder") if row.get(key))
        first = row.get("first_evaluation")
        files += f", first evaluation by {first} (Model.with_first_evaluation)" if first else ""
        text = f"# of the model {model}{files}\n{row_config(row).to_toml()}"
        write_file(check_writable(out / "configs" / f"{name}.toml"), text.encode())
