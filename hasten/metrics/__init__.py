"""Quality metrics of a set of samples.

`evaluate_images` returns all of them, each a `Measure` with its feature network, reference, sample count, real-data
baseline and seeds. The modules import torch and nothing of hasten but its errors, files and `utils`.
"""

from __future__ import annotations

import warnings
from typing import Any

from .evaluate import evaluate_features, evaluate_images, floor_table, reference_from_images, without_neighbours
from .features import extract, feature_net, net_name
from .frechet import RunningMoments, frechet_distance, frechet_interval, moments
from .measure import Measure, spell_seeds
from .precision_recall import Manifold, manifold
from .references import Reference, make_reference, reference, save_reference

__all__ = [
    "Manifold",
    "Measure",
    "Reference",
    "RunningMoments",
    "evaluate_features",
    "evaluate_images",
    "extract",
    "feature_net",
    "floor_table",
    "frechet_distance",
    "frechet_interval",
    "make_reference",
    "manifold",
    "moments",
    "net_name",
    "reference",
    "reference_from_images",
    "save_reference",
    "spell_seeds",
    "without_neighbours",
]


def __getattr__(name: str) -> Any:
    if name != "Moments":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.Moments is now RunningMoments", DeprecationWarning, stacklevel=2)
    return RunningMoments
