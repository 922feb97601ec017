"""Successive halving: few seeds for all candidates, more for those that are left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..compare.variants import Variant
from ..metrics.paired_loss import PairedLoss
from .bench import Bench, key_of
from .candidates import Space, suits
from .goal import Goal
from .ladders import climb, ladders

__all__ = ["Entry", "Search", "undominated"]

RISK = 0.05  # of a rejection that more seeds would have reversed
LEFT = ((1 / 3, 4), (1 / 2, 3))  # share and least number of the candidates that stay after the first two rungs
EXPANDED = 2  # candidates that get additions
SLACK = 1.7  # how much an addition may still gain
RESERVES = 4  # slower candidates that are measured where all others failed their certificate
RESERVE = 2  # of candidates within the time that differ in their steps alone
SPARE = 2  # good candidates that make a slower one needless while additions are to come
UNKNOWN = 2.0  # how much faster a candidate may be than predicted before it was timed


@dataclass(frozen=True)
class Entry:
    """A candidate that was measured.

    Args:
        variant: How it samples.
        loss: Its loss against the plain model.
        relative: Its time over the plain model's.
        seconds: Of an image.
        nfe: Evaluations of an image.
        timed: Whether the time was measured in turns, and not predicted from the evaluations.
    """

    variant: Variant
    loss: PairedLoss
    relative: float
    seconds: float
    nfe: float
    timed: bool = False

    @property
    def name(self) -> str:
        """Of the candidate."""
        return self.variant.name


@dataclass
class Search:
    """A search.

    Args:
        bench: Measures.
        space: The candidates.
        goal: The bound.
        rungs: Seeds of each rung, increasing.
        report: Receives a line for every rejection.
        allowed: Why a candidate is not wanted; None where it is.
        fresh: Seeds of a certificate.
        risk: Of a certificate.
    """

    bench: Bench
    space: Space
    goal: Goal
    rungs: tuple[int, ...]
    report: Callable[[str], None]
    allowed: Callable[[Variant], str | None] = lambda variant: None
    fresh: int = 64
    risk: float = 0.05
    rejected: dict[str, str] = field(default_factory=dict)  # reasons by name
    slower: list[Variant] = field(default_factory=list)  # rejected for nothing but being slower than a good one
    parts: list[tuple[int, int]] = field(default_factory=list)  # seeds of the rounds so far, (first, count)
    measured: dict[str, Entry] = field(default_factory=dict)  # the last figures of every candidate, by key
    leader: Variant | None = None  # the best candidate so far that keeps the bound, as measured

    def reject(self, variant: Variant, reason: str) -> None:
        """Record why a candidate is out, and say it (once)."""
        self.rejected[variant.name] = reason
        self.report(f"rejected {variant.name}: {reason}")

    def entry(self, variant: Variant, parts: Sequence[tuple[int, int]]) -> Entry:
        """The figures of a candidate on these seeds."""
        bench = self.bench
        loss = bench.loss(variant, parts)
        times = bench.relative(variant), bench.seconds(variant)
        entry = Entry(variant, loss, *times, bench.nfe(variant), bench.has_time(variant))
        self.measured[key_of(variant)] = entry
        return entry

    def run(self) -> list[Entry]:
        """Search; the candidates that are left, in the order in which they should be tried."""
        pool = [v for v in self.space.first if self.is_allowed(v)]
        left: list[Entry] = []
        parts = self.parts
        for level, count in enumerate(self.rungs):
            first = parts[-1][0] + parts[-1][1] if parts else 0
            parts.append((first, count - first))
            self.bench.progress.expect(self.expected(pool, level))
            left = self.rung(pool, parts, level)
            if not any(map(self.keeps, left)) and self.goal.kind != "seconds":
                left = sorted([*left, *self.reserves(stop=self.keeps)], key=self.rank)
            self.leader = left[0].variant if left and self.keeps(left[0]) else self.leader
            more = self.expansions(left, level) if level + 1 < len(self.rungs) else []
            if not more and self.is_settled(left):
                break
            pool = [*(entry.variant for entry in left), *more]
        return left

    def keeps(self, entry: Entry) -> bool:
        """Whether a candidate keeps the bound as measured, by so much that it could be certified."""
        if self.goal.kind == "seconds":
            return True
        return entry.loss.value + self.margin(entry.loss) <= self.goal.limit

    def margin(self, loss: PairedLoss, fresh: int | None = None) -> float:
        """By how much the bound of a certificate will be above the loss, about; of so many fresh seeds."""
        fresh = fresh or self.fresh
        expected = loss.on(fresh)
        return expected.upper(self.risk, others=fresh) - expected.value

    def seeds_to_show(self) -> str | None:
        """Which candidate may keep the goal with how many seeds, where none did with those of this search."""
        found = []
        for entry in self.measured.values():
            if entry.variant != self.bench.plain and entry.loss.value <= self.goal.limit and entry.relative < 1:
                fresh = (self.fresh << k for k in range(1, 8))
                enough = (n for n in fresh if entry.loss.value + self.margin(entry.loss, n) <= self.goal.limit)
                if (number := next(enough, None)) is not None:
                    found.append((number, entry.relative, entry.name))
        return f"{min(found)[2]} might with --n {min(found)[0]}" if found else None

    def is_decided(self, entry: Entry) -> bool:
        """Whether a candidate will most likely get its certificate, so that it needs no more seeds before."""
        loss = entry.loss
        return self.goal.kind != "seconds" and loss.upper(RISK) + self.margin(loss) <= self.goal.limit

    def is_settled(self, left: Sequence[Entry]) -> bool:
        """Whether more seeds would not change which candidate is tried first."""
        if not left or self.goal.kind == "seconds":
            return not left
        return self.keeps(left[0]) and all(entry.relative >= left[0].relative for entry in left)

    def is_allowed(self, variant: Variant) -> bool:
        """Whether a candidate is wanted; rejected where not."""
        if (reason := self.allowed(variant)) is not None:
            self.reject(variant, reason)
        return reason is None

    def rung(self, pool: Sequence[Variant], parts: Sequence[tuple[int, int]], level: int) -> list[Entry]:
        """Measure candidates from the cheapest on, and drop what cannot be the answer."""
        self.bench.progress.describe(f"round {level + 1} of {len(self.rungs)}, {sum(parts[-1])} seeds")
        entries: list[Entry] = []
        if level == 0:
            for ladder in ladders(pool, self.bench.relative):
                self.climb_ladder(ladder, entries, parts)
        else:
            for variant in sorted(pool, key=self.bench.relative):
                self.try_candidate(variant, entries, parts, level)
        timed = [e.variant for e in entries if not self.bench.knows_time(e.variant)]
        if timed:
            # what is left is timed in the same turns: a prediction and a time of another minute do not compare
            timed = timed if level == 0 else [e.variant for e in entries]
            batch, turns = self.bench.timing
            each = sum(map(self.bench.declared_nfe, (self.bench.plain, *timed)))
            later = self.expected([e.variant for e in entries], level + 1)
            self.bench.progress.expect((turns + 1) * batch * each + later)
            self.bench.time(timed, f"round {level + 1}")
        return self.best([self.with_times(e) for e in entries], level)

    def with_times(self, entry: Entry) -> Entry:
        """The figures of a candidate with its present times."""
        v, bench = entry.variant, self.bench
        entry = replace(entry, relative=bench.relative(v), seconds=bench.seconds(v), timed=bench.has_time(v))
        self.measured[key_of(v)] = entry
        return entry

    def climb_ladder(self, ladder: Sequence[Variant], entries: list[Entry], parts: Sequence[tuple[int, int]]) -> None:
        """Measure what is needed of candidates that differ in their steps alone: for a bound of the loss the fewest
        steps that keep it, for a bound of the time the most steps within it; entries are added."""
        rest, bench = [], self.bench
        good = sorted(e.relative for e in entries if self.keeps(e) and bench.knows_time(e.variant))
        wanted = SPARE if self.space.additions else 1
        limit = good[wanted - 1] if len(good) >= wanted and self.goal.kind != "seconds" else math.inf
        for variant in ladder:
            if bench.relative(variant) >= limit * (1 if bench.knows_time(variant) else UNKNOWN):
                self.skip(variant, "not measured: others are as fast, and good enough on few seeds", True)
            elif (line := self.too_slow(variant, entries, 0)) is None:
                rest.append(variant)
            else:
                self.reject(variant, line)

        def passes(variant: Variant) -> bool | None:
            entry = self.try_candidate(variant, entries, parts, 0)
            return None if entry is None else self.keeps(entry)

        if self.goal.kind == "seconds":
            within = [v for v in rest if self.bench.seconds(v) <= self.goal.seconds]
            for variant in within[:-RESERVE]:
                name = within[-1].name
                self.reject(variant, f"not measured: it has fewer steps than {name}, which is within the time")
            for variant in [*within[-RESERVE:], *rest[len(within) :]]:
                passes(variant)
        else:
            climb(rest, passes, self.skip, max(wanted - 1 - len(good), 0), beaten=math.isfinite(limit))

    def skip(self, variant: Variant, reason: str, slower: bool) -> None:
        """Reject a candidate that was not measured."""
        self.slower += [variant] if slower else []
        self.reject(variant, reason)

    def reserves(self, stop: Callable[[Entry], bool] = lambda entry: False) -> Iterator[Entry]:
        """What was rejected as slower than a good candidate, measured now that this one was not good enough: first
        those that differ from it in their steps alone.

        Args:
            stop: Whether no more are wanted after this one.
        """
        ladder = None if self.leader is None else replace(self.leader, name="", steps=0)

        def order(variant: Variant) -> tuple[Any, ...]:
            return replace(variant, name="", steps=0) != ladder, self.bench.relative(variant)

        for variant in sorted({v.name: v for v in self.slower}.values(), key=order)[:RESERVES]:
            self.slower = [other for other in self.slower if other.name != variant.name]
            self.rejected.pop(variant.name, None)
            self.report(f"{variant.name} is measured after all")
            entries: list[Entry] = []
            self.try_candidate(variant, entries, self.parts, len(self.rungs))
            yield from entries
            if entries and stop(entries[0]):
                return

    def try_candidate(
        self, variant: Variant, entries: list[Entry], parts: Sequence[tuple[int, int]], level: int
    ) -> Entry | None:
        """Measure a candidate and add it to the entries; rejected where it cannot be the answer. None where it failed
        or was too slow to be measured."""
        if (line := self.too_slow(variant, entries, level)) is not None:
            self.reject(variant, line)
            return None
        before = self.measured.get(key_of(variant))
        if before is not None and self.is_decided(before):
            entries.append(self.with_times(before))
            return entries[-1]
        failed = next(filter(None, (self.bench.failure(variant, *part) for part in parts)), None)
        if failed:
            self.reject(variant, f"failed: {failed}")
            return None
        entry = self.entry(variant, parts)
        least = entry.loss.lower(RISK)
        if self.goal.kind != "seconds" and least + self.margin(entry.loss) > self.goal.limit:
            allowed = self.bench.figure.bound(self.goal.limit)
            more = "" if least > self.goal.limit else f", which {self.fresh} fresh seeds would not show"
            self.reject(variant, f"{self.show(entry)} on {entry.loss.count} seeds; allowed is {allowed}{more}")
        else:
            entries.append(entry)
        return entry

    def too_slow(self, variant: Variant, entries: Sequence[Entry], level: int) -> str | None:
        """Why a candidate cannot be the answer whatever it loses: another one is good enough and faster, or the time
        is over. Times are compared where they are known: timed, or of the same network by its evaluations."""
        bench, goal = self.bench, self.goal
        own = bench.relative(variant)
        slack = SLACK if level + 1 < len(self.rungs) and self.may_gain(variant) else 1.0
        slack *= 1.0 if bench.knows_time(variant) else UNKNOWN
        about = f"about {format_seconds(own * bench.plain_seconds)} an image"
        if own * bench.plain_seconds > slack * goal.seconds * (1.0 if bench.has_time(variant) else 1.1):
            return f"{about}, over {format_seconds(goal.seconds)}"
        if goal.kind == "seconds":
            return None
        good = [entry for entry in entries if entry.loss.upper(RISK) <= goal.limit and bench.knows_time(entry.variant)]
        good = sorted((entry for entry in good if entry.variant != variant), key=lambda entry: entry.relative)
        spare = SPARE if self.space.additions and level + 1 < len(self.rungs) else 1
        if len(good) < spare or own <= slack * max(good[spare - 1].relative, 1e-9):
            return None
        self.slower.append(variant)
        names = " and ".join(f"{entry.name} ({bench.figure.show(entry.loss.value)})" for entry in good[:spare])
        return f"{about}, slower than {names}, good enough"

    def may_gain(self, variant: Variant) -> bool:
        """Whether an addition could still make a candidate faster."""
        return any(suits(variant, kind, self.bench.plain) for kind, _ in self.space.additions)

    def best(self, entries: Sequence[Entry], level: int) -> list[Entry]:
        """The candidates that stay, best first."""
        ranked = sorted(entries, key=self.rank)
        for place, entry in enumerate(ranked):
            others = ranked[:place]
            if (line := self.too_slow(entry.variant, others, level)) is not None:
                self.reject(entry.variant, line)
        ranked = [entry for entry in ranked if entry.name not in self.rejected]
        if level >= len(LEFT):
            return ranked
        share, least = LEFT[level]
        number = max(math.ceil(share * len(ranked)), least)
        # few seeds do not say that a faster one does not keep the bound: those that may stay beside the first ones
        faster = [e for e in ranked if not self.keeps(e) and e.relative < ranked[0].relative][: 2 * number]
        for entry in ranked[number:]:
            if entry not in faster:
                self.slower += [entry.variant] if self.keeps(entry) else []
                self.reject(entry.variant, f"{self.show(entry)}: {number} others are more promising")
        return [entry for entry in ranked if entry.name not in self.rejected]

    def rank(self, entry: Entry) -> tuple[Any, ...]:
        """Sorts by time those that keep the bound, then by loss; for a bound of time the other way round."""
        if self.goal.kind == "seconds":
            over = entry.seconds > self.goal.seconds
            return (1, entry.seconds) if over else (0, entry.loss.value)
        return (0, entry.relative) if self.keeps(entry) else (1, entry.loss.value)

    def expansions(self, left: Sequence[Entry], level: int) -> list[Variant]:
        """The best candidates with additions; after the first round with those that have shown themselves."""
        space, plain = self.space, self.bench.plain
        if level:
            kept = [one for entry in left for one in (*entry.variant.accelerators, *entry.variant.guides)]
            kept += [entry.variant.decoder for entry in left if entry.variant.decoder is not None]
            shown = [(kind, fields) for kind, fields in space.additions if addition_text(fields) in kept]
            space = replace(space, additions=tuple(shown))
        known = {*self.rejected, *(entry.name for entry in left)}
        made: dict[Any, Variant] = {}
        for entry in left[:EXPANDED]:
            more = [] if level else with_more_steps(entry.variant, plain)
            cached = [v for one in more for v in space.expanded(one, plain, ("cache",))]
            for variant in (*space.expanded(entry.variant, plain), *cached):
                if key_of(variant) not in self.measured and variant.name not in known and self.is_allowed(variant):
                    made.setdefault(variant.method, variant)
        return list(made.values())

    def expected(self, pool: Sequence[Variant], level: int) -> float:
        """Evaluations that these candidates will take from a round on, about."""
        plain, number, rest = self.bench.declared_nfe(self.bench.plain), len(pool), 0.0
        mean = sum(map(self.bench.declared_nfe, pool)) / max(number, 1)
        for later, count in enumerate(self.rungs[level:], level):
            before = self.rungs[later - 1] if later else 0
            rest += (count - before) * (plain + (number / 2 if later == 0 else number) * mean)  # ladders skip half
            share, least = LEFT[min(later, len(LEFT) - 1)]
            number = min(number, max(math.ceil(share * number), least))
        return rest

    def show(self, entry: Entry) -> str:
        """Time and loss in words."""
        return f"{format_seconds(entry.seconds)} an image, {self.bench.figure.show(entry.loss.value)}"


def with_more_steps(variant: Variant, plain: Variant) -> list[Variant]:
    """A candidate with one and a half times and twice its steps, for a cache that makes each of them cheaper."""
    if variant.plan is not None or not variant.steps or variant.model is not None or variant.lora is not None:
        return []
    counts = {math.ceil(factor * variant.steps) for factor in (1.5, 2)}
    made = []
    for steps in sorted(count for count in counts if count <= plain.steps):
        name = f"{variant.sampler}, {variant.times} times, {steps} steps"
        made.append(replace(variant, name=name, steps=steps))
    return made


def addition_text(fields: dict[str, Any]) -> str:
    """What an addition adds."""
    value = next(iter(fields.values()))
    return str(value[0] if isinstance(value, tuple) else value)


def undominated(entries: Sequence[Entry]) -> list[Entry]:
    """Those of which no other is faster and loses no more, fastest first."""
    front: list[Entry] = []
    for entry in sorted(entries, key=lambda e: (e.relative, e.loss.value)):
        if not front or entry.loss.value < front[-1].loss.value:
            front.append(entry)
    return front


def format_seconds(seconds: float) -> str:
    """Seconds or milliseconds."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
