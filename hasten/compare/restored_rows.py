"""What a comparison of a model that restores images measures: its pairs, and the figures of a row against the truth."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..model.model import Model
from ..storage.provenance import command_line
from ..workflows.restoration import open_pairs
from ..workflows.restoration_meter import RestorationMeter, open_meter
from .plots import Row

__all__ = ["TRUTH", "RestoredPictures", "add_figures", "open_restoration", "restored_row"]

PAIRS = 100  # of a row, by default
LEAST = 10
WITHIN, EQUAL_DB = 1.1, 0.3  # of the reference's LPIPS and Fréchet distance, and of its PSNR in dB
# Figures of the meter by their field of a row; those of a row named without "truth_" are to the reference's images
TRUTH = {"truth_psnr": "psnr", "truth_ssim": "ssim", "truth_lpips": "lpips", "consistency": "consistency"}
FORMS = {"truth_psnr": ".2f", "truth_ssim": ".4f", "truth_lpips": ".4f", "consistency": ".2f"}
BY_SEED = "by_seed"  # of the figures of a block: a value for each seed, by figure


@dataclass(frozen=True)
class RestoredPictures:
    """What the page shows beside the pictures of the rows.

    Args:
        inputs: the degraded images, uint8 (K, C, h, w).
        enlarged: the same at the size of the true ones, by bicubic interpolation.
        truths: the true images, uint8 (K, C, H, W).
        factor: of the sides.
    """

    inputs: Any
    enlarged: Any
    truths: Any
    factor: int

    @classmethod
    def of(cls, meter: RestorationMeter, count: int) -> RestoredPictures:
        """The first pairs of a meter."""
        group, pairs = meter.pairs.groups[0], meter.pairs
        large = ((pairs.enlarged()[0][:count] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return cls(group.sources[:count].numpy(), large.numpy(), group.truths[:count].numpy(), pairs.factor)


def open_restoration(
    model: Model, config: Any, n: int | None, report: Callable[[str], None]
) -> tuple[RestorationMeter, dict[str, Any]]:
    """The meter of a comparison, and what its protocol says of it.

    Args:
        model: of the comparison, which reads degraded images.
        config: a `CompareConfig`.
        n: pairs at most. Default: 100.
        report: receives a line for what is not measured.

    Raises:
        BadInput: without data, for fewer than ten pairs, and options that mean nothing here.
    """
    if config.data is None:
        raise BadInput(f"{model.name} makes its images from degraded ones: give --data, true images of a test split")
    for name in ("minutes", "reference", "judge", "prompts"):
        if getattr(config, name) is not None:
            raise BadInput(f"a comparison of a model that restores images takes no {name}: leave it out")
    pairs = open_pairs(model, config.data, config.split, n=PAIRS if n is None else n, report=report)
    if len(pairs) < LEAST:
        raise BadInput(f"{config.data} gives {len(pairs)} pairs: a comparison needs at least {LEAST}")
    meter = open_meter(pairs, 0, config.features, config.lpips, model.device, report)
    bicubic = meter.bicubic()
    figures = {field: bicubic.get(name) for field, name in TRUTH.items()}
    figures |= {name: bicubic.get(name) for name in ("frechet", "kid")}
    digest = hashlib.sha256()
    for tensor in (pairs.groups[0].sources, pairs.groups[0].truths):
        digest.update(tensor.contiguous().numpy().tobytes())
    said = {"pairs": pairs.description, "data": pairs.source, "factor": pairs.factor, "sha256": digest.hexdigest()}
    return meter, {**said, **meter.settings, "bicubic": figures}


def blank_sources(model: Model, count: int) -> Tensor | None:
    """Black sources, where nothing but the number of evaluations matters; None for a model without sources."""
    return None if model.source_shape is None else -torch.ones(count, *model.source_shape)


def add_figures(figures: dict[str, Any], meter: RestorationMeter, images: Tensor) -> None:
    """Add, in place, the figures of a row's images (N, C, H, W) against the truth: their means, the values by seed, and
    the distances of the sets."""
    found = meter.by_image([images])
    series = {field: found[name] for field, name in TRUTH.items() if name in found}
    figures |= {field: float(values.mean()) for field, values in series.items()}
    figures |= {"frechet": None, "kid": None, **meter.of_sets([images])}
    figures[BY_SEED] = {**figures.get(BY_SEED, {}), **{field: values.tolist() for field, values in series.items()}}


def restored_row(rows: Sequence[Row]) -> Row | None:
    """The recommended row where images are compared with true ones: the fastest whose LPIPS and Fréchet distance are
    within 10 % of the reference's; where neither was measured, whose PSNR is within .3 dB. None where there is none.

    Args:
        rows: finished rows, the reference among them.
    """
    reference = next((row for row in rows if row["role"] == "reference"), None)
    if reference is None:
        return None
    limits = {name: reference[name] for name in ("truth_lpips", "frechet") if reference.get(name) is not None}

    def near(row: Row) -> bool:
        if not limits:
            return bool((row.get("truth_psnr") or 0.0) >= reference["truth_psnr"] - EQUAL_DB)
        return all(row.get(name) is not None and row[name] <= WITHIN * value for name, value in limits.items())

    faster = [row for row in rows if row is not reference and row["seconds_per_image"] < reference["seconds_per_image"]]
    return min((row for row in faster if near(row)), key=lambda row: row["seconds_per_image"], default=None)


def restored_headline(best: Row | None, reference: Row) -> str:
    """One sentence on the recommended row, or that there is none."""
    bicubic = reference["protocol"]["restoration"]["bicubic"]
    names = {"truth_lpips": ("LPIPS", ".3f"), "frechet": ("a Fréchet distance of", ".1f")}
    known = [name for name in names if reference.get(name) is not None]
    if best is None:
        what = "10 % of its LPIPS and Fréchet distance" if known else f"{EQUAL_DB:g} dB of its PSNR"
        return f"No row that is faster than {reference['name']} comes within {what}."
    texts = [f"{names[n][0]} {best[n]:{names[n][1]}} against {reference[n]:{names[n][1]}}" for n in known]
    texts.append(f"{best['truth_psnr']:.2f} dB to the true images against {reference['truth_psnr']:.2f}")
    return (
        f"{best['name']} is {best['speedup']:.1f}× faster than {reference['name']}, with {' and '.join(texts)} "
        f"(bicubic {bicubic['truth_psnr']:.2f} dB)."
    )


def truth_cells(row: Row) -> dict[str, str]:
    """The figures of a row against the truth as text, with their 95 % intervals under the name with `_spread`."""
    cells = {}
    for name, form in FORMS.items():
        span = (row.get("paired") or {}).get(name)
        cells[name] = "–" if row.get(name) is None else format(row[name], form)
        cells[name + "_spread"] = "" if span is None else f"{format(span[1], form)}–{format(span[2], form)}"
    return cells


def restoring_command(model: str, options: dict[str, Any], factor: int) -> str:
    """The command line that restores a user's images as a row did."""
    options = {key: value for key, value in options.items() if key not in ("lora", "decoder", "guide")}
    if factor > 1:
        return command_line("upscale", "IMAGES", {"model": model, **options})
    return command_line("translate", model, {"images": "IMAGES", **options})
