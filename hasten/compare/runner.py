"""Compare methods of sampling one model, from the same seeds in one run: what each costs, and its quality."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import torch
from torch import nn

from .. import __version__
from ..distributed.ranks import ProcessLost, Ranks
from ..errors import BadInput, check_int
from ..files import holds_lock
from ..loading import load_to_compare
from ..metrics import Reference, net_name, without_neighbours
from ..model.model import Model
from ..model.sources import refuse_process
from ..performance.device import processor
from ..progress import ProgressReporter
from ..storage.provenance import command_line, model_hash, tensor_hash, utc_now
from ..utils.config import Config
from ..workflows.captioned import CALIBRATION_PROMPTS
from ..workflows.evidence import Evidence, collect_evidence
from ..workflows.prompt_figures import captions_for
from ..workflows.prompts import bundled_prompts, image_shape, is_image, prompts_for
from ..workflows.reference_images import resolve_reference
from . import jobs as tools
from .budget import TimeBudget, preserve_threads, set_faster_threads
from .budgeted import BudgetedComparison
from .comparison import Comparison
from .jobs import prepare
from .restored_rows import open_restoration
from .results import SCHEMA, ResultStore
from .variants import VariantSet, load_variants, parse_variants

if TYPE_CHECKING:
    from typing_extensions import Unpack

CALIBRATION_SOURCES = 16
PAIRED_IMAGES = 48  # of a row, where nothing but pairs of images is compared
MINIMUM = {"n": 10, "rounds": 1, "timing_batch": 1, "batch_size": 1, "seed": 0, "repeats": 1}
# The part of the protocol that is in the key of a row.
KEY_SETTINGS = ("schema", "model_hash", "n", "seeds", "dtype", "device", "features", "reference")


@dataclass(frozen=True)
class CompareConfig(Config):
    """What to compare, on how many images.

    Args:
        variants: A bundled set ("demo", "full", ...) or a TOML file, see docs/variants.md; "everything" is
            "text_to_image" for a model that takes prompts, "full" for another. Default: "demo".
        n: Images per row, at least 10. Default: the set's own; of a model that restores images 100. With `minutes`,
            the maximum.
        seed: The seed of image 0; image k has `seed + k`.
        rounds: Timing rounds; each samples one batch with every row in turn. Default: the set's own.
        batch_size: Images per batch.
        timing_batch: Images per timed batch.
        precision: Of the network, as `SamplingConfig` has it.
        reference: Statistics of real images, or a folder, zip or array of images, of which they are computed once.
            Default: those that the model names; without any, quality is not measured.
        features: The feature network, needed for a reference of images. Default: the reference's own. Of a model that
            takes prompts also that of distances between images of the same seeds and of diversity; a name, or a folder
            of a CLIP, SigLIP or DINOv2 of transformers.
        prompts: Of a model that takes prompts; image k gets number `k % len(prompts)`. Default: the captions of `data`,
            those of the set, or else a bundled list of 200.
        data: Of a model that takes prompts: a folder or zip of pictures with captions. The captions of `split` are the
            prompts and its pictures the reference; accelerators are calibrated on those of the training pictures. Of a
            model that restores images, such as one of super-resolution: true images of any sizes, which are cut into
            squares and degraded as in its training.
        split: Of `data`, the pictures that are held out.
        judge: The features, and what compares images with prompts, see `metrics.text_judge.load_judge`. Default: the
            one that the model's card names.
        lpips: The weights of LPIPS: a trunk (`alex`, `vgg`, `alex_shift_tolerant`, `vgg_shift_tolerant`) whose files
            are on this machine, or a file or folder. Default: the trunk that is found; without any, it is not measured.
        repeats: Disjoint blocks of n seeds: figures are then means, with the deviation of one block.
        minutes: Time budget in minutes of wall time. The number of images per row is then variant_set by the measured
            speed, from 64 to `n`, and is the same in every row; rows are timed while they are sampled, in turns. Where
            not all rows can have 64 images, the last ones of the set are skipped, for a second run to measure.
    """

    variants: str | Path | None = None
    n: int | None = None
    seed: int = 0
    rounds: int | None = None
    batch_size: int = 64
    timing_batch: int = 16
    precision: str = "auto"
    reference: Any = None
    features: Any = None
    prompts: Sequence[str] | str | None = None
    data: str | Path | None = None
    split: str = "test"
    judge: Any = None
    lpips: str | Path | None = None
    repeats: int = 1
    minutes: float | None = None

    renamed: ClassVar[Mapping[str, str]] = {"runtime": "precision"}


class CompareOptions(TypedDict, total=False):
    """The fields of `CompareConfig` as keyword arguments."""

    variants: str | Path | None
    n: int | None
    seed: int
    rounds: int | None
    batch_size: int
    timing_batch: int
    precision: str
    reference: str | Path | Reference | None
    features: str | nn.Module | None
    prompts: Sequence[str] | str | None
    data: str | Path | None
    split: str
    judge: Any
    lpips: str | Path | None
    repeats: int
    minutes: float | None


@holds_lock("out")
@preserve_threads
def compare(
    model: str | Path | Model,
    config: CompareConfig | str | Path | None = None,
    *,
    out: str | Path = "compare",
    show: bool = True,
    command: str | None = None,
    ranks: Ranks | None = None,
    **options: Unpack[CompareOptions],
) -> list[dict[str, Any]]:
    """Sample every variant from the same seeds; write `results.jsonl`, `report.html`, `front.png`, `grid.png`.

    A second run with the same folder reuses the rows whose key is the same. Ctrl-C leaves the finished rows and their
    report, and is raised again.

    Args:
        model: A Model, or what `load` takes.
        config: What to compare, or the variants alone, a bundled set or a TOML file. options: fields of it.
        out: The folder to write.
        show: Print the table on stdout.
        command: The command line for the record. Default: the one that runs the same comparison.
        ranks: `Ranks.start(device)`, where several processes call this together: they share the images of a row, and
            the main one times the rows and writes the results. Default: this process alone.

    Returns:
        The rows, a dict for each variant: nfe (counted), macs_per_image, seconds_per_image, speedup (with low and
        high), peak_memory (bytes), frechet (with low and high), kid, precision, recall, coverage, accuracy, psnr, rms,
        ssim, protocol; of a model that restores images truth_psnr, truth_ssim, truth_lpips, consistency; of a model of
        prompts also seconds_by_part, and with a judge prompt_match and diversity. A row that could not be measured has
        `failed`, the reason. With repeats, `deviation` and `blocks`.

    Raises:
        BadInput: for a set, model or folder that cannot be used, before any row has run.
    """
    if isinstance(config, (str, Path)):  # the variants
        config = CompareConfig(variants=config)
    config = CompareConfig.of(config, options)
    budget = None if config.minutes is None else TimeBudget(60 * config.minutes)
    ranks = Ranks(torch.device("cpu")) if ranks is None else ranks
    if budget is not None:
        set_faster_threads()
    model = model if isinstance(model, Model) else load_to_compare(model)
    source = config.variants
    if source == "everything":
        source = "full" if model.conditioning is None else "text_to_image"
    restores = model.source_shape is not None
    if not restores:
        refuse_process(model, "a comparison", bridges_only=True)
    variant_set = variants_of(model, source)
    seed = config.seed
    n = variant_set.n if config.n is None else config.n
    rounds = variant_set.rounds if config.rounds is None else config.rounds
    for name, value in {"n": n, "rounds": rounds}.items():
        check_int(name, value, MINIMUM[name])
    for name in ("timing_batch", "batch_size", "seed", "repeats"):
        check_int(name, getattr(config, name), MINIMUM[name])
    if budget is not None and (ranks.world > 1 or config.repeats > 1):
        raise BadInput("minutes is for one process and one block of seeds: give n in its place")
    progress = ProgressReporter(0, ranks.is_main_process)
    meter, restoration = open_restoration(model, config, config.n, progress.say) if restores else (None, None)
    if meter is not None:
        n = len(meter.pairs)
        if model.calibration_sources is None:  # accelerators are calibrated on some of its sources
            model = replace(model, calibration_sources=meter.pairs.groups[0].sources[:CALIBRATION_SOURCES])
    chosen = (None if restores else config.data, config.split, config.judge)
    against = (config.reference, None if restores else config.features)
    captioned = captions_for(model, chosen, against, ranks, progress.say)
    shape = image_shape(model)
    blind = model.conditioning is not None and captioned is None and config.reference is None
    if blind and budget is None and config.n is None and n > PAIRED_IMAGES and not model.card.get("reference"):
        n = PAIRED_IMAGES
        progress.say(f"{n} images a row, whose pictures are compared seed by seed: --n sets another number")
    captions = None if captioned is None else captioned.prompts(n)
    texts: Any = config.prompts if config.prompts is not None else captions or variant_set.prompts
    bundled = model.conditioning is not None and config.prompts is None and not texts
    if bundled:
        texts = bundled_prompts()[:n]
        progress.say(
            f"no prompts were given: the {len(texts)} first of the bundled list of 200; give --prompts FILE or --data"
        )
    label = prompts_for(model, texts, variant_set.source)
    variant_set = guided_set(model, variant_set, progress.say)
    unseen = tuple(bundled_prompts()[n : n + CALIBRATION_PROMPTS]) if bundled else ()
    calibration = unseen if captioned is None else captioned.calibration_prompts
    if label is not None and not model.calibration_prompts:
        model = replace(model, calibration_prompts=calibration or tuple(dict.fromkeys(label)))
    if accelerated := sum(bool(variant.accelerators) for variant in variant_set.variants):
        progress.say(f"preparing accelerators ({accelerated} rows): calibration, search of key steps")
    rows = prepare(model, variant_set, ranks, label, progress.say)
    known: Reference | None
    net: nn.Module | None
    if captioned is not None:
        captioned = captioned.with_baseline(n)
        known, net = captioned.reference, captioned.judge
    else:
        own = model.card.get("reference") if is_image(shape) and not restores else None
        real = config.reference or own
        wanted = None if restores or (real is None and label is not None) else config.features
        known, net = resolve_reference(real, wanted, shape, model.device, ranks, progress.say)
    evidence = Evidence()
    if label is not None and is_image(shape):
        features = config.features if captioned is not None or net is None else net
        evidence = collect_evidence(features, config.judge, captioned, config.lpips, model.device, progress.say)
    size = min(n, config.batch_size)
    precision = ranks.on_main_process(functools.partial(model.precision_for, config.precision, size))
    store = ResultStore(Path(out)) if ranks.is_main_process else None
    arguments = {"variants": config.variants, "data": config.data, "n": n, "seed": seed, "minutes": config.minutes}
    arguments |= {"out": out}
    protocol: dict[str, Any] = {
        "schema": SCHEMA,
        "model": model.name,
        "model_hash": model_hash(model),
        "set": variant_set.source,
        "n": n,
        "seeds": [seed, seed + n * config.repeats - 1],
        "batch_size": config.batch_size,
        "timing_batch": config.timing_batch,
        "rounds": rounds,
        "repeats": config.repeats,
        "classes": len(model.classes or ()),
        "features": net and known and net_name(net),
        "reference": known and f"{known.name}, {known.split} split, {known.count} images",
        "floors": {},
        "hardware": processor(model.device),
        "threads": torch.get_num_threads(),
        "device": model.device.type,
        "processes": ranks.world,
        "dtype": precision,
        "torch": torch.__version__,
        "hasten": __version__,
        "date": utc_now(),
        "command": command or command_line("compare", model.name, arguments),
    }
    if restoration is not None:
        protocol["restoration"] = restoration
    if label is not None:
        protocol["prompts"] = label
        protocol["prompts_from"] = "the bundled list" if bundled else None
        protocol["evidence"] = evidence.settings
    if captioned is not None:
        protocol["judge"] = captioned.judge.features
    if model.conditioning is not None:
        where = "captions of the training pictures" if captioned is not None else "others of the bundled prompts"
        where = where if calibration else "of the prompts above"
        protocol["calibration"] = f"{len(model.calibration_prompts)} {where}"

    def create_jobs(protocol: Mapping[str, Any]) -> list[tools.Job]:
        """The rows with their keys, which depend on the number of images."""
        statistics = None if known is None else tensor_hash(known.mean, known.covariance, known.sample)
        settings = {"against": variant_set.reference.method, **{key: protocol[key] for key in KEY_SETTINGS}}
        settings |= {"statistics": statistics} | ({} if label is None else {"prompts": label})
        settings |= {"calibration": calibration} if calibration else {}
        settings |= {"evidence": evidence.settings} if evidence.settings else {}
        settings |= {"restoration": restoration} if restoration else {}
        return tools.create_jobs(rows, settings, ranks)

    state = (model, create_jobs(protocol), store, protocol, known, net, Path(out), ranks, label, captioned, evidence)
    run = Comparison(*state, meter) if budget is None else BudgetedComparison(*state, meter, budget, create_jobs)
    warnings: list[str | None] = []
    if budget is None:  # otherwise n is not known yet
        warnings += [] if known is None else [without_neighbours(n, known)]
        warnings += [] if store is None else tools.seed_overlap_warnings(store, protocol["seeds"])
    for line in filter(None, warnings):
        progress.say(line)
    try:
        run.run()
    except (KeyboardInterrupt, ProcessLost) as e:
        if not ranks.is_main_process:
            raise
        reason = "stopped" if isinstance(e, KeyboardInterrupt) else str(e).partition(";")[0]
        saved = f"{len(run.write_report(show))} of {len(run.jobs)} rows are saved in {out}"
        raise type(e)(f"{reason}: {saved}; the same command resumes from there") from None
    return ranks.on_main_process(lambda: run.write_report(show))


def variants_of(model: Model, source: str | Path | None) -> VariantSet:
    """The set of variants; by default, of a model of another process its sampler in several numbers of steps."""
    if source is not None or model.denoiser.schedule.ordinary:
        return load_variants(source, model.times, model.guidance_scale)
    name = model.sampler
    table = {
        "n": 500,
        "reference": {"name": f"{name}, 100 steps", "sampler": name, "steps": 100},
        "variant": [{"name": name, "sampler": name, "steps": [5, 10, 25, 50]}],
    }
    return parse_variants(table, f"{name}, 5 to 100 steps", model.times, model.guidance_scale)


def guided_set(model: Model, variants: VariantSet, report: Callable[[str], None]) -> VariantSet:
    """A set with guidance scales that a model of prompts, or with guidance inside its network, knows.

    Args:
        model: The model of the comparison.
        variants: The set.
        report: Receives a line where a scale changes.
    """
    span = model.denoiser.guidance_range
    if span is None:
        return variants if model.conditioning is None else variants.with_guidance(1.0)
    moved = variants.with_guidance(*span, doubled=False)
    pairs = zip((variants.reference, *variants.variants), (moved.reference, *moved.variants), strict=True)
    changed = [old.name for old, new in pairs if old.guidance_scale != new.guidance_scale and old.model is None]
    if changed:
        scales = f"{span[0]:g}" if span[0] == span[1] else f"{span[0]:g} to {span[1]:g}"
        report(f"{model.name} has its guidance inside, with scale {scales}, which is used for {', '.join(changed)}")
    return moved
