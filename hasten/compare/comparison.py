"""A comparison in progress: its rows are timed in turns, sampled, measured and stored."""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.ranks import Ranks
from ..errors import BadInput
from ..images import to_uint8
from ..metrics import Reference
from ..metrics.difference import difference
from ..model.model import Label, Model
from ..performance import cost
from ..pick import pick
from ..progress import Progress
from ..storage.batches import SavedBatches
from ..storage.provenance import now
from ..workflows.sample import evaluate_distributed, sample_many, sharing
from . import jobs as tools
from . import report
from .counting import counting, extra
from .jobs import Job, as_fast, asked_of, images
from .results import QUALITY

SHOWN = 10  # columns of the sample grid


@dataclass
class Comparison:
    """A comparison on its way: what it needs, and its phases. `protocol` is what every row carries.

    label: the prompts of a model that takes them. lost: why rows failed, by key.
    """

    model: Model
    jobs: list[Job]
    store: Any  # a Store in the first process; the others have none
    protocol: dict[str, Any]
    known: Reference | None
    net: nn.Module | None
    out: Path
    ranks: Ranks
    label: Label = None

    def __post_init__(self) -> None:
        self.lost: dict[str, str] = {}

    def sample(self, job: Job, count: int, block: int = 0) -> Tensor:
        """The first images of a row's block of seeds: image k from the block's first seed + k and, in a model of C
        classes, class k mod C."""
        p = self.protocol
        return images(job.ready, job.variant, count, self.seed(block), p["batch_size"], p["dtype"], self.label)

    def seed(self, block: int) -> int:
        """The first seed of a block."""
        return self.protocol["seeds"][0] + block * self.protocol["n"]

    def whole(self, block: int) -> str:
        """The name in the store of all images of the reference in a block."""
        return f"{self.jobs[0].key}-all" + (f"-{block}" if block else "")

    def finished(self, job: Job) -> bool:
        """Whether the store has the row (one that failed is tried again)."""
        return job.key in self.store.rows and not self.store.rows[job.key].get("failed")

    def unfinished(self) -> tuple[list[int], dict[str, Any] | None]:
        """The numbers of the rows that are missing, and the timing if that is done."""
        missing = [k for k, job in enumerate(self.jobs) if not self.finished(job)]
        gone = any(self.store.images(self.whole(block)) is None for block in range(self.protocol["repeats"]))
        if gone and 0 not in missing:
            missing = [0, *missing]
        return missing, self.store.timing(self.machine, [job.key for job in self.jobs])

    def all(self) -> None:
        """Time every row unless that is done, then sample and judge the rows that are missing."""
        p = self.protocol
        numbers, timed = self.ranks.on_main_process(self.unfinished)
        missing = [self.jobs[k] for k in numbers]
        count = p["n"] * p["repeats"]
        work = sum(count * job.nfe for job in missing)
        work += 0 if timed else sum((p["rounds"] + 1) * p["timing_batch"] * job.nfe for job in self.jobs)
        progress = Progress(work, self.ranks.is_main_process)
        with progress.bar:
            blocks = f" in each of {p['repeats']} blocks of seeds" if p["repeats"] > 1 else ""
            what = f"{len(self.jobs)} rows of {p['n']} images{blocks}"
            progress.say(f"{p['model']}: {what}, {p['dtype']}, {p['hardware']}")
            if done := len(self.jobs) - len(missing):
                progress.say(f"{done} of {len(self.jobs)} rows are finished in {self.store.out} and are kept")
            timed = timed or self.ranks.broadcast_object(self.time(progress))
            well = [job for job in missing if job.key in timed]
            left = sum(self.costs(job.key, timed)["seconds_per_image"] for job in well) * count / self.ranks.world
            if missing:
                progress.say(f"{len(missing)} rows to sample, about {left:.0f} s")
            for number, job in enumerate(missing, 1):
                progress.describe(job.variant.name)
                row = self.tried(job, timed, progress)
                if row is None:  # the first process has it
                    continue
                self.store.put(row)
                for block in range(p["repeats"]):
                    self.kept(job, block).clear(last=False)
                progress.say(f"[{number}/{len(missing)}] {row['name']}: {self.said(row)}")
        self.ranks.barrier()
        self.kept(self.jobs[0]).clear()

    def said(self, row: Mapping[str, Any]) -> str:
        """A finished row in one line."""
        if row.get("failed"):
            return f"failed: {row['failed']}"
        quality = "" if row["frechet"] is None else f", distance {row['frechet']:.3g}"
        return f"{row['nfe']:g} NFE, {row['seconds_per_image'] * 1e3:.3g} ms an image{quality}"

    def tried(self, job: Job, timed: Mapping[str, Any], progress: Progress) -> dict[str, Any] | None:
        """`judge`; a row that cannot be measured is marked, and the others go on. The reference cannot be done without,
        and what fails in one of several processes ends them all."""
        if job.key not in self.lost:
            try:
                return self.judge(job, timed, progress)
            except Exception as error:
                self.fails(job, error)
        return tools.failed(job, self.lost[job.key], {**self.protocol, "date": now()})

    def fails(self, job: Job, error: Exception) -> None:
        """Note why a row cannot be measured."""
        if self.ranks.world > 1 or os.environ.get("HASTEN_DEBUG", "0") not in ("", "0"):
            raise error
        if job.variant.role == "reference":
            why = tools.reason_of(error)
            raise BadInput(
                f"the reference {job.variant.name!r}, which rows are measured against, fails: {why}"
            ) from error
        self.lost[job.key] = tools.reason_of(error)

    def many(self, job: Job, count: int, block: int = 0) -> Tensor:
        """As `sample`, on all processes, each of which gets the images; they are kept until the row is finished."""
        p = self.protocol
        keep = self.kept(job, block)
        if self.ranks.world == 1 and not keep.folder.exists():
            return self.sample(job, count, block)
        made = sample_many(
            job.ready, count, self.label, self.seed(block), p["batch_size"], ranks=self.ranks, keep=keep,
            everywhere=True, accelerated=job.variant.accelerators, **asked_of(job.ready, job.variant, p["dtype"]),
        )  # fmt: skip
        assert made is not None
        return made

    def kept(self, job: Job, block: int = 0) -> SavedBatches:
        """Where the images of an unfinished row are."""
        versions = {key: self.protocol[key] for key in ("hasten", "torch", "batch_size")}
        return SavedBatches(self.out / "samples" / "kept", {"key": job.key, "block": block, **versions})

    @functools.cached_property
    def machine(self) -> dict[str, Any]:
        told = ("hardware", "threads", "torch", "device", "processes", "rounds", "timing_batch")
        return {key: self.protocol[key] for key in told}

    def time(self, progress: Progress) -> dict[str, Any]:
        """Time all rows in turns, after a pass that warms up and counts; rows in the store get the new figures.

        Of several processes the first does it while the others rest, but for rows that need them all.
        """
        batch = self.protocol["timing_batch"]
        progress.describe("timing")
        found: dict[str, Any] = {}
        jobs = [job for job in self.jobs if self.ranks.is_main_process or sharing(job.variant.accelerators, self.ranks)]
        if not jobs:
            return found
        for job in jobs:
            try:
                with counting(job.ready, progress) as count:
                    self.sample(job, batch)
                found[job.key] = {"nfe": count[0] / batch + extra(job.ready, job.variant)}
            except Exception as error:
                self.fails(job, error)
        jobs = [job for job in jobs if job.key in found]
        work = {job.key: functools.partial(self.sample, job, batch) for job in jobs}
        with contextlib.ExitStack() as stack:
            for ready in {id(job.ready.denoiser): job.ready for job in jobs}.values():
                stack.enter_context(counting(ready, progress))
            for key, seconds in cost.interleave(work, self.protocol["rounds"], warmup=0).items():
                found[key]["seconds"] = seconds
        if not self.ranks.is_main_process:
            return found
        self.store.put_timing(self.machine, found)
        old = [self.store.rows[job.key] for job in jobs if self.finished(job)]
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
        try:
            return round(cost.macs(model.denoiser, x, 0.5, **model.cond(1)) * nfe)
        except Exception:  # of a network of the user's own, in whatever way it is special: no figure, and no end
            return None

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
        p, blocks, peak = self.protocol, [], 0
        for block in range(p["repeats"]):
            with counting(job.ready, progress), cost.peak_memory(self.model.device) as memory:
                drawn = self.many(job, p["n"], block)
            peak = max(peak, memory.peak)
            figures = self.measured(job, drawn, block)
            if figures is not None:
                blocks.append(figures)
        if not self.ranks.is_main_process:
            return None
        floors = blocks[0].pop("floors", None)
        for figures in blocks[1:]:
            figures.pop("floors", None)
        net = next((m for m in job.ready.denoiser.modules() if hasattr(type(m), "cold_seconds")), None)
        compiled = {} if net is None else {"cold_seconds": net.cold_seconds, "warm_seconds": net.warm_seconds}
        return {
            **tools.described(job), **self.costs(job.key, timed),
            "macs_per_image": self.macs(job, timed[job.key]["nfe"]),
            "peak_memory": peak, **compiled, **tools.averaged(blocks),
            "protocol": {**p, **({} if floors is None else {"floors": floors}), "date": now()},
        }  # fmt: skip

    def measured(self, job: Job, drawn: Tensor, block: int) -> dict[str, Any] | None:
        """The figures of a row's images of a block of seeds; keeps the images that later rows and the page need."""
        n, first, seen = len(drawn), self.seed(block), None
        if self.net is not None:
            labels, names = self.model.labels(n), self.model.classes
            seen = evaluate_distributed(drawn, labels, self.net, self.known, range(first, first + n), self.ranks, names)
        if not self.ranks.is_main_process:
            return None
        figures: dict[str, Any] = dict.fromkeys(QUALITY)
        if seen is not None:
            figures |= {key: measure.value for key, measure in seen.items()}
            figures["frechet_low"], figures["frechet_high"] = seen["frechet"].interval or (None, None)
            figures["floors"] = {key: measure.floor for key, measure in seen.items()}
        if job.variant.role == "reference":
            self.store.keep(self.whole(block), drawn.half().numpy())
        else:
            figures |= difference(drawn.half().float(), torch.from_numpy(self.store.images(self.whole(block))).float())
        if block == 0 and tools.is_image(drawn.shape[1:]):
            self.store.keep(job.key, to_uint8(drawn[:SHOWN]).transpose(0, 3, 1, 2))
        return figures

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
                if row.get("frechet") is not None and found[equal]["frechet"]:
                    row["frechet_over_equal_cost"] = row["frechet"] / found[equal]["frechet"]
            rows.append(row)
        if not rows:
            return rows
        for row in rows:
            if row["accelerators"] and not row.get("failed"):
                as_fast(row, rows)
        note = f"{len(rows)} of {len(self.jobs)} rows have finished: run the same command again to go on."
        note = note if len(rows) < len(self.jobs) else ""
        images = {row["key"]: kept for row in rows if (kept := self.store.images(row["key"])) is not None}
        names = self.label if isinstance(self.label, list) else self.model.classes
        heads = [" ".join(names[k % len(names)].split()) for k in range(SHOWN)] if names else []
        page = report.write(self.store.out, rows, images, heads, note)
        if show:
            from rich.console import Console

            console = Console()
            console.print(report.table(rows, console.width))
            console.print(f"{report.headline(rows)}\nReport: {page}", markup=False, highlight=False, soft_wrap=True)
        return rows
