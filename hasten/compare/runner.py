"""Compare ways of sampling one model: what each costs and what quality is left, from the same seeds, in one run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..distributed.ranks import ProcessLost, Ranks
from ..errors import check_int
from ..files import writes
from ..loading import load
from ..metrics import Reference, net_name, without_neighbours
from ..model.model import Model
from ..performance.device import processor
from ..progress import Progress
from ..storage.provenance import command_line, fingerprint, hash_of, now
from ..workflows.reference_images import judge as judged_by
from . import jobs as tools
from .comparison import Comparison
from .jobs import prepare
from .results import SCHEMA, Store
from .variants import read


@writes("out")
def compare(
    model: str | Path | Model,
    variants: str | Path | None = None,
    n: int | None = None,
    out: str | Path = "compare",
    seed: int = 0,
    rounds: int | None = None,
    batch_size: int = 64,
    timing_batch: int = 16,
    runtime: str = "auto",
    reference: str | Path | Reference | None = None,
    features: str | nn.Module | None = None,
    show: bool = True,
    command: str | None = None,
    ranks: Ranks | None = None,
    prompts: Sequence[str] | str | None = None,
    repeats: int = 1,
) -> list[dict[str, Any]]:
    """Run every variant from the same seeds; write `results.jsonl`, `report.html`, `front.png`, `grid.png` into `out`.

    model: a Model, or what `load` takes. variants: a bundled set ("demo", "full") or a TOML file, see
    `hasten.compare.variants`.
    n: images a row, in batches of `batch_size` (default: the set's own). seed: of image 0; image k has `seed + k`.
    rounds, timing_batch: a timing round samples one batch with each variant in turn.
    runtime: as `Model.sample` takes it. reference: statistics of real images, or a folder, zip or array of images, of
    which they are made once (default: those that the model names; without any, quality is not measured).
    features: the network behind them, needed for images (default: the reference's own).
    show: print the table on stdout. command: for the record (default: the one that says the same).
    ranks: `Ranks.start(device)`, where several processes call this together: they share the images of a row, and the
    first one times the rows, writes and shows (default: this process alone).
    prompts: of a model that takes them; image k gets number `k % len` (default: those of the set).
    repeats: blocks of n seeds, one after the other: figures are then means, with the deviation of one block.

    Returns the rows, a dict a variant: nfe (counted), macs_per_image, seconds_per_image, speedup (with low and high),
    peak_memory (bytes), frechet (with low and high), kid, precision, recall, coverage, accuracy, psnr, rms, protocol;
    of a row that could not be measured `failed`, the reason, and no figures. With repeats `deviation`, `blocks`.
    Run again with the same folder, it keeps the rows whose key is the same. Ctrl-C keeps the finished rows and writes
    their report before it goes on to the caller. Raises BadInput for a set, model or folder that cannot be used,
    before anything has run.
    """
    ranks = Ranks(torch.device("cpu")) if ranks is None else ranks
    model = model if isinstance(model, Model) else load(model)
    chosen = read(variants, model.times, model.guidance_scale)
    n, rounds = chosen.n if n is None else n, chosen.rounds if rounds is None else rounds
    least = {"n": 10, "rounds": 1, "timing_batch": 1, "batch_size": 1, "seed": 0, "repeats": 1}
    for name, value in zip(least, (n, rounds, timing_batch, batch_size, seed, repeats), strict=True):
        check_int(name, value, least[name])
    label = tools.given_prompts(model, chosen.prompts if prompts is None else prompts, chosen.source)
    if model.conditioning is not None and model.denoiser.guidance_range is None:
        chosen = chosen.without_guidance_below_one()
    rows = prepare(model, chosen, ranks, label)
    progress = Progress(0, ranks.is_main_process)
    shape = tools.image_shape(model)
    asked = reference or (model.card.get("reference") if tools.is_image(shape) else None)
    known, net = judged_by(asked, features, shape, model.device, ranks, progress.say)
    runtime = ranks.on_main_process(functools.partial(model.runtime_for, runtime, min(n, batch_size)))
    store, weights = Store(Path(out)) if ranks.is_main_process else None, fingerprint(model)
    protocol = {
        "schema": SCHEMA,
        "model": model.name,
        "model_hash": weights,
        "set": chosen.source,
        "n": n,
        "seeds": [seed, seed + n * repeats - 1],
        "batch_size": batch_size,
        "timing_batch": timing_batch,
        "rounds": rounds,
        "repeats": repeats,
        "classes": len(model.classes or ()),
        "features": net and known and net_name(net),
        "reference": known and f"{known.name}, {known.split} split, {known.count} images",
        "floors": {},
        "hardware": processor(model.device),
        "threads": torch.get_num_threads(),
        "device": model.device.type,
        "processes": ranks.world,
        "dtype": runtime,
        "torch": torch.__version__,
        "hasten": __version__,
        "date": now(),
        "command": command
        or command_line("compare", model.name, {"variants": variants, "n": n, "seed": seed, "out": out}),
    }
    told = ("schema", "model_hash", "n", "seeds", "dtype", "device", "features", "reference")
    settings = {"against": chosen.reference.method, **{key: protocol[key] for key in told}}
    settings |= {"statistics": None if known is None else hash_of(known.mean, known.covariance, known.sample)}
    if label is not None:
        protocol["prompts"] = settings["prompts"] = label
    run = Comparison(model, tools.keyed(rows, settings, ranks), store, protocol, known, net, Path(out), ranks, label)
    few = None if known is None else without_neighbours(n, known)
    for line in [few] * (few is not None) + ([] if store is None else tools.overlaps(store, protocol["seeds"])):
        progress.say(str(line))
    try:
        run.all()
    except (KeyboardInterrupt, ProcessLost) as e:
        if not ranks.is_main_process:
            raise
        what = "stopped" if isinstance(e, KeyboardInterrupt) else str(e).partition(";")[0]
        kept = f"{len(run.finish(show))} of {len(run.jobs)} rows are kept in {out}"
        raise type(e)(f"{what}: {kept}; the same command goes on from there") from None
    return ranks.on_main_process(lambda: run.finish(show))
