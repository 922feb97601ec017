"""The rows that a comparison runs: each with its model, its plan and its key, and what a row looks like that failed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..distributed.ranks import Ranks
from ..errors import BadInput, HastenError, NonFinite
from ..loading import load
from ..model.model import Label, Model
from ..model.resolve import RECOMMENDED
from ..plan.config import SamplingConfig
from ..storage.provenance import fingerprint
from ..workflows.distribute import sharing
from .counting import counting, extra
from .results import QUALITY, Store
from .variants import Variant, VariantSet

TIMED = ("nfe", "seconds_per_image", "speedup", "speedup_low", "speedup_high", "macs_per_image", "peak_memory")


@dataclass(frozen=True)
class Job:
    """A row to run, the row at equal cost that it must beat, its key in the store, and its model with its plan made."""

    variant: Variant
    equal: Variant | None
    key: str
    ready: Model

    @property
    def nfe(self) -> float:
        """Network evaluations an image, for the progress bar."""
        return self.variant.nfe or 2 * self.ready.steps


def prepare(
    model: Model, chosen: VariantSet, ranks: Ranks | None = None, label: Label = None
) -> list[tuple[Variant, Variant | None, Model]]:
    """Each row, its equal and the model with the row's plan and guidance as its own.

    Raises BadInput with the row's name for what this model cannot run, before anything has run. What does not know its
    cost samples one image to find out.
    """
    found: dict[Any, Model] = {}
    others: dict[str | None, Model] = {None: model}

    def ready(v: Variant) -> Model:
        if v.method not in found:
            if v.model not in others:
                with ranks.main_process_first() if ranks is not None else contextlib.nullcontext():
                    others[v.model] = other(str(v.model), model, f"{chosen.source}: {v.name!r}")
            base = others[v.model]
            choice = v.sampler or None, v.times or None, v.steps or None
            try:
                config = SamplingConfig(*choice, v.guidance_scale, v.guides, v.start, v.plan, v.accelerators)
                resolved = base.resolve(config)
            except (HastenError, ValueError) as e:
                raise BadInput(f"{chosen.source}: {v.name!r}: {e}") from e
            own: dict[str, Any] = {"sampler": v.sampler} if v.sampler else {}
            own |= {"times": v.times} if v.times else {}
            steps = len(resolved.times) - 1 if resolved.plan is None else resolved.plan.nfe
            made = replace(base, denoiser=resolved.inner, plan=resolved.plan, steps=v.steps or steps, **own)  # type: ignore[arg-type]
            found[v.method] = replace(made, guidance_scale=v.guidance_scale)
        return found[v.method]

    def nfe(v: Variant) -> float | None:
        made = ready(v)
        try:
            with counting(made) as count:
                images(made, v, 1, 0, 1, "fp32", label)
        except NonFinite:
            return None  # the row will fail, and say why, when its turn comes
        except (HastenError, ValueError) as e:
            raise BadInput(f"{chosen.source}: {v.name!r}: {e}") from e
        return count[0] + extra(made, v)

    return [(v, equal, ready(v)) for v, equal in chosen.rows(nfe)]


def other(name: str, model: Model, where: str) -> Model:
    """Another model, on the same device, which draws the same kind of images."""
    try:
        found = load(name, model.device)
    except HastenError as e:
        raise BadInput(f"{where}: model: {e}") from e
    if (found.shape, found.classes) != (model.shape, model.classes):
        raise BadInput(f"{where}: {name} draws other images or classes than {model.name}: they cannot be compared")
    return found


def images(
    ready: Model, v: Variant, count: int, seed: int, batch_size: int, runtime: str, label: Label = None
) -> Tensor:
    """Images of a row, with its model made ready."""
    return ready.sample(count, label, seed=seed, batch_size=batch_size, **asked_of(ready, v, runtime))


def asked_of(ready: Model, v: Variant, runtime: str) -> dict[str, Any]:
    """What the row's model, made ready, must still be told."""
    return {
        "precision": runtime,
        "guides": v.guides,
        "start": v.start,
        "plan": None if ready.plan is None else RECOMMENDED,
    }


def keyed(
    rows: Sequence[tuple[Variant, Variant | None, Model]], settings: Mapping[str, Any], ranks: Ranks
) -> list[Job]:
    """The rows as jobs. A key is the hash of `settings` and of all else that a row's figures depend on."""
    jobs = []
    for variant, equal, ready in rows:
        own: dict[str, Any] = {} if variant.sampler or ready.plan is None else {"plan": ready.plan.to_json()}
        own |= {} if variant.model is None else {"weights": fingerprint(ready)}
        own |= {} if sharing(variant.accelerators, ranks) is None else {"processes": ranks.world}
        text = json.dumps({**settings, "method": variant.method, **own}, sort_keys=True)
        jobs.append(Job(variant, equal, hashlib.sha256(text.encode()).hexdigest()[:16], ready))
    return jobs


def described(job: Job) -> dict[str, Any]:
    """What a row says of how it was sampled."""
    v = job.variant
    return {
        "key": job.key, "name": v.name, "role": v.role, "sampler": v.sampler or "plan",
        "times": v.times or v.plan or v.model, "steps": job.ready.steps, "guidance_scale": v.guidance_scale,
        "guides": list(v.guides), "start": v.start, "plan": v.plan, "model": v.model,
        "accelerators": list(v.accelerators),
    }  # fmt: skip


def failed(job: Job, reason: str, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a way of sampling that could not be measured: `failed` says why, its figures are None."""
    return {**described(job), **dict.fromkeys(TIMED), **dict.fromkeys(QUALITY), "failed": reason, "protocol": protocol}


def reason_of(error: Exception) -> str:
    """Why a row failed, in one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 400 else f"{text[:397]}..."
    return text if isinstance(error, HastenError) else f"{type(error).__name__}: {text}".rstrip(": ")


def averaged(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of several disjoint blocks of seeds as those of a row: their means, and under `deviation` the
    standard deviation of one block (of the sample, n - 1). Of a single block, its own figures."""
    if len(blocks) == 1:
        return dict(blocks[0])
    values = {key: [block[key] for block in blocks if block.get(key) is not None] for key in blocks[0]}
    whole = {key: found for key, found in values.items() if len(found) == len(blocks)}
    made: dict[str, Any] = {key: statistics.fmean(whole[key]) if key in whole else None for key in values}
    deviation = {key: statistics.stdev(found) for key, found in whole.items() if not key.startswith("frechet_")}
    if "frechet" in deviation:
        made["frechet_low"], made["frechet_high"] = (made["frechet"] + sign * deviation["frechet"] for sign in (-1, 1))
    return {**made, "deviation": deviation, "blocks": [dict(block) for block in blocks]}


def partly_shared(seeds: Sequence[int], others: Sequence[int]) -> bool:
    """Whether two ranges of seeds, [first, last] each, have some seeds in common and not all."""
    both = min(seeds[1], others[1]) >= max(seeds[0], others[0])
    return both and list(seeds) != list(others)


def as_fast(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Set beside an accelerated row the best of the plain ones that take no more time, in place."""
    well = [r for r in rows if not r["accelerators"] and r["seconds_per_image"] is not None]
    plain = [r for r in well if r["seconds_per_image"] <= row["seconds_per_image"]]
    if plain and row["frechet"] is not None:
        best = min(plain, key=lambda r: r["frechet"])
        row["equal_cost"], row["frechet_over_equal_cost"] = best["name"], row["frechet"] / best["frechet"]


def overlaps(store: Store, seeds: Sequence[int]) -> list[str]:
    """A line for every other range of seeds of the rows in a store that shares some with this run's."""
    others = {tuple(row["protocol"]["seeds"]) for row in store.rows.values() if row.get("protocol")}
    return [
        f"{store.path} has rows of seeds {first} to {last}, this run has {seeds[0]} to {seeds[1]}: they share some, so "
        "figures of the two are neither of the same images nor independent"
        for first, last in sorted(others)
        if partly_shared(seeds, (first, last))
    ]
