"""The rows that a comparison runs, each with its model, plan and key, and the fields of a row."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import zoo
from ..distributed.ranks import Ranks
from ..errors import BadInput, HastenError, NonFinite, check_number
from ..loading import load_to_compare
from ..model.model import Label, Model
from ..model.resolve import RECOMMENDED
from ..performance import cost
from ..pick import pick
from ..progress import ignore_messages
from ..storage.provenance import model_hash
from ..workflows.distribute import part_digest, sharing
from .counting import count_evaluations, start_nfe
from .restored_rows import blank_sources
from .results import QUALITY, ResultStore
from .variants import Variant, VariantSet

# The fields of a row that are None where it failed.
COSTS = (
    "nfe", "seconds_per_image", "seconds_by_part", "memory_by_part", "reuse", "speedup", "speedup_low", "speedup_high",
    "macs_per_image", "peak_memory",
)  # fmt: skip

PreparedRow = tuple[Variant, Variant | None, Model]


@dataclass(frozen=True)
class Job:
    """A row to run.

    Args:
        variant: How to sample.
        equal: The row at equal cost that it must beat.
        key: Its key in the store.
        model: The model to sample, with the row's plan and guidance as its own.
    """

    variant: Variant
    equal: Variant | None
    key: str
    model: Model

    @property
    def nfe(self) -> float:
        """Network evaluations per image, as far as known before the row has run."""
        return self.variant.nfe or 2 * self.model.steps


def prepare(
    model: Model,
    variants: VariantSet,
    ranks: Ranks | None = None,
    label: Label = None,
    report: Callable[[str], None] = ignore_messages,
) -> list[PreparedRow]:
    """Each row of a set, the row at equal cost, and the model with the row's plan and guidance as its own.

    A row whose cost is not declared samples one image to count its evaluations.

    Args:
        model: The model of the comparison.
        variants: The rows.
        ranks: The processes of the run; other models are then read by the main process first.
        label: The prompts of a model that takes prompts.
        report: Receives a line for each optional row that is skipped.

    Raises:
        BadInput: with the row's name, for what this model cannot run, before any row has run.
    """
    models: dict[Any, Model] = {}
    others: dict[tuple[str | None, ...], Model] = {(None, None, None): model}
    variants = variants.for_model(location_of(model))

    def prepared(v: Variant) -> Model:
        if v.method not in models:
            where = f"{variants.source}: {v.name!r}"
            files = (v.model, v.lora, v.decoder)
            if files not in others:
                with ranks.main_process_first() if ranks is not None else contextlib.nullcontext():
                    others[files] = model_with_files(model, v, where)
            models[v.method] = prepare_row(others[files], v, model, where)
        return models[v.method]

    def runs(v: Variant) -> bool:
        try:
            prepared(v)
        except BadInput as e:
            report(f"skipped: {e}")
            return False
        return True

    def measured_nfe(v: Variant) -> float | None:
        try:
            with count_evaluations(prepared(v)) as count:
                sample_images(prepared(v), v, 1, 0, 1, "fp32", label, blank_sources(prepared(v), 1))
        except NonFinite:
            return None  # the row will fail when it runs, with the reason
        except (HastenError, ValueError) as e:
            raise BadInput(f"{variants.source}: {v.name!r}: {e}") from e
        return count[0] + start_nfe(prepared(v), v)

    variants = replace(variants, variants=tuple(v for v in variants.variants if not v.optional or runs(v)))
    return [(v, equal, prepared(v)) for v, equal in variants.rows(measured_nfe)]


def model_with_files(model: Model, v: Variant, where: str) -> Model:
    """The model of a row with its LoRA and decoder, before its method: that of the comparison, or another one.

    Raises:
        BadInput: with `where`, if they are missing or do not fit.
    """
    return with_files(model if v.model is None else load_other_model(v.model, model, where), v, where)


def prepare_row(base: Model, v: Variant, model: Model, where: str) -> Model:
    """A model with the plan and guidance of a row as its own.

    Args:
        base: Of `model_with_files`.
        v: The row.
        model: The model of the comparison.
        where: Begins error messages.

    Raises:
        BadInput: For what this model cannot run.
    """
    try:
        how = base.resolve(v.config)
    except (HastenError, ValueError) as e:
        raise BadInput(f"{where}: {e}") from e
    own: dict[str, Any] = {"sampler": v.sampler} if v.sampler else {}
    own |= {"times": v.times} if v.times else {}
    steps = len(how.times) - 1 if how.plan is None else how.plan.nfe
    own |= {"denoiser": how.inner, "plan": how.plan, "steps": v.steps or steps}
    result = replace(replace(base, **own), guidance_scale=v.guidance_scale)
    return result if v.first_evaluation is None else with_teacher(result, v, model, where)


def location_of(model: Model) -> str:
    """Where a model was loaded from: its bundled name, the folder of its pipeline, or just its name."""
    if model.name in zoo.cards():
        return model.name
    folder = str(getattr(getattr(model.pipeline, "config", None), "_name_or_path", ""))
    return folder if folder and Path(folder).is_dir() else model.name


def with_files(model: Model, variant: Variant, where: str) -> Model:
    """A model with the LoRA and the image decoder of a row.

    Raises:
        BadInput: with `where`, if they are missing or do not fit.
    """
    for key in ("lora", "decoder"):
        name = getattr(variant, key)
        if name is None:
            continue
        path = zoo.find_file(name)
        if not path.exists() and not (key == "lora" and zoo.find_file(name.rpartition(":")[0]).is_file()):  # FILE:SCALE
            raise BadInput(f"{where}: {key}: there is no file or folder {name}")
        try:
            model = model.with_lora(str(path)) if key == "lora" else model.with_decoder(path)
        except HastenError as e:
            raise BadInput(f"{where}: {key}: {e}") from e
    return model


def with_teacher(student: Model, variant: Variant, model: Model, where: str) -> Model:
    """A row's model with its first evaluation by another one, which may be the comparison's own: a name or folder, with
    `:SCALE` for a guidance scale of its own; unguided without.

    Raises:
        BadInput: with `where`, if the two do not fit together, and for accelerators, which would be the student's.
    """
    name, own_scale = split_scale(str(variant.first_evaluation))
    if variant.accelerators:
        raise BadInput(f"{where}: first_evaluation: accelerators are not supported beside it")
    teacher = model if name == location_of(model) else load_other_model(name, model, where)
    try:
        return student.with_first_evaluation(teacher, variant.guidance_scale, own_scale)
    except HastenError as e:
        raise BadInput(f"{where}: first_evaluation: {e}") from e


def split_scale(text: str) -> tuple[str, float]:
    """A model and the guidance scale of `MODEL:SCALE`; 1, no guidance, without one.

    Raises:
        BadInput: for a scale that is not a number.
    """
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists() or "/" in number or "\\" in number:
        return text, 1.0
    try:
        return name, check_number("the guidance scale", float(number))
    except ValueError as e:
        raise BadInput(f"first_evaluation is MODEL or MODEL:SCALE, and {number!r} of {text!r} is no scale") from e


def load_other_model(name: str, model: Model, where: str) -> Model:
    """Another model on the same device.

    Raises:
        BadInput: if it cannot be loaded, or generates images of another shape or other classes than `model`.
    """
    try:
        other = load_to_compare(name, model.device)
    except HastenError as e:
        raise BadInput(f"{where}: model: {e}") from e
    if (other.shape, other.classes, other.source_shape) != (model.shape, model.classes, model.source_shape):
        raise BadInput(f"{where}: {name} draws other images or classes than {model.name}: they cannot be compared")
    return other


def sample_images(
    model: Model,
    variant: Variant,
    count: int,
    seed: int,
    batch_size: int,
    runtime: str,
    label: Label = None,
    images: Tensor | None = None,
) -> Tensor:
    """Images of a row by its prepared model, `(count, C, H, W)`. images: what a model that restores is given."""
    arguments = sampling_arguments(model, variant, runtime)
    return model.sample(count, label, seed=seed, batch_size=batch_size, images=images, **arguments)


def sampling_arguments(model: Model, variant: Variant, runtime: str) -> dict[str, Any]:
    """The arguments of `Model.sample` that a prepared model does not carry itself."""
    return {
        "precision": runtime,
        "guides": variant.guides,
        "start": variant.start,
        "plan": None if model.plan is None else RECOMMENDED,
    }


def create_jobs(rows: Sequence[PreparedRow], settings: Mapping[str, Any], ranks: Ranks) -> list[Job]:
    """The rows as jobs. A key is the hash of `settings` and of everything else that a row's figures depend on."""
    jobs = []
    for variant, equal, model in rows:
        own: dict[str, Any] = {} if variant.sampler or model.plan is None else {"plan": model.plan.to_json()}
        own |= {} if variant.model is None and variant.lora is None else {"weights": model_hash(model)}
        if variant.first_evaluation is not None:
            own["first"] = [model_hash(model), split_scale(variant.first_evaluation)[1]]
        own |= {} if variant.decoder is None else {"decoder": part_digest(model.decoder)}
        own |= {} if sharing(variant.accelerators, ranks) is None else {"processes": ranks.world}
        text = json.dumps({**settings, "method": variant.method, **own}, sort_keys=True)
        jobs.append(Job(variant, equal, hashlib.sha256(text.encode()).hexdigest()[:16], model))
    return jobs


def claims_of(variant: Variant) -> set[str]:
    """What the accelerators of a row claim, such as "features"."""
    return {claim for one in variant.accelerators for claim in pick("accelerators", one).claims}


def row_macs(job: Job, nfe: float) -> int | None:
    """Multiply-accumulates per image; None where layers or graphs are not torch's own."""
    model, claims = job.model, claims_of(job.variant)
    if getattr(getattr(model.denoiser, "net", None), "runs_elsewhere", False):
        return None
    if claims:
        one = functools.partial(sample_images, images=blank_sources(model, 1))
        return cost.macs(one, model, job.variant, 1, 0, 1, "fp32") if claims == {"features"} else None
    x = torch.zeros(1, *model.shape, device=model.device)
    try:
        return round(cost.macs(model.denoiser, x, 0.5, **model.cond(1)) * nfe)
    except Exception:  # a user's own network may take other arguments: no figure rather than an error
        return None


def method_fields(job: Job) -> dict[str, Any]:
    """The fields of a row that say how it was sampled."""
    v = job.variant
    return {
        "key": job.key,
        "name": v.name,
        "role": v.role,
        "sampler": v.sampler or "plan",
        "times": v.times or v.plan or v.model or v.lora,
        "steps": job.model.steps,
        "guidance_scale": v.guidance_scale,
        "guides": list(v.guides),
        "start": v.start,
        "plan": v.plan,
        "model": v.model,
        "lora": v.lora,
        "decoder": v.decoder,
        "first_evaluation": v.first_evaluation,
        "accelerators": list(v.accelerators),
    }


def failed_row(job: Job, reason: str, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a variant that could not be measured: `failed` is the reason, its figures are None."""
    figures = dict.fromkeys((*COSTS, *QUALITY))
    return {**method_fields(job), **figures, "failed": reason, "protocol": protocol}


def error_summary(error: Exception) -> str:
    """An error in one line of at most 400 characters."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 400 else f"{text[:397]}..."
    return text if isinstance(error, HastenError) else f"{type(error).__name__}: {text}".rstrip(": ")


def summary(row: Mapping[str, Any]) -> str:
    """The figures of a finished row in one line."""
    if row.get("failed"):
        return f"failed: {row['failed']}"
    quality = "" if row["frechet"] is None else f", distance {row['frechet']:.3g}"
    quality += "" if row.get("truth_psnr") is None else f", {row['truth_psnr']:.2f} dB to the true images"
    quality += "" if row.get("prompt_match") is None else f", prompt match {row['prompt_match']:.1%}"
    seconds = row["seconds_per_image"]
    spent = f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
    return f"{row['nfe']:g} NFE, {spent} an image{quality}"


def average_blocks(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The quality figures of a row from those of its disjoint blocks of seeds.

    Args:
        blocks: The figures of each block.

    Returns:
        Those of a single block unchanged. Of several their means, under `deviation` the standard deviation of one block
        (n - 1 in the denominator), under `blocks` the figures of each.
    """
    if len(blocks) == 1:
        return dict(blocks[0])
    listed = {key for key in blocks[0] if isinstance(blocks[0][key], list)}
    joined = {key: [value for block in blocks for value in block[key] or ()] for key in listed}
    blocks = [{key: value for key, value in block.items() if key not in listed} for block in blocks]
    values = {key: [block[key] for block in blocks if block.get(key) is not None] for key in blocks[0]}
    complete = {key: each for key, each in values.items() if len(each) == len(blocks)}
    means: dict[str, Any] = {key: statistics.fmean(complete[key]) if key in complete else None for key in values}
    deviation = {key: statistics.stdev(each) for key, each in complete.items() if not key.startswith("frechet_")}
    if "frechet" in deviation:
        means["frechet_low"], means["frechet_high"] = (means["frechet"] + s * deviation["frechet"] for s in (-1, 1))
    return {**means, **joined, "deviation": deviation, "blocks": [dict(block) for block in blocks]}


def partially_overlap(seeds: Sequence[int], others: Sequence[int]) -> bool:
    """Whether two different ranges of seeds, [first, last] each, have seeds in common."""
    common = min(seeds[1], others[1]) >= max(seeds[0], others[0])
    return common and list(seeds) != list(others)


def seed_overlap_warnings(store: ResultStore, seeds: Sequence[int]) -> list[str]:
    """A line for every other range of seeds in a store that shares some seeds with this run's range."""
    others = {tuple(row["protocol"]["seeds"]) for row in store.rows.values() if row.get("protocol")}
    return [
        f"{store.path} has rows of seeds {first} to {last}, this run has {seeds[0]} to {seeds[1]}: they share some, so "
        "figures of the two are neither of the same images nor independent"
        for first, last in sorted(others)
        if partially_overlap(seeds, (first, last))
    ]
