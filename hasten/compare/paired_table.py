"""The columns of a report about pairs of images of the same seeds, about prompts, and about the parts of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .plots import Row


@dataclass(frozen=True)
class Column:
    """A column: its cell in `paired_cells`, its head as HTML, and what it is."""

    cell: str
    head: str
    title: str


COLUMNS = (
    Column("pair_psnr", "PSNR<br>dB", "how near a picture is to the reference's of the same seed"),
    Column("pair_ssim", "SSIM", "structural similarity to the reference's picture, 1 for equal ones"),
    Column("pair_lpips", "LPIPS", "perceptual distance to the reference's picture, 0 for equal ones"),
    Column(
        "pair_feature_distance", "feature<br>distance",
        "of the two pictures, in per cent of the distance between two seeds of one prompt",
    ),
    Column(
        "pair_prompt_score", "prompt<br>score",
        "100 times the cosine of picture and prompt in the judge's space; below, its difference to the reference's",
    ),
    Column(
        "pair_image_reward", "Image-<br>Reward",
        "learned human preference for picture and prompt; below, its difference to the reference's",
    ),
    Column(
        "pair_diversity", "diver-<br>sity",
        "how much pictures of one prompt differ, in per cent of the reference's; well below 100 the row has collapsed",
    ),
    Column("memory_text", "MiB<br>text", "peak memory while the text encoder ran"),
    Column("memory_network", "MiB<br>network", "peak memory while the network ran"),
    Column("memory_decoder", "MiB<br>decoder", "peak memory while the image decoder ran"),
)  # fmt: skip


def paired_cells(row: Row) -> dict[str, str]:
    """A row's figures as text by cell, and their intervals under the cell's name with `_span`."""
    paired: Any = row.get("paired") or {}
    cells: dict[str, str] = {}

    def put(cell: str, value: float | None, span: Sequence[float] | None, form: str) -> None:
        cells[cell] = "–" if value is None else format(value, form)
        cells[cell + "_span"] = "" if span is None else f"{format(span[0], form)} to {format(span[1], form)}"

    for name, form in {"psnr": ".1f", "ssim": ".3f", "lpips": ".3f"}.items():
        known = paired.get(name)
        put(f"pair_{name}", known and known[0], known and known[1:], form)
    for name, key in {"feature_distance": "feature_ratio", "diversity": "diversity_ratio"}.items():
        known = row.get(key) if row["role"] != "reference" or name == "diversity" else None
        put(f"pair_{name}", known and known[0], known and known[1:], ".0%")
    if row["role"] == "reference":
        cells["pair_diversity_span"] = ""
    for name in ("prompt_score", "image_reward"):
        known = paired.get(name)
        put(f"pair_{name}", row.get(name), None, ".2f")
        cells[f"pair_{name}_span"] = "" if not known else f"{known[0]:+.2f} ({known[1]:+.2f} to {known[2]:+.2f})"
    memory = row.get("memory_by_part") or {}
    for part in ("text", "network", "decoder"):
        value = memory.get(part)
        put(f"memory_{part}", None if value is None else value / 2**20, None, ".0f")
    return cells


def paired_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns that some row has a figure for."""
    every = [paired_cells(row) for row in rows if not row.get("failed")]
    return [column for column in COLUMNS if any(cells[column.cell] != "–" for cells in every)]
