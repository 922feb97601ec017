"""All quality metrics of a set of images, from one pass through one feature network."""

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
NEIGHBOURS_FROM = 200  # samples on either side: with fewer, the neighbour radii are too noisy
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
    """Evaluate images against a reference.

    Fréchet distance with interval, kernel distance, precision, recall, density and coverage; with a classifying feature
    network the inception score, and with `labels` the class accuracy. Precision, recall, density and coverage are
    omitted with fewer than 200 images on either side (see `without_neighbours`).

    Args:
        images: `(N, C, H, W)` in [-1, 1] or uint8, N >= 10.
        labels: `(N,)`, the requested classes.
        features: a feature network or its name (`feature_net`).
        reference: statistics, their bundled name or folder; of the same feature network.
        seeds: the noise seeds, for the record.
        bootstrap: repeats of the interval, 0 for none.
        batch_size: images per forward pass.
        device: of a network given by name. Default: that of the images.

    Returns:
        Measures by name: frechet, kid, precision, recall, density, coverage, inception_score, accuracy.

    Raises:
        BadInput: for too few images, or a reference of another feature network.
        NonFinite: if features or a metric are not finite.
    """
    statistics = reference if isinstance(reference, Reference) else load_reference(reference)
    net = feature_net(features)
    if isinstance(features, str) and (device is not None or isinstance(images, Tensor)):
        net = net.to(images.device if device is None else device)
    _check_same_network(net_name(net), statistics)
    extracted, logits = extract(net, images, batch_size)
    return evaluate_features(extracted, statistics, logits, labels, seeds, bootstrap)


def evaluate_features(
    features: Tensor,
    reference: Reference,
    logits: Tensor | None = None,
    labels: Tensor | None = None,
    seeds: Iterable[int] | str | None = None,
    bootstrap: int = 100,
) -> dict[str, Measure]:
    """`evaluate_images` for features `(N, D)` and logits `(N, K)` that were extracted before."""
    n = len(features)
    if n < 10:
        raise BadInput(f"{n} images are too few to measure a distribution: give at least 10, better 2,000")
    bad = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        indices = f"{', '.join(map(str, bad[:5]))}{', ...' if len(bad) > 5 else ''}"
        raise NonFinite(
            f"the {reference.features} features of {len(bad)} of {n} images hold NaN or infinity: numbers {indices}"
        )
    if features.shape[1] != len(reference.mean):
        raise BadInput(f"features of width {features.shape[1]} against a reference of width {len(reference.mean)}")
    seed_ranges = spell_seeds(seeds)

    def measure(
        name: str, value: float, against: int, interval: tuple[float, float] | None = None, spread: float | None = None
    ) -> Measure:
        if not math.isfinite(value):
            raise NonFinite(f"{name} of {n} images is {value}, not a finite number")
        return Measure(
            name=name,
            value=value,
            features=reference.features,
            reference=f"{reference.name} {reference.split}",
            count=n,
            reference_count=against,
            floor=reference.floor_at(name, n),
            seeds=seed_ranges,
            interval=interval,
            spread=spread,
            better="higher" if name in HIGHER else "lower",
        )

    interval = None
    if bootstrap:  # each repeat takes seconds for a wide covariance
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
            accuracy, accuracy_interval = class_accuracy(logits, labels)
            out["accuracy"] = measure("accuracy", accuracy, 0, accuracy_interval)
    return out


def without_neighbours(n: int, reference: Reference) -> str | None:
    """A message that precision, recall, density and coverage are omitted, or None if there are enough samples.

    Args:
        n: number of samples.
        reference: that they are compared with.
    """
    smaller = min(n, len(reference.sample))
    if smaller >= NEIGHBOURS_FROM:
        return None
    what = "samples" if smaller == n else "reference images"
    return f"{smaller} {what} are too few for {', '.join(NEIGHBOURS)} ({NEIGHBOURS_FROM} or more): they are omitted"


def floor_table(
    features: Tensor, reference: Reference, counts: Iterable[int] = (1000, 2000, 5000, 10_000), max_runs: int = 4
) -> dict[str, dict[int, float]]:
    """The real-data baseline of each metric: its value for real images that are not in the reference.

    Args:
        features: `(N, D)` of these images, shuffled.
        reference: that they are compared with.
        counts: numbers of images n; those above N are omitted.
        max_runs: average over up to this number of disjoint sets of n images.

    Returns:
        {metric: {n: value}}.
    """
    table: dict[str, dict[int, float]] = {}
    for n in counts:
        runs = [slice(i, i + n) for i in range(0, min(len(features) - n + 1, max_runs * n), n)]
        results = [evaluate_features(features[run], reference, bootstrap=0) for run in runs]
        for name in results[0] if results else ():
            table.setdefault(name, {})[n] = sum(r[name].value for r in results) / len(results)
    return table


def reference_from_images(
    images: Tensor, name: str, split: str, net: nn.Module, labels: Tensor | None = None, others: Tensor | None = None
) -> Reference:
    """Reference statistics of a user's own images.

    Args:
        images: `(N, C, H, W)` in [-1, 1] or uint8.
        name, split: what they are, for the record.
        net: the feature network.
        labels: `(N,)` or None.
        others: further real images, from which the real-data baseline is computed.
    """
    features, logits = extract(net, images)
    statistics = make_reference(features, name, split, net_name(net), labels, logits)
    if others is None:
        return statistics
    return replace(statistics, floor={**statistics.floor, **floor_table(extract(net, others)[0], statistics)})


def _check_same_network(name: str, reference: Reference) -> None:
    """Raise BadInput if a reference was made with another feature network."""
    if name != reference.features:
        raise BadInput(
            f"features of {name} cannot be compared with a reference made with {reference.features}: "
            f"use features={reference.features!r}, or make a reference with {name}"
        )
