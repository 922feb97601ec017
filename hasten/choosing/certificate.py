"""The certificate of a choice: a bound of its loss on seeds that the search has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from ..metrics.paired_loss import PairedLoss
from .bench import Bench
from .config import LEAST_SEEDS
from .goal import Goal
from .search import Entry, Search

__all__ = ["Certificate", "certify", "looks_of", "risk_of_try", "risks_of_looks"]

TRIES = 4
EARLY = 0.25  # share of the risk of a try that is for what is certified before all its seeds were sampled


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


def looks_of(count: int, least: int) -> tuple[int, ...]:
    """After how many seeds a try may end: a quarter, half, and all of them.

    Args:
        count: Seeds of a try.
        least: Fewest seeds before the bound is looked at.
    """
    early = {max(count // part, least, LEAST_SEEDS) for part in (4, 2)}
    return (*sorted(n for n in early if n <= 0.75 * count), count)


def risks_of_looks(risk: float, number: int) -> tuple[float, ...]:
    """The risk of each look at the bound of one try: they add up to that of the try, most of it for the last one.

    A try ends with the first bound that is within the goal. The probability that any of the bounds is wrong is at most
    the sum of their risks, so it does not matter which of them ends it.

    Args:
        risk: Of the try.
        number: Of looks.

    References:
        Jennison, Turnbull 1999, "Group sequential methods with applications to clinical trials".
    """
    early = EARLY * risk if number > 1 else 0.0
    return (*[early / max(number - 1, 1)] * (number - 1), risk - early)


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
    looks = (count,) if goal.kind == "seconds" else looks_of(count, 4 * bench.figure.least)
    for place, entry in enumerate(chain(entries, search.reserves())):
        attempt = len(tries) + 1
        if attempt > TRIES:
            search.reject(entry.variant, f"{TRIES} candidates were tried before it")
            continue
        risk = risk_of_try(confidence, attempt)
        expected = entry.loss.on(count).upper(risks_of_looks(risk, len(looks))[-1], others=count)
        if expected > goal.limit and goal.kind != "seconds":
            bound = bench.figure.bound(expected)
            search.reject(entry.variant, f"{search.show(entry)}; the bound of {count} fresh seeds would be {bound}")
            continue
        bench.progress.describe(f"certificate, {count} fresh seeds")
        bench.progress.expect(count * (bench.declared_nfe(bench.plain) + entry.nfe))
        certificate = sequential(search, entry, (first + (attempt - 1) * count, looks), risk, attempt)
        if certificate is None:
            continue
        tries.append(certificate)
        if certificate.holds:
            why = "loses less" if goal.kind == "seconds" else "is faster"
            for other in entries[place + 1 :]:
                reason = f"{entry.name} {why}, and has its certificate"
                if goal.kind != "seconds" and not search.keeps(other):
                    reason = f"allowed is {bench.figure.bound(goal.limit)}"
                search.reject(other.variant, f"{search.show(other)}; {reason}")
            return entry, tries
        used = certificate.seeds[1] - certificate.seeds[0] + 1
        search.reject(entry.variant, f"on {used} fresh seeds no better than {bench.figure.bound(certificate.bound)}")
    return None, tries


def sequential(
    search: Search, entry: Entry, fresh: tuple[int, Sequence[int]], risk: float, attempt: int
) -> Certificate | None:
    """The certificate of a candidate from as few fresh seeds as show that it keeps the goal, or does not.

    Args:
        search: Which the candidate is of.
        entry: The candidate.
        fresh: The first seed, and after how many the bound is looked at.
        risk: Of all looks together.
        attempt: Which try it is, from 1.

    Returns:
        The certificate; None where the candidate failed on a seed, and was rejected.
    """
    bench, goal, (first, looks) = search.bench, search.goal, fresh
    parts: list[tuple[int, int]] = []
    certificate = None
    for number, (count, own) in enumerate(zip(looks, risks_of_looks(risk, len(looks)), strict=True), 1):
        start = first + sum(size for _, size in parts)
        parts.append((start, first + count - start))
        if failed := bench.failure(entry.variant, *parts[-1]):
            search.reject(entry.variant, f"failed: {failed}")
            return None
        loss: PairedLoss = bench.loss(entry.variant, parts)
        note = f"try {attempt}, look {number} of {len(looks)}, risk {own:.3g} of {risk:.3g}"
        certificate = certificate_of(bench, goal, entry, loss, (first, count, looks[-1]), (own, risk, attempt, note))
        if certificate.holds or (goal.kind != "seconds" and loss.lower(own) > goal.limit):
            break
    return certificate


def certificate_of(
    bench: Bench, goal: Goal, entry: Entry, loss: PairedLoss, seeds: tuple[int, int, int],
    risks: tuple[float, float, int, str],
) -> Certificate:  # fmt: skip
    """The certificate of one candidate.

    Args:
        bench: Has measured it.
        goal: Its bound.
        entry: The candidate.
        loss: On the fresh seeds.
        seeds: The first fresh seed, their number, and how many others the promise is of.
        risks: Of this look, of the try, the number of the try, and a note.
    """
    (first, count, others), (own, risk, attempt, note), figure = seeds, risks, bench.figure
    bound, first = loss.upper(own, others=others), bench.seed + first
    text = (
        f"{figure.bound(bound)}, with {1 - risk:.1%} confidence on other {others} seeds "
        f"({figure.show(loss.value)} on seeds {first} to {first + count - 1}, which the search has not used)"
    )
    method = (
        f"Student's t on paired differences, {loss.degrees} degrees of freedom, for the mean of {others} other seeds; "
        f"{note}"
    )
    return Certificate(
        entry.name, bound <= goal.limit, text, bound, loss.upper(own), loss.value, goal.limit, 1 - risk, attempt,
        (first, first + count - 1), figure.name, method, loss.degrees,
    )  # fmt: skip
