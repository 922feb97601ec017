"""Evaluate models that restore images, such as those of super-resolution, against the true images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BadInput, HastenError, check_int
from ..model.model import Model
from ..plan.config import SamplingConfig
from ..progress import fraction_of, ignore_messages
from ..sampling import Progress
from ..train.data import to_float
from ..utils.config import Config
from ..utils.devices import synchronize
from ..workflows.restoration import RestorationPairs, open_pairs
from ..workflows.restoration_meter import FIGURES, open_meter
from .counting import count_evaluations, start_nfe
from .jobs import model_with_files, prepare_row
from .variants import Variant, load_variants

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..plan.config import SamplingOptions

__all__ = ["RestorationConfig", "best_row", "evaluate_restoration", "restoration_table", "sample_pairs"]

Bars = Callable[[str], "AbstractContextManager[Progress | None]"]


@dataclass(frozen=True)
class RestorationConfig(Config):
    """Which images are restored, and what they are measured by.

    Args:
        data: test images of any sizes; the degraded ones are made from them.
        split: of the data; all of it where there are no splits.
        size: side of the squares that the images are cut into. Default: that of the model's own images.
        whole: take whole images in place of squares.
        n: at most so many squares, or whole images. Default: all, 1,000 at most.
        border: pixels at each side that PSNR and SSIM leave out.
        degrade: what makes the degraded images. Default: what the model was trained with.
        variants: a bundled set of variants or a TOML file: a row each. Default: one row, as the model is sampled.
        features: the feature network of Fréchet distance and KID. Default: efficientnet_lite0, where its weights are.
        lpips: a trunk (`alex`, `vgg`, `alex_shift_tolerant`, `vgg_shift_tolerant`) whose weights are on this machine,
            or a file or folder of them. Default: the first that is found.
        seed: of the noise of the first image; image k has `seed + k`.
        batch_size: images in the network at once.
    """

    data: Any = None
    split: str = "test"
    size: int | None = None
    whole: bool = False
    n: int | None = None
    border: int = 0
    degrade: str | None = None
    variants: Any = None
    features: Any = None
    lpips: Any = None
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_int("border", self.border, 0)
        check_int("seed", self.seed, 0)
        check_int("batch_size", self.batch_size, 1)


def evaluate_restoration(
    model: Model,
    evaluation: RestorationConfig,
    config: SamplingConfig | None = None,
    *,
    progress: Bars = lambda what: nullcontext(),
    warn: Callable[[str], None] = ignore_messages,
    **options: Unpack[SamplingOptions],
) -> dict[str, Any]:
    """Restore degraded test images and measure how near the results are to the true ones.

        result = hasten.evaluate_restoration(model, RestorationConfig(data="photos"), steps=20)
        result["rows"][1]["psnr"]

    The first row has the degraded images themselves, enlarged by bicubic interpolation. Distances (Fréchet, KID) are
    between the restored images and the true ones of the same pairs.

    Args:
        model: a model with a `source_shape`, such as one of super-resolution.
        evaluation: which images; `data` is needed.
        config: how to sample; None: as the model recommends. options: fields of it. With `variants` both must be empty.
        progress: makes a context for each row whose value is called with (done, in all), or is None.
        warn: called with a line for what the user should know.

    Returns:
        A dict: model, sha256, factor, n, pairs, settings, and `rows`, each with name, nfe (evaluations of the network
        an image), seconds_per_image, the figures of `FIGURES` that were measured, `interval`, and how it was sampled.

    Raises:
        BadInput: before anything is sampled, for what cannot be.
    """
    if evaluation.data is None:
        raise BadInput(f"{model.name} restores images: give the true ones (data), a folder, zip or array")
    rows = prepare_rows(model, evaluation, SamplingConfig.of(config, options))
    pairs = open_pairs(
        model, evaluation.data, evaluation.split, evaluation.size, evaluation.whole, evaluation.n, evaluation.degrade,
        warn,
    )  # fmt: skip
    meter = open_meter(pairs, evaluation.border, evaluation.features, evaluation.lpips, model.device, warn)
    base = "bicubic" if pairs.factor > 1 else "degraded"
    found: list[dict[str, Any]] = [{"name": base, "nfe": 0, "seconds_per_image": None, **meter.bicubic()}]
    for name, one, how, count in rows:
        with progress(name) as tick, count_evaluations(one) as evaluations:
            images, seconds = sample_pairs(one, how, pairs, evaluation.seed, evaluation.batch_size, tick)
        nfe = evaluations[0] / len(pairs) + count
        row = {"name": name, "nfe": nfe, "seconds_per_image": seconds, **meter.measure(images)}
        own = {} if one is model else {"model": one.name, "sha256": one.sha256}
        found.append({**row, **own, **how.settings()})
    return {
        "model": model.name,
        "sha256": model.sha256,
        "task": "super-resolution" if pairs.factor > 1 else "restoration",
        "factor": pairs.factor,
        "data": pairs.source,
        "n": len(pairs),
        "pairs": pairs.description,
        "seed": evaluation.seed,
        **meter.settings,
        "rows": found,
    }


PreparedSampling = tuple[str, Model, Any, float]  # name, model, resolved config, evaluations of another network


def prepare_rows(model: Model, evaluation: RestorationConfig, config: SamplingConfig) -> list[PreparedSampling]:
    """The rows to sample: one, or those of a set of variants, the reference first."""
    batch = evaluation.batch_size
    if evaluation.variants is None:
        how = model.resolve(config, batch_size=batch)
        settings = how.settings()
        by = settings.get("sampler") or f"plan {settings.get('plan')}"
        steps = settings.get("steps")
        return [(f"{by}, {steps} step{'' if steps == 1 else 's'}", model, how, 0.0)]
    given = config.replace(precision=None)
    if given != SamplingConfig():
        raise BadInput("variants say how each row is sampled: leave out sampler, times, steps and what else says it")
    variant_set = load_variants(evaluation.variants, model.times, model.guidance_scale)
    rows: list[PreparedSampling] = []
    for v in (variant_set.reference, *variant_set.variants):
        where = f"{variant_set.source}: {v.name!r}"
        try:
            rows.append(prepared_variant(model, v, where, config.precision, batch))
        except HastenError as error:
            if not v.optional:
                raise error if str(error).startswith(where) else BadInput(f"{where}: {error}") from error
    return rows


def prepared_variant(model: Model, v: Variant, where: str, precision: str | None, batch: int) -> PreparedSampling:
    """A row of a set of variants, ready to sample. Raises BadInput, with `where`, for what this model cannot run."""
    other = model_with_files(model, v, where)
    if v.first_evaluation is not None:
        other = prepare_row(other, v, model, where)
    how = other.resolve(v.config.replace(precision=precision), batch_size=batch)
    return v.name, other, how, start_nfe(other, v)


def sample_pairs(
    model: Model,
    config: Any,
    pairs: RestorationPairs,
    seed: int = 0,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> tuple[list[Tensor], float]:
    """Restore the degraded images of pairs.

    Args:
        model: the model.
        config: how to sample, a `SamplingConfig` or what it resolved to.
        pairs: image k has noise of the seed `seed + k`.
        seed: of the first image.
        batch_size: images in the network at once.
        progress: called with (done, in all).

    Returns:
        (n, C, H, W) in [-1, 1] for each group of pairs, and seconds an image: the median over batches, without the
        first one where there are three or more.
    """
    groups, times, done = [], [], 0
    for group in pairs.groups:
        batches = []
        for first in range(0, len(group.sources), batch_size):
            source = to_float(group.sources[first : first + batch_size])
            tick = fraction_of(progress, done, len(pairs), len(source))
            synchronize(model.device)
            start = time.perf_counter()
            batches.append(
                model.sample(
                    len(source), seed=seed + done, config=config, batch_size=batch_size, images=source, progress=tick
                )
            )
            synchronize(model.device)
            times.append((time.perf_counter() - start) / len(source))
            done += len(source)
        groups.append(torch.cat(batches))
    return groups, statistics.median(times[1:] if len(times) > 2 else times)


def restoration_table(result: Mapping[str, Any]) -> list[str]:
    """The rows of `evaluate_restoration` as lines of text, headed by what was measured."""
    rows = result["rows"]
    names = [name for name in FIGURES if any(row.get(name) is not None for row in rows)]
    heads = ["", *(FIGURES[name][0] for name in names), "evaluations", "s/image"]
    lines = [heads]
    for row in rows:
        cells = [str(row["name"])]
        for name in names:
            value = row.get(name)
            cells.append("–" if value is None else format(1e3 * value if name == "kid" else value, FIGURES[name][1]))
        seconds = row.get("seconds_per_image")
        lines.append([*cells, f"{row['nfe']:g}", "–" if seconds is None else f"{seconds:.3g}"])
    widths = [max(len(line[k]) for line in lines) for k in range(len(heads))]
    text = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
    by = [f"{key} {result[key]}" for key in ("features", "lpips") if key in result]
    head = f"{result['model']}, x{result['factor']}, {result['pairs']} of {result['data']} ({result['degrade']}"
    return ["; ".join([head, f"border {result['border']}", *by]) + ")", *(line.rstrip() for line in text)]


def best_row(rows: Sequence[Mapping[str, Any]], within: float = 1.1) -> Mapping[str, Any] | None:
    """The fastest row whose LPIPS and Fréchet distance, where measured, are within a factor of the first sampled row's.

    Args:
        rows: of `evaluate_restoration`; the second one is what the others are compared with.
        within: the factor.
    """
    sampled = [row for row in rows if row.get("seconds_per_image") is not None]
    if not sampled:
        return None
    limits = {name: within * sampled[0][name] for name in ("lpips", "frechet") if sampled[0].get(name) is not None}
    near = [row for row in sampled if all(row.get(name) is not None and row[name] <= limits[name] for name in limits)]
    return min(near, key=lambda row: row["seconds_per_image"], default=None)
