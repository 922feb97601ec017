"""Compare ways of sampling one model: what each costs and what quality is left, from the same seeds, in one run."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__, report
from .errors import BadInput, HastenError, whole
from .files import writes
from .images import to_uint8
from .machine import processor
from .many import Kept, judge_many, sample_many, sharing
from .meter import Progress, counting, extra
from .metrics import Reference, cost, feature_net, net_name
from .metrics import reference as load_reference
from .metrics.difference import difference
from .model import RECOMMENDED, Model, load
from .pick import pick
from .ranks import Lost, Ranks
from .results import QUALITY, SCHEMA, Store, fingerprint, hash_of, now
from .terminal import spell
from .variants import Variant, VariantSet, read

SHOWN = 10  # columns of the sample grid


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
    model: Model, chosen: VariantSet, ranks: Ranks | None = None
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
                with ranks.leading() if ranks is not None else contextlib.nullcontext():
                    others[v.model] = other(str(v.model), model, f"{chosen.source}: {v.name!r}")
            base = others[v.model]
            choice = v.sampler or None, v.times or None, v.steps or None
            try:
                way = base.way(*choice, v.guidance_scale, v.guides, v.start, v.plan, v.accelerators)  # type: ignore[arg-type]
            except (HastenError, ValueError) as e:
                raise BadInput(f"{chosen.source}: {v.name!r}: {e}") from e
            own: dict[str, Any] = {"sampler": v.sampler, "times": v.times} if v.sampler else {}
            steps = len(way.times) - 1 if way.plan is None else way.plan.nfe
            made = replace(base, denoiser=way.inner, plan=way.plan, steps=v.steps or steps, **own)  # type: ignore[arg-type]
            found[v.method] = replace(made, guidance_scale=v.guidance_scale)
        return found[v.method]

    def nfe(v: Variant) -> float:
        made = ready(v)
        try:
            with counting(made) as count:
                images(made, v, 1, 0, 1, "fp32")
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


def images(ready: Model, v: Variant, count: int, seed: int, batch_size: int, runtime: str) -> Tensor:
    """Images of a row, with its model made ready."""
    return ready.sample(count, seed=seed, batch_size=batch_size, **asked_of(ready, v, runtime))


def asked_of(ready: Model, v: Variant, runtime: str) -> dict[str, Any]:
    """What the row's model, made ready, must still be told."""
    return {
        "runtime": runtime,
        "guides": v.guides,
        "start": v.start,
        "plan": None if ready.plan is None else RECOMMENDED,
    }


def as_fast(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Set beside an accelerated row the best of the plain ones that take no more time, in place."""
    plain = [r for r in rows if not r["accelerators"] and r["seconds_per_image"] <= row["seconds_per_image"]]
    if plain and row["frechet"] is not None:
        best = min(plain, key=lambda r: r["frechet"])
        row["equal_cost"], row["frechet_over_equal_cost"] = best["name"], row["frechet"] / best["frechet"]


@dataclass
class Run:
    """A comparison on its way: what it needs, and its phases. `protocol` is what every row carries."""

    model: Model
    jobs: list[Job]
    store: Any  # a Store in the first process; the others have none
    protocol: dict[str, Any]
    known: Reference | None
    net: nn.Module | None
    out: Path
    ranks: Ranks

    def sample(self, job: Job, count: int) -> Tensor:
        """The first images of a row: image k from seed + k and, in a model of C classes, class k mod C."""
        p = self.protocol
        return images(job.ready, job.variant, count, p["seeds"][0], p["batch_size"], p["dtype"])

    def unfinished(self) -> tuple[list[int], dict[str, Any] | None]:
        """The numbers of the rows that are missing, and the timing if that is done."""
        missing = [k for k, job in enumerate(self.jobs) if job.key not in self.store.rows]
        if self.store.images(f"{self.jobs[0].key}-all") is None and 0 not in missing:
            missing = [0, *missing]
        return missing, self.store.timing(self.machine, [job.key for job in self.jobs])

    def all(self) -> None:
        """Time every row unless that is done, then sample and judge the rows that are missing."""
        p = self.protocol
        numbers, timed = self.ranks.once(self.unfinished)
        missing = [self.jobs[k] for k in numbers]
        work = sum(p["n"] * job.nfe for job in missing)
        work += 0 if timed else sum((p["rounds"] + 1) * p["timing_batch"] * job.nfe for job in self.jobs)
        progress = Progress(work, self.ranks.first)
        with progress.bar:
            progress.say(f"{p['model']}: {len(self.jobs)} rows of {p['n']} images, {p['dtype']}, {p['hardware']}")
            if done := len(self.jobs) - len(missing):
                progress.say(f"{done} of {len(self.jobs)} rows are finished in {self.store.out} and are kept")
            timed = timed or self.ranks.tell(self.time(progress))
            left = sum(self.costs(job.key, timed)["seconds_per_image"] for job in missing) * p["n"] / self.ranks.world
            if missing:
                progress.say(f"{len(missing)} rows to sample, about {left:.0f} s")
            for number, job in enumerate(missing, 1):
                progress.bar.update(progress.task, description=job.variant.name)
                row = self.judge(job, timed, progress)
                if row is None:  # the first process has it
                    continue
                self.store.put(row)
                self.kept(job).clear(last=False)
                quality = "" if row["frechet"] is None else f", distance {row['frechet']:.3g}"
                said = f"{row['nfe']:g} NFE, {row['seconds_per_image'] * 1e3:.3g} ms an image{quality}"
                progress.say(f"[{number}/{len(missing)}] {row['name']}: {said}")
        self.ranks.wait()
        self.kept(self.jobs[0]).clear()

    def many(self, job: Job, count: int) -> Tensor:
        """As `sample`, on all processes, each of which gets the images; they are kept until the row is finished."""
        p = self.protocol
        keep = self.kept(job)
        if self.ranks.world == 1 and not keep.folder.exists():
            return self.sample(job, count)
        made = sample_many(
            job.ready, count, None, p["seeds"][0], p["batch_size"], ranks=self.ranks, keep=keep, everywhere=True,
            accelerated=job.variant.accelerators, **asked_of(job.ready, job.variant, p["dtype"]),
        )  # fmt: skip
        assert made is not None
        return made

    def kept(self, job: Job) -> Kept:
        """Where the images of an unfinished row are."""
        versions = {key: self.protocol[key] for key in ("hasten", "torch", "batch_size")}
        return Kept(self.out / "samples" / "kept", {"key": job.key, **versions})

    @functools.cached_property
    def machine(self) -> dict[str, Any]:
        told = ("hardware", "threads", "torch", "device", "processes", "rounds", "timing_batch")
        return {key: self.protocol[key] for key in told}

    def time(self, progress: Progress) -> dict[str, Any]:
        """Time all rows in turns, after a pass that warms up and counts; rows in the store get the new figures.

        Of several processes the first does it while the others rest, but for rows that need them all.
        """
        batch = self.protocol["timing_batch"]
        progress.bar.update(progress.task, description="timing")
        found: dict[str, Any] = {}
        jobs = [job for job in self.jobs if self.ranks.first or sharing(job.variant.accelerators, self.ranks)]
        if not jobs:
            return found
        for job in jobs:
            with counting(job.ready, progress) as count:
                self.sample(job, batch)
            found[job.key] = {"nfe": count[0] / batch + extra(job.ready, job.variant)}
        work = {job.key: functools.partial(self.sample, job, batch) for job in jobs}
        with contextlib.ExitStack() as stack:
            for ready in {id(job.ready.denoiser): job.ready for job in jobs}.values():
                stack.enter_context(counting(ready, progress))
            for key, seconds in cost.interleave(work, self.protocol["rounds"], warmup=0).items():
                found[key]["seconds"] = seconds
        if not self.ranks.first:
            return found
        self.store.put_timing(self.machine, found)
        old = [self.store.rows[job.key] for job in self.jobs if job.key in self.store.rows]
        for row in old:
            protocol = {**row["protocol"], **self.machine, "date": now()}
            self.store.put({**row, **self.costs(row["key"], found), "protocol": protocol})
        return found

    def macs(self, job: Job, nfe: float) -> int | None:
        """Multiply-accumulates of an image; None where its layers or graphs are others than torch's own."""
        model, chosen = job.ready, [pick("accelerators", one) for one in job.variant.accelerators]
        claims = {claim for one in chosen for claim in one.claims}
        if getattr(getattr(model.denoiser, "net", None), "runs_elsewhere", False):
            return None
        if claims:
            return cost.macs(images, model, job.variant, 1, 0, 1, "fp32") if claims == {"features"} else None
        x = torch.zeros(1, *model.shape, device=model.device)
        return round(cost.macs(model.denoiser, x, 0.5, **model.cond(1)) * nfe)

    def costs(self, key: str, timed: Mapping[str, Any]) -> dict[str, Any]:
        """The figures of a row that come from the timing."""
        batch, mine, reference = self.protocol["timing_batch"], timed[key], timed[self.jobs[0].key]
        ratio = cost.ratio(reference["seconds"], mine["seconds"])
        return {
            "nfe": mine["nfe"], "seconds_per_image": statistics.median(mine["seconds"]) / batch,
            "speedup": ratio.median, "speedup_low": ratio.low, "speedup_high": ratio.high,
        }  # fmt: skip

    def judge(self, job: Job, timed: Mapping[str, Any], progress: Progress) -> dict[str, Any] | None:
        """Sample a row's images and measure them: the finished row, None where another process has it."""
        model, p, v = self.model, self.protocol, job.variant
        n, first = p["n"], p["seeds"][0]
        with counting(job.ready, progress), cost.peak_memory(model.device) as memory:
            drawn = self.many(job, n)
        labels, seen = model.labels(n), None
        if self.net is not None:
            seen = judge_many(drawn, labels, self.net, self.known, range(first, first + n), self.ranks, model.classes)
        if not self.ranks.first:
            return None
        net = next((m for m in job.ready.denoiser.modules() if hasattr(type(m), "cold_seconds")), None)
        compiled = {} if net is None else {"cold_seconds": net.cold_seconds, "warm_seconds": net.warm_seconds}
        row = {
            "key": job.key, "name": v.name, "role": v.role, "sampler": v.sampler or "plan",
            "times": v.times or v.plan or v.model, "steps": job.ready.steps, "guidance_scale": v.guidance_scale,
            "guides": list(v.guides), "start": v.start, "plan": v.plan, "model": v.model,
            "accelerators": list(v.accelerators),
            **self.costs(job.key, timed),
            "macs_per_image": self.macs(job, timed[job.key]["nfe"]),
            "peak_memory": memory.peak, **dict.fromkeys(QUALITY), **compiled,
        }  # fmt: skip
        if seen is not None:
            row |= {key: measure.value for key, measure in seen.items()}
            row["frechet_low"], row["frechet_high"] = seen["frechet"].interval or (None, None)
            p = {**p, "floors": {key: measure.floor for key, measure in seen.items()}}
        if v.role == "reference":
            self.store.keep(f"{job.key}-all", drawn.half().numpy())
        else:
            whole = torch.from_numpy(self.store.images(f"{self.jobs[0].key}-all")).float()
            row |= difference(drawn.half().float(), whole)
        self.store.keep(job.key, to_uint8(drawn[:SHOWN]).transpose(0, 3, 1, 2))
        return {**row, "protocol": {**p, "date": now()}}

    def finish(self, show: bool) -> list[dict[str, Any]]:
        """The finished rows in the order of the set, and their report on disk."""
        rows, found = [], self.store.rows
        keys = {job.variant.method: job.key for job in self.jobs}
        for job in self.jobs:
            if job.key not in found:
                continue
            equal = keys[job.equal.method] if job.equal is not None else None
            row = {**found[job.key], "name": job.variant.name, "role": job.variant.role}
            row |= {"equal_cost": None, "is_equal_cost": equal == job.key, "frechet_over_equal_cost": None}
            if job.equal is not None and equal in found and equal != job.key:
                row["equal_cost"] = job.equal.name
                if row["frechet"] is not None and found[equal]["frechet"]:
                    row["frechet_over_equal_cost"] = row["frechet"] / found[equal]["frechet"]
            rows.append(row)
        if not rows:
            return rows
        for row in rows:
            if row["accelerators"]:
                as_fast(row, rows)
        note = f"{len(rows)} of {len(self.jobs)} rows have finished: run the same command again to go on."
        note = note if len(rows) < len(self.jobs) else ""
        images = {row["key"]: kept for row in rows if (kept := self.store.images(row["key"])) is not None}
        heads = [self.model.classes[k % len(self.model.classes)] for k in range(SHOWN)] if self.model.classes else []
        page = report.write(self.store.out, rows, images, heads, note)
        if show:
            from rich.console import Console

            console = Console()
            console.print(report.table(rows, console.width))
            console.print(f"{report.headline(rows)}\nReport: {page}", markup=False, highlight=False, soft_wrap=True)
        return rows


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
) -> list[dict[str, Any]]:
    """Run every variant from the same seeds; write `results.jsonl`, `report.html`, `front.png`, `grid.png` into `out`.

    model: a Model, or what `load` takes. variants: a bundled set ("demo", "full") or a TOML file (`hasten.variants`).
    n: images a row, in batches of `batch_size` (default: the set's own). seed: of image 0; image k has `seed + k`.
    rounds, timing_batch: a timing round samples one batch with each variant in turn.
    runtime: as `Model.sample` takes it. reference: statistics of real images (default: those that the model names;
    without any, quality is not measured). features: the network behind them (default: the reference's own).
    show: print the table on stdout. command: for the record (default: the one that says the same).
    ranks: `Ranks.start(device)`, where several processes call this together: they share the images of a row, and the
    first one times the rows, writes and shows (default: this process alone).

    Returns the rows, a dict a variant: nfe (counted), macs_per_image, seconds_per_image, speedup (with low and high),
    peak_memory (bytes), frechet (with low and high), kid, precision, recall, coverage, accuracy, psnr, rms, protocol.
    Run again with the same folder, it keeps the rows whose key is the same. Ctrl-C keeps the finished rows and writes
    their report before it goes on to the caller. Raises BadInput for a set, model or folder that cannot be used,
    before anything has run.
    """
    ranks = Ranks(torch.device("cpu")) if ranks is None else ranks
    model = model if isinstance(model, Model) else load(model)
    chosen = read(variants, model.times, model.guidance_scale)
    n, rounds = chosen.n if n is None else n, chosen.rounds if rounds is None else rounds
    least = {"n": 10, "rounds": 1, "timing_batch": 1, "batch_size": 1, "seed": 0}
    for name, value in zip(least, (n, rounds, timing_batch, batch_size, seed), strict=True):
        whole(name, value, least[name])
    rows = prepare(model, chosen, ranks)
    asked = reference or model.card.get("reference")
    known = asked if asked is None or isinstance(asked, Reference) else load_reference(asked)
    net = None if known is None else feature_net(features or known.features)
    if net is not None and not isinstance(features, nn.Module):
        net = net.to(model.device)
    if known is not None and net_name(net) != known.features:
        raise BadInput(f"the reference holds {known.features} features: {net_name(net)} cannot judge against it")
    runtime = ranks.once(functools.partial(model.runtime_for, runtime, min(n, batch_size)))
    store, weights = Store(Path(out)) if ranks.first else None, fingerprint(model)
    protocol = {
        "schema": SCHEMA, "model": model.name, "model_hash": weights, "set": chosen.source, "n": n,
        "seeds": [seed, seed + n - 1], "batch_size": batch_size, "timing_batch": timing_batch, "rounds": rounds,
        "classes": len(model.classes or ()), "features": known and net_name(net),
        "reference": known and f"{known.name}, {known.split} split, {known.count} images", "floors": {},
        "hardware": processor(model.device), "threads": torch.get_num_threads(), "device": model.device.type,
        "processes": ranks.world, "dtype": runtime, "torch": torch.__version__, "hasten": __version__, "date": now(),
        "command": command or spell("compare", model.name, {"variants": variants, "n": n, "seed": seed, "out": out}),
    }  # fmt: skip
    told = ("schema", "model_hash", "n", "seeds", "dtype", "device", "features", "reference")
    settings = {"against": chosen.reference.method, **{key: protocol[key] for key in told}}
    settings |= {"statistics": None if known is None else hash_of(known.mean, known.covariance, known.sample)}
    jobs = []
    for variant, equal, ready in rows:
        told_plan: dict[str, Any] = {} if variant.sampler or ready.plan is None else {"plan": ready.plan.to_json()}
        told_plan |= {} if variant.model is None else {"weights": fingerprint(ready)}
        told_plan |= {} if sharing(variant.accelerators, ranks) is None else {"processes": ranks.world}
        text = json.dumps({**settings, "method": variant.method, **told_plan}, sort_keys=True)
        jobs.append(Job(variant, equal, hashlib.sha256(text.encode()).hexdigest()[:16], ready))
    run = Run(model, jobs, store, protocol, known, net, Path(out), ranks)
    try:
        run.all()
    except (KeyboardInterrupt, Lost) as e:
        if not ranks.first:
            raise
        what = "stopped" if isinstance(e, KeyboardInterrupt) else str(e).partition(";")[0]
        kept = f"{len(run.finish(show))} of {len(jobs)} rows are kept in {out}"
        raise type(e)(f"{what}: {kept}; the same command goes on from there") from None
    return ranks.once(lambda: run.finish(show))
