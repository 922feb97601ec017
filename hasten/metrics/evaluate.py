"""All quality figures of a set of images, from one pass through one feature network."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import BadInput, NonFinite
from .features import extract, feature_net, net_name
from .frechet import frechet_distance, frechet_interval, moments
from .inception_score import class_accuracy, inception_score
from .kid import kid
from .measure import Measure, spell_seeds
from .precision_recall import manifold
from .references import Reference, make_reference
from .references import reference as load_reference

NEIGHBOURS = ("precision", "recall", "density", "coverage")
NEIGHBOURS_FROM = 200  # samples on either side: below, the balls around so few neighbours hold noise too
HIGHER = ("precision", "recall", "density", "coverage", "inception_score", "accuracy")


def evaluate_images(
    images: Tensor,
    labels: Tensor | None = None,
    features: str | nn.Module = "fashion",
    reference: str | Path | Reference = "fashion",
    seeds: Iterable[int] | str | None = None,
    bootstrap: int = 100,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> dict[str, Measure]:
    """Fréchet distance with interval, kernel distance, precision, recall, density, coverage; where the network
    classifies, inception score; where it knows the classes of the `labels` `(N,)` asked for, class accuracy.

    images: `(N, C, H, W)` in [-1, 1] or uint8, N >= 10. features: a network or its name (`feature_net`).
    reference: statistics, their bundled name or folder; they must come from the same network.
    seeds: the noise seeds, for the record. bootstrap: repeats of the interval, 0 for none.
    device: where a network that is given by name looks at them, batch by batch; None: where the images are.
    Keys: frechet, kid, precision, recall, density, coverage, inception_score, accuracy. Without the four of neighbours
    where fewer than 200 images are on either side (`without_neighbours` says so).
    """
    known = reference if isinstance(reference, Reference) else load_reference(reference)
    net = feature_net(features)
    if isinstance(features, str) and (device is not None or isinstance(images, Tensor)):
        net = net.to(images.device if device is None else device)
    _same_network(net_name(net), known)
    found, logits = extract(net, images, batch_size)
    return evaluate_features(found, known, logits, labels, seeds, bootstrap)


def evaluate_features(
    features: Tensor,
    reference: Reference,
    logits: Tensor | None = None,
    labels: Tensor | None = None,
    seeds: Iterable[int] | str | None = None,
    bootstrap: int = 100,
) -> dict[str, Measure]:
    """As `evaluate_images`, for features `(N, D)` and logits `(N, K)` that were extracted already."""
    n = len(features)
    if n < 10:
        raise BadInput(f"{n} images are too few to measure a distribution: give at least 10, better 2,000")
    bad = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise NonFinite(f"the {reference.features} features of {len(bad)} of {n} images hold NaN or infinity: "
                        f"numbers {', '.join(map(str, bad[:5]))}{', ...' if len(bad) > 5 else ''}")  # fmt: skip
    if features.shape[1] != len(reference.mean):
        raise BadInput(f"features of width {features.shape[1]} against a reference of width {len(reference.mean)}")
    spelled = spell_seeds(seeds)

    def measure(
        name: str, value: float, against: int, interval: tuple[float, float] | None = None, spread: float | None = None
    ) -> Measure:
        if not math.isfinite(value):
            raise NonFinite(f"{name} of {n} images is {value}, not a finite number")
        return Measure(
            name, value, reference.features, f"{reference.name} {reference.split}", n, against,
            reference.floor_at(name, n), spelled, interval, spread, "higher" if name in HIGHER else "lower",
        )  # fmt: skip

    interval = None
    if bootstrap:  # eigenvalues of a wide covariance cost seconds each
        repeats = bootstrap if features.shape[1] <= 512 else min(bootstrap, 10)
        interval = frechet_interval(features, reference.mean, reference.covariance, repeats)
    distance = frechet_distance(*moments(features), reference.mean, reference.covariance)
    out = {"frechet": measure("frechet", distance, reference.count, interval)}
    value, deviation = kid(features, reference.sample)
    out["kid"] = measure("kid", value, len(reference.sample), spread=deviation)
    equal = min(n, len(reference.sample))
    if equal >= NEIGHBOURS_FROM:
        shape = manifold(reference.sample[:equal], features[:equal])
        for name in NEIGHBOURS:
            out[name] = measure(name, getattr(shape, name), equal)
    if logits is not None:
        score, deviation = inception_score(logits, splits=min(10, n))
        out["inception_score"] = measure("inception_score", score, 0, spread=deviation)
        if labels is not None and reference.accuracy is not None:
            right, accuracy_interval = class_accuracy(logits, labels)
            out["accuracy"] = measure("accuracy", right, 0, accuracy_interval)
    return out


def without_neighbours(n: int, reference: Reference) -> str | None:
    """A line where precision, recall, density and coverage are left out for so few samples; None where they are not."""
    few = min(n, len(reference.sample))
    if few >= NEIGHBOURS_FROM:
        return None
    whose = "samples" if few == n else "reference images"
    return f"{few} {whose} are too few for {', '.join(NEIGHBOURS)} ({NEIGHBOURS_FROM} or more): they are left out"


def floor_table(
    features: Tensor, reference: Reference, counts: Iterable[int] = (1000, 2000, 5000, 10_000), most: int = 4
) -> dict[str, dict[int, float]]:
    """{metric: {n: value}} of real images that are not in the reference: the mean over up to `most` disjoint
    runs of n rows of `features` `(N, D)` (shuffle them first). Counts above N are left out."""
    table: dict[str, dict[int, float]] = {}
    for n in counts:
        runs = [slice(i, i + n) for i in range(0, min(len(features) - n + 1, most * n), n)]
        results = [evaluate_features(features[run], reference, bootstrap=0) for run in runs]
        for name in results[0] if results else ():
            table.setdefault(name, {})[n] = sum(r[name].value for r in results) / len(results)
    return table


def reference_from_images(
    images: Tensor, name: str, split: str, net: nn.Module, labels: Tensor | None = None, others: Tensor | None = None
) -> Reference:
    """Reference of a user's own `images`; with `others` (real images that are not among them) it has a floor."""
    features, logits = extract(net, images)
    made = make_reference(features, name, split, net_name(net), labels, logits)
    if others is None:
        return made
    return replace(made, floor={**made.floor, **floor_table(extract(net, others)[0], made)})


def _same_network(name: str, reference: Reference) -> None:
    if name != reference.features:
        raise BadInput(
            f"features of {name} cannot be compared with a reference made with {reference.features}: "
            f"use features={reference.features!r}, or make a reference with {name}"
        )
