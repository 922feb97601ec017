"""Tune a model with one method and save it with the result."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BadInput, check_int
from ..files import check_writable, holds_lock, refuse_inside
from ..model.model import Model
from ..model.sources import refuse_process
from ..pick import format_spec, method_names, pick
from ..plan.config import SamplingConfig, SamplingOptions
from ..progress import ProgressFn, no_progress
from ..starts.temperature import Temperature
from ..storage.atomic import refuse_other_model, short_hash
from ..storage.model_folder import check_savable
from ..storage.provenance import model_hash, tensor_hash, utc_now
from ..storage.weights import is_half
from ..tasks.speech.features import Corpus
from ..tasks.speech.samples import SegmentDenoiser, speech_samples
from ..train.data import Data, open_data, to_float
from ..train.fingerprint import listing
from ..train.names import match_labels
from ..tuning import Tuned, Tuner, TuningTask
from ..tuning._task import Images
from ..utils.environment import is_terminal
from ..utils.finite import check_finite, check_weights
from ..utils.random import MAX_SEED
from .source_data import PairSettings, paired_samples, reads_source, sources_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


SOURCES = 256  # source images of the calibration of a model that reads them


@holds_lock("out")
def tune_model(
    model: Model,
    out: str | Path,
    method: str = "optimized_steps",
    sampling: SamplingConfig | None = None,
    *,
    data: str | Path | Corpus | None = None,
    pairs: PairSettings | None = None,
    n: int | None = None,
    seed: int = 1_000_000,
    command: str = "",
    **options: Unpack[SamplingOptions],
) -> dict[str, Any]:
    """Tune a model with one method of `hasten.tuning` and save it in `out`; a plan becomes the recommended one.

    `model` itself stays as it is: what is saved is a copy of its description, with the same network.
    `out/sampling.toml` is the `SamplingConfig` that samples with what was found.

    Args:
        method: as `pick` spells it.
        sampling: what is to be improved; None: what the model recommends. options: fields of it.
        data: what `open_data` reads; of a model that speaks, a corpus or its path.
        pairs: of a model that reads source images: what makes them of the data; None: what its card records.
        n: samples to calibrate on; None: the method's own number.
        seed: of calibration sample 0. command: for the model's card.

    Returns:
        A dict: folder, method, plan (its name), statistics and parts (their names), figures, seconds.

    Raises:
        BadInput: before anything is computed, for what cannot be. What `out` holds is kept until all is done.
    """
    config = SamplingConfig.of(sampling, options)
    sampler, times, steps, guidance_scale = config.sampler, config.times, config.steps, config.guidance_scale
    runtime = config.precision or "fp32"
    for field in ("guides", "start", "plan", "accelerators"):
        if getattr(config, field):
            raise BadInput(f"tuning improves a sampler with its times under guidance: leave {field} out")
    refuse_process(model, "tuning", sources=True)
    tuner: Tuner = pick("tuning", method)
    samples = None
    if reads_source(model):
        if isinstance(data, Corpus):
            raise BadInput(f"{model.name} makes no speech: give images, not a corpus of recordings")
        samples = source_samples(model, tuner, method, data, pairs)
    if tuner.needs_data and data is None:
        raise BadInput(f"{method} needs real images: give data, such as the folder that the model was trained on")
    if "speech" in model.card and data is None:
        raise BadInput(f"{model.name} speaks: tuning needs data, recordings with their text")
    n = None if n is None else check_int("n", n, 1)
    seed = check_int("seed", seed, 0, MAX_SEED - (10**7 if n is None else n))
    check_savable(model)
    check_weights(model.denoiser, model.name)
    model = replace(model)
    out = Path(out)
    refuse_inside(out, None if isinstance(data, Corpus) else data)
    check_writable(out / "model.json")
    scale = model.guidance_scale if guidance_scale is None else float(guidance_scale)
    tuner = tuner.bind(model.statistics, model.parts)
    sampler, times = (
        default if value is None else value for value, default in ((sampler, model.sampler), (times, model.times))
    )
    count = model.steps if steps is None and isinstance(times, str) else steps
    resolved = model.resolve(sampler=sampler, times=times, steps=count, guidance_scale=scale, precision=runtime)
    identity = short_hash(
        model_hash(model),
        format_spec(tuner),
        str(sampler),
        str(times),
        steps or model.steps,
        scale,
        n,
        seed,
        runtime,
        data.fingerprint() if isinstance(data, Corpus) else None if data is None else listing(Path(data)),
        *([] if pairs is None else [str(pairs)]),
    )
    refuse_other_model(out, model, identity)
    temperature = resolved.start.value if isinstance(resolved.start, Temperature) else 1.0
    sources = None if samples is None else sources_of(samples, SOURCES)
    denoiser: Any = resolved.denoiser
    labels: Any = model.labels
    images: Any = None if samples is None or data is None else shuffled_rows(samples)
    if "speech" in model.card and data is not None:
        denoiser = SegmentDenoiser(denoiser, speech_samples(model, data, out))
        labels, images = denoiser.labels, denoiser.images
    elif data is not None and samples is None:
        images = calibration_images(model, data)
    task = TuningTask(
        denoiser=denoiser,
        sampler=resolved.sampler,
        times=resolved.times,
        shape=model.shape,
        labels=labels,
        images=images,
        sources=sources,
        temperature=temperature,
        seed=seed,
        n=n,
        identity=model_hash(model)
        if sources is None
        else short_hash(model_hash(model), tensor_hash(sources), temperature),
    )
    began = time.perf_counter()
    with tuning_progress() as task.tick, resolved.runtime.apply():
        resolved.runtime.prepare(model.denoiser)
        result = tuner.tune(task)
    seconds = time.perf_counter() - began
    for what in ("figures", "statistics"):
        check_finite(f"{method}: the {what} are not finite", getattr(result, what))
    for part, net in result.parts.items():
        check_weights(net, f"{method}: the network {part} that it trained")
    name = attach_result(model, result, method, scale)
    record = {
        "method": format_spec(tuner),
        "plan": name,
        "statistics": sorted(result.statistics),
        "parts": sorted(result.parts),
        "guidance_scale": scale,
        "figures": result.figures,
        "date": utc_now(),
        "command": command,
        "identity": identity,
    }
    model.card = {**model.card, "tuned": [*model.card.get("tuned", []), record]}
    model.save(out, half=is_half(model))
    if name is not None:
        SamplingConfig(plan=name, guidance_scale=scale, precision=config.precision).save(out / "sampling.toml")
    return {"folder": str(out), **record, "seconds": seconds}


def attach_result(model: Model, result: Tuned, method: str, scale: float) -> str | None:
    """Add the result of tuning to a model, in place; returns the name of the plan if there is one."""
    model.statistics = {**model.statistics, **result.statistics}
    model.parts = {**model.parts, **result.parts}
    if result.plan is None:
        return None
    name = f"{method.partition(':')[0]}-{result.plan.nfe}" + (f"-g{scale:g}" if scale != 1 else "")
    model.plans = {**model.plans, name: result.plan}
    model.plan, model.steps, model.guidance_scale = result.plan, result.plan.nfe, scale
    return name


def calibration_images(model: Model, data: Any) -> Images:
    """Real images for `TuningTask.images`, in a fixed random order, with labels matched to the model's classes by name.

    Args:
        model: whose shape, classes and decoder (the images are encoded for it) are used.
        data: what `open_data` reads.

    Raises:
        BadInput: for a model of other shapes than images, or data that cannot be read.
    """
    if len(model.shape) != 3:
        raise BadInput(f"{model.name} generates samples of shape {model.shape}, not images: omit data")
    decoder = model.decoder  # of a latent model
    channels, height, width = model.shape if decoder is None else decoder.pixels(model.shape)
    source = open_data(data, size=(height, width), channels=channels)
    source = match_labels(source, model.classes, model.name, required=False)
    rows = shuffled_rows(source)

    def images(n: int) -> tuple[Tensor, Tensor | None]:
        x, labels = rows(n)
        return (x if decoder is None else decoder.encode(x)).to(model.device), labels

    return images


def source_samples(
    model: Model, tuner: Tuner, method: str, data: str | Path | None, pairs: PairSettings | None
) -> Data:
    """The samples of a model that reads source images, as its process has them, with their sources.

    Raises:
        BadInput: for a method that has no place for sources, and without data.
    """
    if not tuner.reads_sources:
        known = [name for name in method_names("tuning") if pick("tuning", name).reads_sources]
        raise BadInput(
            f"{method} does not give the network a source image, {model.name} reads one: {', '.join(known)} do"
        )
    if data is None:
        raise BadInput(f"{model.name} makes its samples from source images: give data, from which they are made")
    return paired_samples(model, data, pairs)


def shuffled_rows(data: Data) -> Images:
    """The first n samples of data in a fixed random order, float32, and their labels.

    Args:
        data: to take them from; the function raises BadInput where it holds fewer.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))

    def rows(n: int) -> tuple[Tensor, Tensor | None]:
        if n > len(data):
            raise BadInput(f"{data.source or 'the data'} holds {len(data)} images, asked for {n}")
        indices = order[:n]
        return to_float(data.images(indices)), None if data.labels is None else data.labels[indices]

    return rows


@contextlib.contextmanager
def tuning_progress() -> Iterator[ProgressFn]:
    """Progress bars on stderr with the remaining time, if that is a terminal."""
    if not is_terminal(sys.stderr):
        yield no_progress
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[value]}"),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def tick(what: str, done: int, total: int, value: float) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, value="")
            bar.update(tasks[what], completed=done, total=total, value=f"{value:.5g}")

        yield tick
