"""The certificate of a choice: a bound of its loss on seeds that the search has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from ..metrics.paired_loss import PairedLoss
from .bench import Bench
from .goal import Goal
from .search import Entry, Search

__all__ = ["Certificate", "certify", "risk_of_try"]

TRIES = 4


@dataclass(frozen=True)
class Certificate:
    """What is promised of a candidate.

    Args:
        name: Of the candidate.
        holds: Whether the bound is within the goal.
        text: The promise.
        bound: Which the loss keeps on as many other seeds, and on average over all seeds, with the confidence.
        mean_bound: Which the loss keeps on average over all seeds; it is tighter.
        loss: The estimate.
        limit: What the goal allows; infinite for a goal of time.
        confidence: Of this try alone; those of all tries together are the search's.
        attempt: Which try it was, from 1.
        seeds: First and last, of the fresh seeds.
        figure: What the loss is measured by.
        method: How the bound is computed.
    """

    name: str
    holds: bool
    text: str
    bound: float
    mean_bound: float
    loss: float
    limit: float
    confidence: float
    attempt: int
    seeds: tuple[int, int]
    figure: str
    method: str
    degrees: int = field(default=0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        values = {**asdict(self), "seeds": list(self.seeds)}
        return {key: value for key, value in values.items() if value != float("inf")}


def risk_of_try(confidence: float, attempt: int) -> float:
    """The risk of one try, `(1 - confidence) / (k (k + 1))` of the k-th: all of them add up to 1 - confidence.

    Whatever number of candidates is tried, the probability that any of their bounds is wrong is below 1 - confidence.
    """
    return (1 - confidence) / (attempt * (attempt + 1))


def certify(
    search: Search, entries: Sequence[Entry], confidence: float, first: int, count: int
) -> tuple[Entry | None, list[Certificate]]:
    """Try candidates on fresh seeds, the best first, until one keeps the goal.

    Args:
        search: Whose goal is to be kept; a candidate that does not is rejected.
        entries: The candidates, best first.
        confidence: Of the promise, in (0, 1).
        first: Number of the first fresh seed.
        count: Fresh seeds of each try.

    Returns:
        The first candidate that keeps the goal, None where none does; the certificates of all tries.
    """
    bench, goal = search.bench, search.goal
    tries: list[Certificate] = []
    for place, entry in enumerate(chain(entries, search.reserves(entries))):
        attempt = len(tries) + 1
        if attempt > TRIES:
            search.reject(entry.variant, f"{TRIES} candidates were tried before it")
            continue
        risk = risk_of_try(confidence, attempt)
        expected = entry.loss.on(count).upper(risk, again=True)
        if expected > goal.limit and goal.kind != "seconds":
            bound = bench.figure.bound(expected)
            search.reject(entry.variant, f"{search.show(entry)}; the bound of {count} fresh seeds would be {bound}")
            continue
        bench.progress.describe(f"certificate, {count} fresh seeds")
        bench.progress.expect(count * (bench.declared_nfe(bench.plain) + entry.nfe))
        part = (first + (attempt - 1) * count, count)
        if failed := bench.failure(entry.variant, *part):
            search.reject(entry.variant, f"failed: {failed}")
            continue
        certificate = certificate_of(bench, goal, entry, part, risk, attempt)
        tries.append(certificate)
        if certificate.holds:
            why = "loses less" if goal.kind == "seconds" else "is faster"
            for other in entries[place + 1 :]:
                search.reject(other.variant, f"{search.show(other)}; {entry.name} {why}, and has its certificate")
            return entry, tries
        search.reject(entry.variant, f"on {count} fresh seeds no better than {bench.figure.bound(certificate.bound)}")
    return None, tries


def certificate_of(
    bench: Bench, goal: Goal, entry: Entry, part: tuple[int, int], risk: float, attempt: int
) -> Certificate:
    """The certificate of one candidate on fresh seeds."""
    loss: PairedLoss = bench.loss(entry.variant, [part])
    bound, figure = loss.upper(risk, again=True), bench.figure
    seeds = bench.seed + part[0], bench.seed + sum(part) - 1
    text = (
        f"{figure.bound(bound)}, with {1 - risk:.1%} confidence on other {loss.count} seeds "
        f"({figure.show(loss.value)} on seeds {seeds[0]} to {seeds[1]}, which the search has not used)"
    )
    method = (
        f"Student's t on paired differences, {loss.degrees} degrees of freedom, for the mean of as many other seeds; "
        f"try {attempt}, risk {risk:.3g}"
    )
    return Certificate(
        entry.name, bound <= goal.limit, text, bound, loss.upper(risk), loss.value, goal.limit, 1 - risk, attempt,
        seeds, figure.name, method, loss.degrees,
    )  # fmt: skip
