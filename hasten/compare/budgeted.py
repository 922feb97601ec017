"""A comparison within a time budget: the number of images per row is chosen by the measured speed.

Every row first gets `MINIMUM_IMAGES` images; then rounds follow, in which each row in turn samples its next batch while
time allows. All rows have the images of the same seeds, and the seconds of the rounds are the timing.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..files import write_file
from ..metrics import extract, without_neighbours
from ..metrics.frechet import frechet_distance, moments
from ..performance import cost
from ..progress import ProgressReporter
from ..storage.batches import SavedBatches
from ..storage.provenance import utc_now
from ..utils.devices import synchronize
from ..workflows.distribute import part_of
from ..workflows.prompt_figures import IMAGES_PER_PROMPT
from . import budget as timer
from . import jobs as tools
from .budget import RowState, TimeBudget, real_data_baseline
from .comparison import Comparison, Timing
from .counting import count_evaluations, start_nfe
from .jobs import Job, sample_images
from .parts import time_parts
from .results import QUALITY

MINIMUM_IMAGES = 64  # below, a Fréchet distance says little
MARGIN = 1.1  # factor on predicted seconds
REPORT = 3.0  # seconds of the report before it was measured


@dataclass
class BudgetedComparison(Comparison):
    """A comparison that chooses its number of images per row, and skips the last rows where time is too short.

    Args:
        budget: The time that it may take.
        create_jobs: The rows with their keys for a protocol, in which the number of images is set.
    """

    budget: TimeBudget = field(default_factory=lambda: TimeBudget(60.0))
    create_jobs: Callable[[Mapping[str, Any]], list[Job]] = lambda protocol: []

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = self.protocol["n"]
        self.batch = min(self.protocol["timing_batch"], limit)
        self.limit = limit - limit % self.batch
        self.minimum = math.ceil(min(MINIMUM_IMAGES, self.limit) / self.batch)  # batches of the first pass
        self.protocol = {**self.protocol, "timing_batch": self.batch, "minutes": self.budget.minutes}
        self.set_images(self.limit)
        self.states = [RowState(index, job) for index, job in enumerate(self.jobs)]
        self.skipped: list[str] = []
        self.baselines: dict[int, dict[str, float]] = {}
        self.evaluation_seconds = 0.0  # of a row, once it was measured
        self.report_seconds = REPORT
        self.parts: dict[str, dict[str, float]] = {}  # seconds of text encoder and decoder, by row
        self.progress = ProgressReporter(0, True)

    def set_images(self, n: int, suffix: str = "") -> None:
        """Set the number of images per row, on which keys of rows depend; `suffix` marks unfinished rows."""
        first = self.protocol["seeds"][0]
        self.protocol = {**self.protocol, "n": n, "seeds": [first, first + n - 1]}
        self.jobs = [replace(job, key=job.key + suffix) for job in self.create_jobs(self.protocol)]

    @property
    def rows(self) -> list[RowState]:
        """The rows that have their first images."""
        return [state for state in self.states if state.batches]

    @property
    def images_per_row(self) -> int:
        """Images that each of `rows` has."""
        return min((state.batches for state in self.rows), default=0) * self.batch

    def room(self, rows: int) -> float:
        """Seconds left for sampling, if `rows` rows are evaluated afterwards and the report is written."""
        return self.budget.remaining - rows * self.evaluation_seconds - self.report_seconds

    # ---- phases ----

    def run(self) -> None:
        """Sample within the budget, evaluate, and store the rows."""
        p, record = self.protocol, self.load_record()
        size = f"{self.budget.minutes:g} minutes"
        self.progress.say(f"{p['model']}: {len(self.jobs)} rows within {size}, {p['dtype']}, {p['hardware']}")
        if record.get("n") and record["minutes"] >= self.budget.minutes:
            self.set_images(record["n"])
            if all(self.is_finished(job) for job in self.jobs):
                done = f"{len(self.jobs)} of {len(self.jobs)} rows of {record['n']} images are finished"
                self.progress.say(f"{done} in {self.out} and are reused")
                return
        for state in self.states:
            stored = record.get("rows", {}).get(state.job.key, {})
            saved, numbers = self.saved(state.job), range(stored.get("batches", 0))
            if stored and all(saved.get(k * self.batch, self.batch) is not None for k in numbers):
                vars(state).update(stored)
        self.first_pass()
        self.catch_up()
        self.timing_rounds()
        self.finish()

    def order(self) -> list[int]:
        """The rows in the order of the first pass: a cheap variant, the reference, then the order of the set."""
        cheap = [state for state in self.states[1:] if 8 * state.job.nfe <= self.states[0].job.nfe]
        first = cheap[0] if cheap else min(self.states, key=lambda state: state.job.nfe)
        return list(dict.fromkeys([first.index, *range(len(self.states))]))

    def first_pass(self) -> None:
        """Sample the first images of every row that fits into the budget, and show their distance."""
        self.set_images(self.minimum * self.batch, "-first")
        if self.rows:
            reused = f"{len(self.rows)} of {len(self.jobs)} rows have their first images in {self.out}"
            self.progress.say(f"{reused}, which are reused")
        pending = [self.states[k] for k in self.order() if not self.states[k].batches]
        count, measured = 0, False
        while queue := self.affordable(pending):
            state, count = queue[0], count + 1
            pending = [other for other in pending if other is not state]
            try:
                self.first_images(state)
            except Exception as error:
                self.record_failure(state.job, error)
                self.progress.say(f"{state.job.variant.name}: failed: {self.failures[state.job.key]}")
                continue
            baseline = self.put_first_rows()
            row = self.results.rows[self.jobs[state.index].key]
            number = f"[{count}/{count + len(pending)}]"
            real = "" if baseline is None else f" (real images {baseline:.3g})"
            self.progress.say(f"{number} {row['name']}: {tools.summary(row)}{real}, {self.protocol['n']} images")
            if not measured:
                measured = True
                self.measure_overhead(state)
            self.save_record()
        self.skipped = [state.job.variant.name for state in sorted(pending, key=lambda state: state.index)]
        if self.skipped:
            names = ", ".join(self.skipped)
            self.progress.say(f"skipped, for {self.budget.minutes:g} minutes are too few for all rows: {names}")

    def affordable(self, pending: list[RowState]) -> list[RowState]:
        """The rows of `pending` whose first images fit into the time at the speed of now, without the last rows of the
        set; where not even the reference fits, rows get fewer images.

        Raises:
            BadInput: if not even one batch of the reference fits.
        """
        sampled = [state for state in self.rows if state.first][-3:]
        if not pending or not sampled:
            return pending
        seconds = sum(state.first for state in sampled) / sum(state.nfe for state in sampled) * MARGIN  # a batch, NFE 1
        rows = sorted(pending, key=lambda state: state.index)
        while rows and self.minimum * seconds * sum(s.job.nfe for s in rows) > self.room(len(self.rows) + len(rows)):
            if rows[-1].index == 0:
                self.reduce_minimum(rows[0], seconds)
                break
            rows.pop()
        return [state for state in pending if any(state is row for row in rows)]

    def reduce_minimum(self, reference: RowState, seconds: float) -> None:
        """Give rows fewer first images, so that those of the reference fit. seconds: of a batch at one evaluation."""
        batches = int(self.room(len(self.rows) + 1) / (seconds * reference.job.nfe))
        if batches * self.batch < 10:
            spent = self.budget.seconds - self.room(len(self.rows) + 1)
            minutes = 2 * (spent + self.minimum * seconds * reference.job.nfe) / 60
            raise BadInput(
                f"{self.budget.minutes:g} minutes are too few for 10 images of the reference "
                f"{reference.job.variant.name!r}: give about {minutes:.2g} minutes or more"
            )
        self.minimum = batches
        for state in self.rows:
            state.batches = min(state.batches, batches)
        self.results.remove([job.key for job in self.jobs])
        self.set_images(batches * self.batch, "-first")
        self.progress.say(f"only {batches * self.batch} images a row fit into {self.budget.minutes:g} minutes")

    def first_images(self, state: RowState) -> None:
        """Sample, count and time the first images of a row, and measure their distance."""
        job = state.job
        with count_evaluations(job.model) as count, cost.peak_memory(self.model.device) as memory:
            seconds = [self.timed(job, 0)]  # which warms up
        state.nfe = count[0] / self.batch + start_nfe(job.model, job.variant)
        state.peak = memory.peak
        seconds += [self.timed(job, number) for number in range(1, self.minimum)]
        state.first = statistics.median(seconds[1:] or seconds)
        images = self.images(job, self.protocol["n"])
        if self.net is not None and self.reference is not None:
            features, _ = extract(self.net, images)
            state.distance = frechet_distance(*moments(features), self.reference.mean, self.reference.covariance)
        self.store_images(self.jobs[state.index], images, 0)
        state.batches = self.minimum

    def put_first_rows(self) -> float | None:
        """Store the rows of the first images, of which only the distance is known, for a report of an interrupted run;
        `finish` replaces them. Returns the distance of as many real images."""
        baseline = self.baseline(self.protocol["n"])
        timing = {self.jobs[s.index].key: {"nfe": s.nfe, "seconds": [s.first]} for s in self.rows}
        protocol = {**self.protocol, "rounds": 1, "floors": dict(baseline), "date": utc_now()}
        rows = []
        for state in self.rows:
            job = self.jobs[state.index]
            costs = self.costs(job.key, timing) if self.jobs[0].key in timing else dict.fromkeys(tools.COSTS)
            costs |= {"nfe": state.nfe, "seconds_per_image": state.first / self.batch, "macs_per_image": None}
            quality = {**dict.fromkeys(QUALITY), "frechet": state.distance}
            fields = {**tools.method_fields(job), **costs, "peak_memory": state.peak, **quality}
            rows.append({**fields, "protocol": protocol})
        self.results.put(*rows)
        return baseline.get("frechet")

    def measure_overhead(self, state: RowState) -> None:
        """Time the evaluation of a row and the report, for which time is reserved."""
        start = timer.monotonic_seconds()
        self.measure_quality(self.images(state.job, self.protocol["n"]), 0)
        tools.row_macs(state.job, state.nfe)
        evaluated = timer.monotonic_seconds()
        self.write_report(False)
        self.evaluation_seconds, self.report_seconds = evaluated - start, 1.3 * (timer.monotonic_seconds() - evaluated)

    def catch_up(self) -> None:
        """Sample as many images of rows that an earlier run skipped as the others have, while time allows."""
        rows = self.rows
        target = max(state.batches for state in rows)
        for state in rows:
            while state.batches < target and MARGIN * state.latest <= self.room(len(rows)):
                self.timed(state.job, state.batches)
                state.batches += 1

    def timing_rounds(self) -> None:
        """Sample a batch of every row in turns, again and again, while all of them fit into the time."""
        rows, shown = self.rows, timer.monotonic_seconds()
        while self.images_per_row < self.limit:
            if MARGIN * sum(state.latest for state in rows) > self.room(len(rows)):
                return
            seconds = {}
            for state in rows if len(rows[0].seconds) % 2 == 0 else rows[::-1]:
                if state.latest > self.room(len(rows)):  # slower than before: what counts are the images of all rows
                    return
                seconds[state.index] = self.timed(state.job, state.batches)
                state.batches += 1
            for state in rows:
                state.seconds.append(seconds[state.index])
            if timer.monotonic_seconds() - shown > 10:
                shown = timer.monotonic_seconds()
                self.progress.say(f"{self.images_per_row} images a row, {max(self.budget.remaining, 0):.0f} s left")
            self.save_record()

    def finish(self) -> None:
        """Evaluate the rows on the images that all of them have, and store them."""
        n, rows, first_keys = self.images_per_row, self.rows, [job.key for job in self.jobs]
        rounds = min(len(state.seconds) for state in rows)
        self.protocol = {**self.protocol, "rounds": max(rounds, 1)}
        self.set_images(n)
        baseline = self.baseline(n)
        if self.reference is not None:
            floors = {key: {**self.reference.floor.get(key, {}), n: value} for key, value in baseline.items()}
            self.reference = replace(self.reference, floor={**self.reference.floor, **floors})
        real = f"; {n} real images have a distance of {baseline['frechet']:.3g}" if "frechet" in baseline else ""
        self.progress.say(f"{n} images a row, timed in {max(rounds, 1)} round{'s' * (rounds > 1)}{real}")
        if self.reference is not None and (line := without_neighbours(n, self.reference)):
            self.progress.say(line)
        timing: Timing = {}
        for state in rows:
            seconds = state.seconds if rounds else [state.first]
            parts = self.parts.get(state.job.variant.name, {})
            timing[self.jobs[state.index].key] = {"nfe": state.nfe, "seconds": seconds, "parts": parts}
        self.results.put_timing(self.timing_settings, timing)
        for state in rows:
            job = self.jobs[state.index]
            try:
                figures = self.evaluate_images(job, self.images(state.job, n), 0)
                assert figures is not None
                self.results.put(self.finished_row(job, timing, [figures], state.peak))
            except Exception as error:
                self.record_failure(state.job, error)
        for state in self.states:
            if state.job.key in self.failures:
                protocol = {**self.protocol, "date": utc_now()}
                self.results.put(tools.failed_row(self.jobs[state.index], self.failures[state.job.key], protocol))
        self.results.remove(first_keys)
        self.save_record(n)
        if all(self.is_finished(job) for job in self.jobs):
            for state in self.states:
                self.saved(state.job).clear()

    def measure_diversity(self, job: Job, images: Tensor, block: int) -> dict[str, Any]:
        """The diversity of a row, where its images hold enough of each prompt: nothing is sampled for it."""
        enough = isinstance(self.label, list) and len(images) >= IMAGES_PER_PROMPT * len(self.label)
        return super().measure_diversity(job, images, block) if enough else {}

    def missing_note(self, finished: int) -> str:
        """A line on the rows that are missing in the report, and on those that were skipped."""
        note = super().missing_note(finished)
        if note and self.skipped:
            note += f" Skipped within {self.budget.minutes:g} minutes: {', '.join(self.skipped)}."
        return note

    def baseline(self, n: int) -> dict[str, float]:
        """`real_data_baseline` at n images, computed once."""
        if n not in self.baselines:
            self.baselines[n] = real_data_baseline(self.reference, n)
        return self.baselines[n]

    # ---- batches ----

    def saved(self, job: Job) -> SavedBatches:
        """The batches of a row on disk; `job` has the key of the maximum number of images."""
        versions = {key: self.protocol[key] for key in ("hasten", "torch", "timing_batch")}
        return SavedBatches(self.out / "samples" / "kept", {"key": job.key, **versions})

    def sample_batch(self, job: Job, number: int) -> Tensor:
        """Batch `number` of a row: its image k has the same seed and class as image k of `Comparison.sample`."""
        first = number * self.batch
        label = part_of(job.model, self.limit, self.label, slice(first, first + self.batch))
        seed = self.protocol["seeds"][0] + first
        return sample_images(job.model, job.variant, self.batch, seed, self.batch, self.protocol["dtype"], label)

    def timed(self, job: Job, number: int) -> float:
        """Sample a batch and save it; the seconds of the sampling alone."""
        synchronize(self.model.device)
        start = timer.monotonic_seconds()
        with time_parts(job.model, self.parts.setdefault(job.variant.name, {})):
            images = self.sample_batch(job, number)
        synchronize(self.model.device)
        seconds = timer.monotonic_seconds() - start
        self.saved(job).put(number * self.batch, images)
        return seconds

    def images(self, job: Job, n: int) -> Tensor:
        """The first n images of a row, from disk."""
        batches = []
        for number in range(n // self.batch):
            saved = self.saved(job).get(number * self.batch, self.batch)
            batches.append(self.sample_batch(job, number) if saved is None else saved)
        return torch.cat(batches)

    # ---- record ----

    def load_record(self) -> dict[str, Any]:
        """What `save_record` wrote for the same rows; empty without."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            record = json.loads((self.out / "budget.json").read_text())
            if record["reference"] == self.states[0].job.key:
                return record
        return {}

    def save_record(self, n: int | None = None) -> None:
        """Write what a second run needs to resume. n: images per row of a finished run."""
        names = ("batches", "nfe", "first", "peak", "distance")
        rows = {state.job.key: {name: getattr(state, name) for name in names} for state in self.rows}
        record = {"reference": self.states[0].job.key, "minutes": self.budget.minutes, "n": n, "rows": rows}
        write_file(self.out / "budget.json", json.dumps(record).encode())
