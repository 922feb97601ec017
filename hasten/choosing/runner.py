"""`choose`: the fastest way to sample a model within a loss, or the least loss within a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import __version__
from ..accelerators import FIRST_SEED
from ..compare.jobs import location_of
from ..compare.runner import guided_set
from ..compare.variants import Variant, VariantSet, load_variants
from ..distributed.ranks import Ranks
from ..errors import BadInput
from ..files import check_writable, locked
from ..loading import load_to_compare
from ..model.model import Model
from ..model.sources import refuse_process
from ..performance.device import processor
from ..plan.config import SamplingConfig
from ..progress import ProgressReporter
from ..storage.provenance import model_hash, tensor_hash
from ..workflows.captioned import CALIBRATION_PROMPTS
from ..workflows.evidence import collect_evidence
from ..workflows.prompt_figures import captions_for
from ..workflows.prompts import bundled_prompts, image_shape, is_image, prompts_for
from ..workflows.reference_images import resolve_reference
from ..workflows.source_data import paired_samples, reads_source, sources_of
from .bench import Bench, key_of
from .candidates import Space, appliable, plain_variant, search_space
from .certificate import TRIES, certify, risk_of_try
from .config import LEAST_SEEDS, ChooseConfig
from .goal import Goal, parse_goal
from .losses import Distance, Figure, Psnr, Unlikeness
from .result import best_toml, entry_row, table_lines, write_result
from .search import Entry, Search, format_seconds, undominated
from .store import MeasurementStore

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .config import ChooseOptions

__all__ = ["choose"]

SOURCES = 256  # source images on which candidates are measured, of a model that reads them


def choose(
    model: str | Path | Model,
    config: ChooseConfig | str | Path | None = None,
    *,
    out: str | Path = "best.toml",
    show: bool = True,
    **options: Unpack[ChooseOptions],
) -> dict[str, Any]:
    """The fastest way to sample a model within a loss of quality; writes it as a `SamplingConfig`.

        result = hasten.choose("fashion", psnr=30, out="best.toml")
        hasten.load("fashion").sample(16, config="best.toml")

    Candidates are measured against the plain model on the same seeds: few seeds for all of them, more for the better
    half, and times in turns (successive halving). The best is measured again on fresh seeds: its certificate bounds
    the loss on as many other seeds. Where it is not within the goal the next one is tried on further seeds, with more
    confidence each time, so that all tries together keep `confidence`. Where none is, the plain model is the answer.

    Args:
        model: a Model, or what `load` takes.
        config: what to choose; options: fields of it.
        out: the file to write, .toml. Beside it a folder of the same name with `.choose` holds what was measured, from
            which the same call resumes, and `result.json`.
        show: print progress, a line for every rejection, and the Pareto front.

    Returns:
        `best` (the name), `config`, `speedup`, `seconds_per_image`, `certificate`, `certificates` (of all tries),
        `front`, `candidates`, `rejected`, `plain`, `spent` (evaluations, seconds), `file`.

    Raises:
        BadInput: for what cannot be, before anything is measured, and for the folder of another search.

    References:
        Jamieson, Talwalkar 2016, arXiv:1502.07943 (successive halving).
    """
    config = ChooseConfig.of(config, options)
    goal = parse_goal(config.loss, config.psnr, config.seconds)
    out = Path(out)
    if out.suffix != ".toml":
        raise BadInput(f"the choice is a TOML file: out must end in .toml, got {str(out)!r}")
    check_writable(out)
    folder = out.with_suffix(".choose")
    with locked(folder):
        return run_search(model, config, goal, out, folder, show)


def run_search(
    model: str | Path | Model, config: ChooseConfig, goal: Goal, out: Path, folder: Path, show: bool
) -> dict[str, Any]:
    """`choose`, with the folder locked."""
    progress = ProgressReporter(0, show)
    model = model if isinstance(model, Model) else load_to_compare(model)
    refuse_process(model, "hasten choose", sources=True)
    model, sources = split_sources(model, config)
    figure, label, model = figure_for(model, config, goal, progress.say)
    plain, space = space_for(model, config, progress.say)
    count = figure.seeds if config.n is None else config.n
    rungs = rungs_of(count, figure.least)
    precision = model.precision_for(config.precision, min(count, config.batch_size))
    settings = {
        "model": model_hash(model),
        "goal": str(goal),
        **{name: getattr(config, name) for name in ("confidence", "seed", "batch_size", "timing_batch", "rounds")},
        "n": count,
        "figure": figure.name,
        "real images": None if not isinstance(figure, Distance) else tensor_hash(figure.reference.mean),
        "prompts": label,
        **({} if sources is None else {"sources": tensor_hash(sources)}),
        "plain model": repr(plain.method),
        "candidates": [key_of(v) for v in space.first] + [repr(one) for one in space.additions],
        "for_diffusers": config.for_diffusers,
        "precision": precision,
        "device": model.device.type,
        "hasten": __version__,
        "torch": torch.__version__,
    }
    store = MeasurementStore(folder, settings)
    timing = config.timing_batch, config.rounds
    bench = Bench(
        model, plain, figure, store, progress, label, config.seed, precision, config.batch_size, timing, sources
    )  # fmt: skip
    allowed: Callable[[Variant], str | None] = lambda v: None  # noqa: E731
    if config.for_diffusers:
        allowed = functools.partial(not_for_diffusers, model)
    search = Search(bench, space, goal, rungs, progress.say, allowed, count, risk_of_try(config.confidence, 1))
    with progress.bar:
        progress.say(
            f"{model.name}, {goal}: {len(space.first)} candidates against {spell(plain)}; {figure.name}; {precision}, "
            f"{processor(model.device)}"
        )
        if store.resumed:
            progress.say(f"what was measured before is taken from {folder}")
        try:
            bench.time([], "plain")
            calibrate(bench, rungs)
            entries = search.run()
            first = rungs[-1] + rungs[0]  # after those of the search and of the scale
            best, tries = certify(search, entries, config.confidence, first, count)
            if best is not None:
                bench.time([best.variant], "best")
                relative, seconds = bench.relative(best.variant), bench.seconds(best.variant)
                best = replace(best, relative=relative, seconds=seconds, timed=True)
                search.measured[key_of(best.variant)] = best
            slow = best is not None and best.relative >= 1 and not bench.is_same_network(best.variant)
            if best is not None and (slow or best.seconds > goal.seconds):
                usual = format_seconds(bench.plain_seconds)
                line = f"{format_seconds(best.seconds)} an image when it was timed again, the plain model {usual}"
                search.reject(best.variant, line)
                best = None
        except KeyboardInterrupt:
            store.save()
            raise KeyboardInterrupt(f"stopped: {folder} has what was measured; the same command resumes") from None
    return finish(search, best, tries, goal, out, folder, progress.say)


def split_sources(model: Model, config: ChooseConfig) -> tuple[Model, Tensor | None]:
    """A model that reads source images with those of its calibration, and the others, on which candidates are measured;
    None for another model.

    Raises:
        BadInput: without data to make them from.
    """
    if not reads_source(model):
        return model, None
    if config.data is None:
        raise BadInput(f"{model.name} makes its samples from source images: give --data, from which they are made")
    found = sources_of(paired_samples(model, config.data), 2 * SOURCES)
    rest = found[1::2] if len(found) > 1 else found
    return replace(model, calibration_sources=found[::2]), rest


def figure_for(
    model: Model, config: ChooseConfig, goal: Goal, report: Callable[[str], None]
) -> tuple[Figure, Any, Model]:
    """What the loss is measured by, the prompts, and the model with prompts to calibrate accelerators on."""
    ranks = Ranks(model.device)
    data = None if reads_source(model) else config.data  # of such a model, what its sources are made from
    captioned = captions_for(
        model, (data, config.split, config.judge), (config.reference, config.features), ranks, report
    )
    shape = image_shape(model)
    texts = config.prompts if config.prompts is not None else None if captioned is None else captioned.prompts()
    bundled = model.conditioning is not None and not texts
    if bundled:
        texts = bundled_prompts()
        report(f"no prompts were given: the bundled list of {len(texts)} is used; give --prompts FILE or --data")
    label = prompts_for(model, texts, "choose")
    if label is not None and not model.calibration_prompts:
        own = tuple(label[-CALIBRATION_PROMPTS:])
        calibration = own if captioned is None else captioned.calibration_prompts or own
        model = replace(model, calibration_prompts=tuple(dict.fromkeys(calibration)))
    if goal.kind == "psnr":
        return Psnr(), label, model
    if captioned is not None:
        return Distance(captioned.reference, captioned.judge), label, model
    real = config.reference or (model.card.get("reference") if is_image(shape) else None)
    known, net = resolve_reference(
        real, config.features if real is not None else None, shape, model.device, ranks, report
    )
    if known is not None and net is not None:
        return Distance(known, net), label, model
    if not is_image(shape):
        raise BadInput(f"samples of shape {tuple(shape)} have no measure of loss but --psnr")
    evidence = collect_evidence(config.features, config.judge, None, None, model.device, lambda line: None)
    assert evidence.net is not None
    figure = Unlikeness(evidence.net)
    if goal.kind == "loss":
        report(f"there are no real images to compare with: the loss is the {figure.name}")
    return figure, label, model


def space_for(model: Model, config: ChooseConfig, report: Callable[[str], None]) -> tuple[Variant, Space]:
    """The plain model and the candidates."""
    how = config.plain
    how = (
        SamplingConfig()
        if how is None
        else how
        if isinstance(how, SamplingConfig)
        else SamplingConfig.load(how, "sampling")
    )
    plain = plain_variant(model, how)
    if config.variants is None:
        space = search_space(model, plain, config.exclude, config.students, config.loras, config.compile)
    else:
        given = load_variants(config.variants, model.times, model.guidance_scale).for_model(location_of(model))
        if how == SamplingConfig():
            plain = replace(given.reference, name="the plain model", doubled=plain.doubled)
        space = Space(given.variants, (), given.source)
    made = guided_set(model, VariantSet(space.source, plain, space.first), report)
    first = {v.method: v for v in made.variants if v.method != made.reference.method}
    return made.reference, replace(space, first=tuple(first.values()))


def rungs_of(count: int, least: int) -> tuple[int, ...]:
    """Seeds of each round, from those of the certificate, at least so many."""
    least = min(least, max(count // 2, LEAST_SEEDS))
    return tuple(sorted({max(count // part, least) for part in (16, 8, 4, 2)}))


def not_for_diffusers(model: Model, variant: Variant) -> str | None:
    """Why a candidate is not for `hasten.apply`, as a reason of a rejection."""
    reason = appliable(variant, model)
    return None if reason is None else f"not for a pipeline of diffusers: {reason}"


def calibrate(bench: Bench, rungs: Sequence[int]) -> None:
    """Check the seeds, and measure the scale of a loss that has one."""
    count = bench.figure.seeds
    end = bench.seed + rungs[-1] + rungs[0] + TRIES * max(count, 2 * rungs[-1] + 1)
    if bench.seed <= FIRST_SEED <= end:
        raise BadInput(f"seeds {bench.seed} to {end} include those of calibration, {FIRST_SEED}: give another --seed")
    figure = bench.figure
    if not isinstance(figure, Unlikeness):
        return
    key, count = "scale", rungs[0]
    found = bench.store.rows(key, 0, count)
    if found is None:
        plain = bench.plain_images(0, count)
        with bench.clocked():
            others = bench.images(bench.plain, 0, count, offset=rungs[-1])
            figure.calibrate(plain, others)
            scale = torch.tensor([figure.scale, figure.scale_error], dtype=torch.float64)
            bench.store.put_rows(key, 0, count, {"scale": scale})
        return
    figure.scale, figure.scale_error = found["scale"].tolist()


def finish(
    search: Search, best: Entry | None, tries: Sequence[Any], goal: Goal, out: Path, folder: Path,
    report: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Write and report the choice."""
    bench, figure = search.bench, search.bench.figure
    entries = list(search.measured.values())
    front = undominated(entries)
    variant = bench.plain if best is None else best.variant
    certificate = None if best is None else tries[-1]
    name = bench.model.name
    if best is None:
        head = f"{name}: no candidate keeps {goal}: the plain model is the answer ({spell(bench.plain)})"
        if (more := search.seeds_to_show()) is not None:
            head += f"; {more}"
        if goal.kind == "seconds":
            head = f"{name}: no candidate takes {format_seconds(goal.seconds)} or less: the plain model is the answer"
    else:
        assert certificate is not None
        speed = f"{1 / best.relative:.2f} times the speed of the plain model"
        head = f"{name}, {goal}: {best.name}, {speed}; {certificate.text}"
    why_not = appliable(variant, bench.model) if bench.model.pipeline is not None else None
    promise = None if certificate is None else certificate.to_dict()
    result: dict[str, Any] = {
        "model": name,
        "goal": str(goal),
        "best": variant.name,
        "summary": head,
        "speedup": 1.0 if best is None else 1 / best.relative,
        "seconds_per_image": bench.plain_seconds if best is None else best.seconds,
        "certificate": promise,
        "certificates": [one.to_dict() for one in tries],
        "front": [entry_row(entry, search.rejected, bench.precision) for entry in front],
        "candidates": [entry_row(entry, search.rejected, bench.precision) for entry in entries],
        "rejected": search.rejected,
        "plain": {"method": spell(bench.plain), "seconds_per_image": bench.plain_seconds},
        "spent": bench.store.state["spent"],
        "figure": figure.name,
        "file": str(out),
    }
    text = best_toml(head, variant, bench.precision, promise, why_not)
    write_result(out, folder, text, result)
    shown = front if best is None or best.name in {e.name for e in front} else sorted([*front, best], key=by_time)
    lines = table_lines(shown, variant.name, figure.show)
    report("\n".join(["", *lines, "", head, f"{out}; {folder / 'result.json'} has all candidates"]))
    return {**result, "config": SamplingConfig.load(out, "sampling").to_dict()}


def by_time(entry: Entry) -> float:
    """The time of a candidate."""
    return entry.relative


def spell(variant: Variant) -> str:
    """The method of a candidate in words."""
    method = (
        f"plan {variant.plan}" if variant.plan else f"{variant.sampler}, {variant.times} times, {variant.steps} steps"
    )
    return f"{method}, guidance {variant.guidance_scale:g}" if math.isfinite(variant.guidance_scale) else method
