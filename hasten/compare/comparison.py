"""A comparison in progress: its rows are timed in turns, sampled, evaluated and stored."""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.ranks import Ranks
from ..errors import BadInput
from ..images import to_uint8
from ..metrics import Measure, Reference
from ..model.model import Label, Model
from ..performance import cost
from ..progress import ProgressReporter
from ..storage.batches import SavedBatches
from ..storage.provenance import utc_now
from ..workflows.captioned import CaptionedSet
from ..workflows.distribute import sample_many, sharing
from ..workflows.evaluate import evaluate_distributed
from ..workflows.evidence import Evidence
from ..workflows.prompts import is_image
from ..workflows.restoration_meter import RestorationMeter
from . import jobs as tools
from . import report
from .advice import finish_rows
from .configs import write_configs
from .counting import count_evaluations, start_nfe
from .jobs import Job, sample_images, sampling_arguments
from .parts import seconds_by_part, time_parts
from .prompt_rows import diversity_figures, estimates, seed_figures
from .restored_rows import RestoredPictures, add_figures
from .results import QUALITY, ResultStore
from .reuse import count_layers

GRID_COLUMNS = 10  # images of each row on the page
TIMING_SETTINGS = ("hardware", "threads", "torch", "device", "processes", "rounds", "timing_batch")
Timing = dict[str, Any]  # by key: {"nfe": evaluations per image, "seconds": one entry per timing round}


@dataclass
class Comparison:
    """The state of a comparison, and its phases.

    Args:
        model: The model that the rows without a model of their own sample.
        jobs: The rows to run; the first is the reference.
        store: The folder of results; None in all processes but the main one.
        protocol: What every row records of how it was measured.
        reference: Statistics of real images; None where quality is not measured.
        net: The feature network of `reference`.
        out: The folder of the comparison.
        ranks: The processes that share the work.
        label: The prompts of a model that takes prompts.
        captioned: Captioned pictures that these are measured against.
        evidence: What images of prompts, and pairs of images of the same seeds, are measured by.
        meter: Of a model that restores images: its pairs, and what measures a row against the true images.
    """

    model: Model
    jobs: list[Job]
    store: Any
    protocol: dict[str, Any]
    reference: Reference | None
    net: nn.Module | None
    out: Path
    ranks: Ranks
    label: Label = None
    captioned: CaptionedSet | None = None
    evidence: Evidence = field(default_factory=Evidence)
    meter: RestorationMeter | None = None

    def __post_init__(self) -> None:
        self.failures: dict[str, str] = {}  # why rows failed, by key
        self.reference_images: dict[int, Tensor] = {}  # by block

    @property
    def prompts(self) -> list[str] | None:
        """The prompts; None for a model that takes none."""
        return self.label if isinstance(self.label, list) and self.model.conditioning is not None else None  # type: ignore[return-value]

    # ---- what is stored ----

    @property
    def results(self) -> ResultStore:
        """The store, in the main process."""
        assert self.store is not None
        return self.store

    @property
    def timing_settings(self) -> dict[str, Any]:
        """The part of the protocol that a timing depends on."""
        return {key: self.protocol[key] for key in TIMING_SETTINGS}

    def first_seed(self, block: int) -> int:
        """The first seed of a block."""
        return self.protocol["seeds"][0] + block * self.protocol["n"]

    def reference_name(self, block: int = 0) -> str:
        """The name in the store of all images of the reference in a block."""
        return f"{self.jobs[0].key}-all" + (f"-{block}" if block else "")

    def is_finished(self, job: Job) -> bool:
        """Whether the store has the row; a row that failed is run again."""
        return job.key in self.results.rows and not self.results.rows[job.key].get("failed")

    def unfinished(self) -> tuple[list[int], Timing | None]:
        """The indices of the missing rows, and the stored timing, None where it does not cover all rows."""
        missing = [k for k, job in enumerate(self.jobs) if not self.is_finished(job)]
        blocks = range(self.protocol["repeats"])
        if 0 not in missing and any(self.results.load_images(self.reference_name(block)) is None for block in blocks):
            missing = [0, *missing]
        return missing, self.results.timing(self.timing_settings, [job.key for job in self.jobs])

    def saved_batches(self, job: Job, block: int = 0) -> SavedBatches:
        """The images of an unfinished row on disk."""
        versions = {key: self.protocol[key] for key in ("hasten", "torch", "batch_size")}
        return SavedBatches(self.out / "samples" / "kept", {"key": job.key, "block": block, **versions})

    # ---- phases ----

    def run(self) -> None:
        """Time every row unless that is done, then sample and evaluate the missing rows."""
        p = self.protocol
        numbers, timing = self.ranks.on_main_process(self.unfinished)
        missing = [self.jobs[k] for k in numbers]
        count = p["n"] * p["repeats"]
        total = sum(count * job.nfe for job in missing)
        total += 0 if timing else sum((p["rounds"] + 1) * p["timing_batch"] * job.nfe for job in self.jobs)
        progress = ProgressReporter(total, self.ranks.is_main_process)
        with progress.bar:
            blocks = f" in each of {p['repeats']} blocks of seeds" if p["repeats"] > 1 else ""
            size = f"{len(self.jobs)} rows of {p['n']} images{blocks}"
            progress.say(f"{p['model']}: {size}, {p['dtype']}, {p['hardware']}")
            if done := len(self.jobs) - len(missing):
                progress.say(f"{done} of {len(self.jobs)} rows are finished in {self.out} and are reused")
            timing = timing or self.ranks.broadcast_object(self.time_rows(progress))
            timed = [job for job in missing if job.key in timing]
            seconds = sum(self.costs(job.key, timing)["seconds_per_image"] for job in timed) * count / self.ranks.world
            if missing:
                progress.say(f"{len(missing)} rows to sample, about {seconds:.0f} s")
            for number, job in enumerate(missing, 1):
                progress.describe(job.variant.name)
                row = self.try_row(job, timing, progress)
                if row is None:  # the main process has it
                    continue
                self.results.put(row)
                for block in range(p["repeats"]):
                    self.saved_batches(job, block).clear(last=False)
                progress.say(f"[{number}/{len(missing)}] {row['name']}: {tools.summary(row)}")
        self.ranks.barrier()
        self.saved_batches(self.jobs[0]).clear()

    def try_row(self, job: Job, timing: Mapping[str, Any], progress: ProgressReporter) -> dict[str, Any] | None:
        """`evaluate_row`; a row that cannot be measured is marked as failed, and the run continues."""
        if job.key not in self.failures:
            try:
                return self.evaluate_row(job, timing, progress)
            except Exception as error:
                self.record_failure(job, error)
        return tools.failed_row(job, self.failures[job.key], {**self.protocol, "date": utc_now()})

    def record_failure(self, job: Job, error: Exception) -> None:
        """Record why a row cannot be measured. An error of the reference, or in one of several processes, is raised."""
        if self.ranks.world > 1 or os.environ.get("HASTEN_DEBUG", "0") not in ("", "0"):
            raise error
        if job.variant.role == "reference":
            reason = tools.error_summary(error)
            raise BadInput(
                f"the reference {job.variant.name!r}, which rows are measured against, fails: {reason}"
            ) from error
        self.failures[job.key] = tools.error_summary(error)

    # ---- sampling ----

    def sample(
        self,
        job: Job,
        count: int,
        block: int = 0,
        parts: dict[str, float] | None = None,
        memory: dict[str, int] | None = None,
    ) -> Tensor:
        """The first `count` images of a block of seeds: image k has the block's first seed + k and, in a model of C
        classes, class k mod C. The seconds of text encoder and decoder are added to `parts`, peak bytes to `memory`."""
        p, seed = self.protocol, self.first_seed(block)
        with time_parts(job.model, {} if parts is None else parts, memory):
            how = (p["batch_size"], p["dtype"], self.label, self.sources(count))
            return sample_images(job.model, job.variant, count, seed, *how)

    def sources(self, count: int) -> Tensor | None:
        """What the first images of a model that restores are made from; None for another."""
        return None if self.meter is None else self.meter.pairs.sources_of(range(count))

    def sample_distributed(self, job: Job, count: int, block: int = 0) -> Tensor:
        """As `sample`, shared by all processes, each of which gets the images; batches are saved until the row is
        finished."""
        p = self.protocol
        saved = self.saved_batches(job, block)
        if self.ranks.world == 1 and not saved.folder.exists():
            return self.sample(job, count, block)
        images = sample_many(
            job.model,
            count,
            self.label,
            self.first_seed(block),
            p["batch_size"],
            ranks=self.ranks,
            keep=saved,
            everywhere=True,
            images=self.sources(count),
            accelerated=job.variant.accelerators,
            **sampling_arguments(job.model, job.variant, p["dtype"]),
        )
        assert images is not None
        return images

    # ---- cost ----

    def time_rows(self, progress: ProgressReporter) -> Timing:
        """Time all rows in turns, after a pass that warms up and counts evaluations; stored rows get the new figures.

        Of several processes the main one does it while the others wait, except for rows that need them all.
        """
        batch = self.protocol["timing_batch"]
        progress.describe("timing")
        timing: Timing = {}
        jobs = [job for job in self.jobs if self.ranks.is_main_process or sharing(job.variant.accelerators, self.ranks)]
        if not jobs:
            return timing
        for job in jobs:
            try:
                timing[job.key] = self.warm_up(job, batch, progress)
            except Exception as error:
                self.record_failure(job, error)
        jobs = [job for job in jobs if job.key in timing]
        parts: dict[str, dict[str, float]] = {job.key: timing[job.key].setdefault("parts", {}) for job in jobs}
        calls = {job.key: functools.partial(self.sample, job, batch, parts=parts[job.key]) for job in jobs}
        with contextlib.ExitStack() as stack:
            for model in {id(job.model.denoiser): job.model for job in jobs}.values():
                stack.enter_context(count_evaluations(model, progress))
            for key, seconds in cost.interleave(calls, self.protocol["rounds"], warmup=0).items():
                timing[key]["seconds"] = seconds
        if self.ranks.is_main_process:
            self.store_timing(timing)
        return timing

    def warm_up(self, job: Job, batch: int, progress: ProgressReporter) -> dict[str, Any]:
        """Sample a batch that is not timed: the evaluations of an image, the peak memory by part, and the share of the
        network that cached features replace."""
        memory: dict[str, int] = {}
        caching = job.variant.role == "reference" or "features" in tools.claims_of(job.variant)
        with count_evaluations(job.model, progress) as count, count_layers(job.model.denoiser, caching) as layers:
            self.sample(job, batch, memory=memory)
        nfe = count[0] / batch + start_nfe(job.model, job.variant)
        return {"nfe": nfe, "memory": memory, "reuse": layers.reuse}

    def store_timing(self, timing: Timing) -> None:
        """Store the figures of one interleaved run, also in the rows that are finished already."""
        self.results.put_timing(self.timing_settings, timing)
        rows = [self.results.rows[job.key] for job in self.jobs if job.key in timing and self.is_finished(job)]
        for row in rows:
            protocol = {**row["protocol"], **self.timing_settings, "date": utc_now()}
            self.results.put({**row, **self.costs(row["key"], timing), "protocol": protocol})

    def costs(self, key: str, timing: Mapping[str, Any]) -> dict[str, Any]:
        """The figures of a row that come from the timing."""
        own, reference = timing[key], timing[self.jobs[0].key]
        ratio = cost.ratio(reference["seconds"], own["seconds"])
        seconds = statistics.median(own["seconds"]) / self.protocol["timing_batch"]
        return {
            "nfe": own["nfe"],
            "seconds_per_image": seconds,
            "seconds_by_part": seconds_by_part(own.get("parts"), seconds),
            "memory_by_part": own.get("memory") if len(own.get("memory") or ()) > 1 else None,
            "reuse": own.get("reuse"),
            "speedup": ratio.median,
            "speedup_low": ratio.low,
            "speedup_high": ratio.high,
        }

    # ---- quality ----

    def evaluate_row(self, job: Job, timing: Mapping[str, Any], progress: ProgressReporter) -> dict[str, Any] | None:
        """Sample a row's images and evaluate them: the finished row, None where another process has it."""
        p, blocks, peak = self.protocol, [], 0
        for block in range(p["repeats"]):
            with count_evaluations(job.model, progress), cost.peak_memory(self.model.device) as memory:
                images = self.sample_distributed(job, p["n"], block)
            peak = max(peak, memory.peak)
            figures = self.evaluate_images(job, images, block)
            if figures is not None:
                blocks.append(figures)
        if not self.ranks.is_main_process:
            return None
        return self.finished_row(job, timing, blocks, peak)

    def finished_row(
        self, job: Job, timing: Mapping[str, Any], blocks: list[dict[str, Any]], peak: int
    ) -> dict[str, Any]:
        """The row of results.jsonl from its timing, the figures of its blocks and its peak memory in bytes."""
        baselines = blocks[0].get("floors")
        blocks = [{key: value for key, value in figures.items() if key != "floors"} for figures in blocks]
        paired = estimates(blocks, self.prompts)
        net = next((m for m in job.model.denoiser.modules() if hasattr(type(m), "cold_seconds")), None)
        compiled = {} if net is None else {"cold_seconds": net.cold_seconds, "warm_seconds": net.warm_seconds}
        return {
            **tools.method_fields(job),
            **self.costs(job.key, timing),
            "macs_per_image": tools.row_macs(job, timing[job.key]["nfe"]),
            "peak_memory": peak,
            **compiled,
            **tools.average_blocks(blocks),
            "paired": paired,
            "protocol": {**self.protocol, **({} if baselines is None else {"floors": baselines}), "date": utc_now()},
        }

    def evaluate_images(self, job: Job, images: Tensor, block: int) -> dict[str, Any] | None:
        """The quality figures of a row's images in a block; stores the images that later rows and the page need."""
        measures, more = self.measure_quality(images, block), self.measure_diversity(job, images, block)
        if not self.ranks.is_main_process:
            return None
        figures: dict[str, Any] = dict.fromkeys(QUALITY)
        if measures is not None:
            figures |= {key: measure.value for key, measure in measures.items()}
            figures["frechet_low"], figures["frechet_high"] = measures["frechet"].interval or (None, None)
            figures["floors"] = {key: measure.floor for key, measure in measures.items()}
        if self.captioned is not None:
            match = self.captioned.match
            figures["floors"] = {**figures.get("floors", {}), "prompt_match": None if match is None else match.value}
        self.store_images(job, images, block)
        others = None if job.variant.role == "reference" else self.load_reference(block)
        figures |= {**more, **seed_figures(self.evidence, images.half().float(), others, self.prompts)}
        if self.meter is not None:
            add_figures(figures, self.meter, images)
        return figures

    def measure_quality(self, images: Tensor, block: int) -> dict[str, Measure] | None:
        """The measures of images by the feature network; None without one, and in all processes but the main one."""
        if self.net is None:
            return None
        n, first = len(images), self.first_seed(block)
        labels, names, seeds = self.model.labels(n), self.model.classes, range(first, first + n)
        return evaluate_distributed(images, labels, self.net, self.reference, seeds, self.ranks, names)

    def measure_diversity(self, job: Job, images: Tensor, block: int) -> dict[str, Any]:
        """The diversity of a row within a prompt; empty without a feature network, and in all processes but the main
        one."""
        if self.evidence.net is None or self.prompts is None:
            return {}
        seed = self.first_seed(block)
        return diversity_figures(self.evidence, job, images, self.prompts, seed, self.protocol, self.ranks)

    def store_images(self, job: Job, images: Tensor, block: int) -> None:
        """Store all images of the reference, for the other rows, and the first images of each row, for the page."""
        if job.variant.role == "reference":
            self.reference_images.pop(block, None)
            self.results.save_images(self.reference_name(block), images.half().numpy())
        if block == 0 and is_image(images.shape[1:]):
            self.results.save_images(job.key, to_uint8(images[:GRID_COLUMNS]).transpose(0, 3, 1, 2))

    def load_reference(self, block: int) -> Tensor:
        """The images of the reference in a block."""
        if block not in self.reference_images:
            stored = self.results.load_images(self.reference_name(block))
            if stored is None:
                raise BadInput(f"images of the reference in {self.out / 'samples'} are missing: run the command again")
            self.reference_images[block] = torch.from_numpy(stored).float()
        return self.reference_images[block]

    # ---- report ----

    def missing_note(self, finished: int) -> str:
        """A line on the rows that are missing in the report; empty where all have finished."""
        if finished == len(self.jobs):
            return ""
        return f"{finished} of {len(self.jobs)} rows have finished: run the same command again to resume."

    def write_report(self, show: bool) -> list[dict[str, Any]]:
        """The finished rows in the order of the set; their report is written to disk and, with `show`, printed."""
        rows = finish_rows(self.jobs, self.results.rows)
        if not rows:
            return rows
        images = {row["key"]: stored for row in rows if (stored := self.results.load_images(row["key"])) is not None}
        names = self.label if isinstance(self.label, list) else self.model.classes
        heads = [" ".join(names[k % len(names)].split()) for k in range(GRID_COLUMNS)] if names else []
        more = () if self.meter is None else (RestoredPictures.of(self.meter, GRID_COLUMNS),)
        page = report.write_report(self.results.out, rows, images, heads, self.missing_note(len(rows)), *more)
        write_configs(self.results.out, rows)
        if show:
            report.print_report(rows, page)
        return rows
