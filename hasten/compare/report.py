"""The report of a comparison: `report.html` (self-contained), `front.png`, `grid.png`, and the table on stdout."""

from __future__ import annotations

import base64
import functools
import io
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import write_atomic
from ..storage.provenance import command_line
from .advice import NEAR, equivalent_row, is_uncertain, recommended_row
from .jobs import split_scale
from .main_table import format_parts, main_columns
from .paired_table import paired_cells, paired_columns
from .pictures import collect_pictures
from .plots import (
    CAPTIONS,
    NEAR_DB,
    Row,
    cost_axis,
    figure_svg,
    pareto_front,
    plot_guidance_sweep,
    plot_quality,
    quality_metric,
    recorded_baseline,
)
from .restored_pictures import collect_restored
from .restored_rows import TRUTH, RestoredPictures, restored_headline, restoring_command, truth_cells

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.table import Table


def headline(rows: Sequence[Row]) -> str:
    """One sentence on the recommended row: its speed-up and its quality, or that there is none."""
    rows = [row for row in rows if not row.get("failed")]
    reference = next((row for row in rows if row["role"] == "reference"), None)
    if reference is None:
        return "The reference has not finished yet: run the same command again to resume."
    best = recommended_row(rows)
    if reference.get("truth_psnr") is not None:
        return restored_headline(best, reference)
    if reference.get("frechet") is None:
        if len(rows) == 1:
            return f"Only the reference, {reference['name']}, has finished."
        blind = "Quality was not measured: there are no real images to compare with."
        if best is None and (other := equivalent_row(rows)) is not None:
            return (
                f"{other['name']} is {other['speedup']:.1f}× faster than {reference['name']} with other pictures that "
                f"fit their prompts as well. No faster row reaches {NEAR_DB:g} dB PSNR to the reference's pictures."
            )
        if best is None:
            return f"No faster row reaches {NEAR_DB:g} dB PSNR to the images of {reference['name']}. {blind}"
        return (
            f"{best['name']} is {best['speedup']:.1f}× faster than {reference['name']} at {format_psnr(best)}: the "
            f"fastest row above {NEAR_DB:g} dB. {blind}"
        )
    if best is None:
        return f"No variant comes within {NEAR - 1:.0%} of the distance of {reference['name']} at a lower cost."
    return (
        f"{best['name']} ({format_nfe(best['nfe'])} NFE) makes an image {best['speedup']:.1f}× faster than "
        f"{reference['name']} ({format_nfe(reference['nfe'])} NFE) at a Fréchet distance of {best['frechet']:.2f} "
        f"against {reference['frechet']:.2f}"
        + (f" (real images {recorded_baseline(rows):.2f})." if recorded_baseline(rows) else ".")
    )


def sample_command(row: Row) -> str:
    """The command line that samples with the method of a row; of one with a teacher's first evaluation, Python."""
    if row.get("first_evaluation"):
        student = row.get("model") or row["protocol"]["model"]
        (teacher, own), scale = split_scale(row["first_evaluation"]), f"guidance_scale={row['guidance_scale']:g}"
        scale += "" if own == 1 else f", teacher_guidance_scale={own:g}"
        how = f"steps={row['steps']}" + ("" if row["sampler"] == "plan" else f", sampler={row['sampler']!r}")
        return (
            f"student, teacher = hasten.load({student!r}), hasten.load({teacher!r})\n"
            f"student.with_first_evaluation(teacher, {scale}).sample(4, {how})"
        )
    words = shlex.split(row["protocol"].get("command") or "")
    model = row.get("model") or (words[2] if len(words) > 2 else row["protocol"]["model"])
    planned = row.get("plan") is not None
    own = row["sampler"] == "plan" and not planned  # another model, or a LoRA, with its recommended method
    options: dict[str, object] = {"plan": row.get("plan")}
    if not planned:
        options |= {"sampler": None if own else row["sampler"], "times": None if own else row["times"]}
        options["steps"] = row["steps"]
    options |= {"guidance_scale": row["guidance_scale"], "guide": list(row.get("guides") or ())}
    options |= {"start": row.get("start")}
    options["accelerate"] = list(row.get("accelerators") or ())
    options |= {"lora": row.get("lora"), "decoder": row.get("decoder")}
    if prompts := row["protocol"].get("prompts"):
        options["prompt"] = prompts[0]
    if known := row["protocol"].get("restoration"):
        return restoring_command(model, options, known["factor"])
    return command_line("sample", model, options)


def format_nfe(value: float | int | None) -> str:
    """An NFE as text: `8`, or `7.5` where it is no integer."""
    if value is None:
        return "–"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"


def format_psnr(row: Row) -> str:
    """PSNR to the reference images as text."""
    return "the reference's own images" if row.get("psnr") is None else f"{row['psnr']:.1f} dB to the reference images"


def format_cells(row: Row) -> dict[str, str]:
    """A row's figures as text by column; an en dash where a figure is missing."""

    def show(key: str, form: str, scale: float = 1.0) -> str:
        return "–" if row.get(key) is None else format(row[key] * scale, form)

    deviations = row.get("deviation") or {}

    def spread_of(key: str, form: str, scale: float = 1.0) -> str:
        return "" if deviations.get(key) is None else f"± {format(deviations[key] * scale, form)}"

    spread = row.get("speedup_low") is not None and row["role"] != "reference"
    interval = row.get("frechet_low") is not None
    ratio = row.get("frechet_over_equal_cost")
    span = f"{row['frechet_low']:.2f}–{row['frechet_high']:.2f}" if interval else ""
    return {
        "guidance": f"{row['guidance_scale']:g}",
        "nfe": format_nfe(row["nfe"]),
        "macs": show("macs_per_image", ".2f", 1e-9),
        "seconds": show("seconds_per_image", ".3g"),
        "speedup": show("speedup", ".1f") + ("×" if row.get("speedup") is not None else ""),
        "speedup_spread": f"{row['speedup_low']:.1f}–{row['speedup_high']:.1f}" if spread else "",
        "frechet": show("frechet", ".2f"),
        "frechet_spread": spread_of("frechet", ".2f") or span,
        "ratio": "–" if ratio is None else f"{ratio:.2f}×",
        "kid": show("kid", ".2f", 1e3),
        "kid_spread": spread_of("kid", ".2f", 1e3),
        "precision": show("precision", ".3f"),
        "precision_spread": spread_of("precision", ".3f"),
        "recall": show("recall", ".3f"),
        "recall_spread": spread_of("recall", ".3f"),
        "coverage": show("coverage", ".3f"),
        "coverage_spread": spread_of("coverage", ".3f"),
        "accuracy": show("accuracy", ".1%"),
        "accuracy_spread": spread_of("accuracy", ".1%"),
        "psnr": show("psnr", ".1f"),
        "psnr_spread": spread_of("psnr", ".2f"),
        "rms": show("rms", ".3f"),
        "ssim": show("ssim", ".3f"),
        "match": show("prompt_match", ".1%"),
        "match_spread": "" if row.get("prompt_match_error") is None else f"± {row['prompt_match_error']:.1%}",
        "diversity": show("diversity", "#.3g"),
        "diversity_spread": "" if row.get("diversity_error") is None else f"± {row['diversity_error']:#.2g}",
        **truth_cells(row),
        "parts": format_parts(row.get("seconds_by_part")),
        "memory": show("peak_memory", ".0f", 2**-20),
        **paired_cells(row),
    }


def results_table(rows: Sequence[Row], width: int = 160) -> Table:
    """The rows as a `rich` table, with the columns that fit `width` characters; `*` marks the Pareto front."""
    from rich.table import Table
    from rich.text import Text

    columns = {  # heading: (cell, minimum width of the terminal)
        "guidance": ("guidance", 120), "NFE": ("nfe", 0), "s/image": ("seconds", 0), "speed-up": ("speedup", 0),
        "ms text + net + decoder": ("parts", 130), "Fréchet": ("frechet", 0), "95 %": ("frechet_spread", 100),
        "prompt match": ("match", 80), "diversity": ("diversity", 120), "KID e3": ("kid", 150),
        "PSNR to truth": ("truth_psnr", 0), "LPIPS": ("truth_lpips", 0), "consistency": ("consistency", 100),
        "precision": ("precision", 150), "recall": ("recall", 120), "accuracy": ("accuracy", 100), "PSNR": ("psnr", 80),
        "SSIM": ("ssim", 130),
    }  # fmt: skip
    absent = absent_columns(rows)
    shown = {head: cell for head, (cell, minimum) in columns.items() if width >= minimum and cell not in absent}
    result = Table(header_style="bold", row_styles=["", "on grey7"], pad_edge=False, box=None)
    result.add_column("", width=1)
    result.add_column("variant", overflow="fold", min_width=20)
    for head in shown:
        result.add_column(head, justify="right", no_wrap=True)
    front, failed = front_rows(rows), [row for row in rows if row.get("failed")]
    for i, row in enumerate(rows):
        if row.get("failed"):
            continue
        c = format_cells(row)
        style = "bold" if row["role"] == "reference" else "dim" if row["role"] == "equal-cost" else None
        name = Text(str(row["name"]))  # without markup
        result.add_row("*" if i in front else "", name, *(c[cell] for cell in shown.values()), style=style)
    for row in failed:
        result.add_row("", Text(f"{row['name']} failed: {row['failed']}"), style="red")
    return result


def absent_columns(rows: Sequence[Row]) -> set[str]:
    """The cells that no row has a figure for, of those that are shown for some models or numbers of images only."""
    fields = {"match": "prompt_match", "diversity": "diversity", "parts": "seconds_by_part", "macs": "macs_per_image"}
    fields |= {name: name for name in ("frechet", "kid", "precision", "recall", "coverage")}
    fields |= {"frechet_spread": "frechet", "ratio": "frechet_over_equal_cost"}
    fields |= {name: name for name in TRUTH}
    missing = {cell for cell, key in fields.items() if all(row.get(key) is None for row in rows)}
    if "truth_psnr" not in missing:  # of a model that restores images
        return missing | {"accuracy", "ssim"}
    return missing | ({"ssim"} if "match" in missing else {"accuracy"})


def front_rows(rows: Sequence[Row]) -> set[int]:
    """Indices of the rows on the Pareto front: of distance and cost, or of PSNR and time."""
    if (quality := quality_metric(rows)) in ("psnr", "truth_psnr"):
        return set(pareto_front(rows, "seconds_per_image", quality, higher=True))
    return set(pareto_front(rows, cost_axis(rows)))


def image_strip(images: np.ndarray, height: int = 56, gap: int = 3) -> Image:
    """Images uint8 `(K, C, H, W)` in a row, `gap` pixels apart; small ones are enlarged by an integer to about `height`
    pixels, without interpolation."""
    from PIL import Image

    count, channels, h, w = images.shape
    scale = max(1, round(height / h))
    pixels = images if channels == 3 else np.repeat(images[:, :1], 3, axis=1)
    pixels = pixels.transpose(0, 2, 3, 1).repeat(scale, 1).repeat(scale, 2)
    sheet = np.full((h * scale, count * w * scale + (count - 1) * gap, 3), 255, np.uint8)
    for k in range(count):
        start = k * (w * scale + gap)
        sheet[:, start : start + w * scale] = pixels[k]
    return Image.fromarray(sheet)


def image_grid(rows: Sequence[Row], images: Mapping[str, np.ndarray], heads: Sequence[str] = ()) -> Image:
    """Sample images, a row per variant with its name and NFE, a column per seed.

    Args:
        rows: Rows of results.jsonl.
        images: uint8 `(K, C, H, W)` by row key.
        heads: A heading for each column.

    Raises:
        ValueError: if no row has images.
    """
    from PIL import Image, ImageDraw, ImageFont

    strips = [(row, image_strip(images[row["key"]])) for row in rows if row["key"] in images]
    if not strips:
        raise ValueError("a grid needs the images of at least one row")
    bold, plain = ImageFont.load_default(15), ImageFont.load_default(13)
    left = 24 + max(max(int(bold.getlength(row["name"])) for row, _ in strips), 130)
    top, width, height = (26 if heads else 8), strips[0][1].width, strips[0][1].height
    sheet = Image.new("RGB", (left + width + 8, top + len(strips) * (height + 5) + 4), "white")
    pen = ImageDraw.Draw(sheet)
    step = (width + 3) / len(images[strips[0][0]["key"]])
    for k, head in enumerate(heads):
        while plain.getlength(head) > step - 4 and len(head) > 2:
            head = head[:-2].rstrip() + "…" if not head.endswith("…") else head[:-2] + "…"
        pen.text((left + (k + 0.5) * step, 13), head, font=plain, fill="#555555", anchor="mm")
    for k, (row, picture) in enumerate(strips):
        y = top + k * (height + 5)
        sheet.paste(picture, (left, y))
        pen.text((10, y + height / 2 - 9), row["name"], font=bold, fill="#111111", anchor="lm")
        guided = "" if row["guidance_scale"] == 1 else f", guidance {row['guidance_scale']:g}"
        below = f"{format_nfe(row['nfe'])} NFE{guided}"
        pen.text((10, y + height / 2 + 10), below, font=plain, fill="#666666", anchor="lm")
    return sheet


def shown_second(rows: Sequence[Row], best: Row | None) -> int:
    """The index of the row that the page first shows against the reference: the recommended one, or the second."""
    return next((k for k, row in enumerate(rows) if row is best), min(1, len(rows) - 1))


def data_uri(picture: Image) -> str:
    """A picture as a `data:` URI of a PNG."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def without_glyph_warnings(make: Callable[..., Path]) -> Callable[..., Path]:
    """Suppress matplotlib's warnings of characters that its font lacks: the table has the names."""

    @functools.wraps(make)
    def run(*arguments: Any, **options: Any) -> Path:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            return make(*arguments, **options)

    return run


@without_glyph_warnings
def write_report(
    out: Path,
    rows: Sequence[Row],
    images: Mapping[str, np.ndarray],
    heads: Sequence[str] = (),
    note: str = "",
    restored: RestoredPictures | None = None,
) -> Path:
    """Write `report.html`, `front.png` (where quality was measured), `grid.png`, and `guidance.png` where a method has
    three guidance scales or more.

    Args:
        out: The folder to write.
        rows: Rows of results.jsonl, in the order to show.
        images: uint8 `(K, C, H, W)` by row key, the same K seeds in each.
        heads: A heading for each image column (class names).
        note: A line on what is missing, shown under the headline.
        restored: Of a model that restores images: the degraded and the true ones, of the same K pairs.

    Returns:
        The path of `report.html`.
    """
    from jinja2 import Environment, PackageLoader

    figure, swept = plot_quality(rows), plot_guidance_sweep(rows)
    shots, equivalent = collect_pictures(rows, images), equivalent_row(rows)
    for name, each in {"front": figure, "guidance": swept}.items():
        if each is not None:
            each.savefig(out / f"{name}.png", dpi=160)
    if any(row["key"] in images for row in rows):
        image_grid(rows, images, heads).save(out / "grid.png")
    front, best, quality = front_rows(rows), recommended_row(rows), quality_metric(rows) == "frechet"
    shown = [
        {
            "row": row,
            "number": number,
            "cells": format_cells(row),
            "front": number - 1 in front,
            "best": row is best,
            "strip": data_uri(image_strip(images[row["key"]], 84)) if row["key"] in images else "",
        }
        for number, row in enumerate(rows, 1)
    ]
    small = plot_quality(rows, narrow=True)
    first = next((row for row in rows if not row.get("failed")), rows[0])
    baselines = first["protocol"].get("floors") or {}
    axis, absent = cost_axis(rows) if quality else "seconds_per_image", absent_columns(rows)
    page = Environment(loader=PackageLoader("hasten.compare"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    what = f"{'Fréchet distance' if quality else 'PSNR'} against {CAPTIONS[axis]}, a numbered mark a row of the table"
    text = page.get_template("report.html.j2").render(
        shown=shown,
        headline=headline(rows),
        heads=heads,
        note=note,
        best=best,
        failed=[row for row in rows if row.get("failed")],
        figure="" if figure is None else figure_svg(figure, "wide", what),
        small="" if small is None else figure_svg(small, "small", what),
        swept=figure_svg(swept, "sweep", "Fréchet distance against class accuracy") if swept is not None else "",
        protocol={**first["protocol"], "floors": baselines},
        cost=CAPTIONS[axis],
        quality=quality,
        absent=absent,
        columns=main_columns(quality, absent),
        uncertain=best is not None and quality and is_uncertain(best),
        near=NEAR_DB,
        command=sample_command(best) if best is not None else "",
        equivalent=equivalent,
        equivalent_command=sample_command(equivalent) if equivalent is not None else "",
        reference_name=first["name"],
        warned=[row for row in rows if row.get("warnings")],
        paired=paired_columns(rows),
        shots=shots,
        restored=collect_restored(shots, restored, [images.get(row["key"]) for row in rows]),
        bicubic=bicubic_cells(rows),
        psnr={} if shots is None else {f"{row},{k}": text for (row, k), text in shots.psnr.items()},
        other=shown_second(rows, best or equivalent),
        width=image_strip(next(iter(images.values())), 84).width if images else 0,
        real=format_cells({**dict.fromkeys(rows[0]), **baselines, "guidance_scale": 1.0, "nfe": 0}),
    )
    path = out / "report.html"
    write_atomic(path, text)
    return path


def bicubic_cells(rows: Sequence[Row]) -> dict[str, str]:
    """The cells of the degraded images themselves, enlarged; empty where none are restored."""
    if (known := rows[0]["protocol"].get("restoration")) is None:
        return {}
    return format_cells({**dict.fromkeys(rows[0]), **known["bicubic"], "guidance_scale": 1.0, "nfe": 0})


def print_report(rows: Sequence[Row], page: Path) -> None:
    """Print the rows as a table, what speaks against them, and where the page is."""
    from rich.console import Console

    console = Console()
    console.print(results_table(rows, console.width))
    for line in (f"{row['name']}: {text}" for row in rows for text in row["warnings"]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{headline(rows)}\nReport: {page}", markup=False, highlight=False, soft_wrap=True)
