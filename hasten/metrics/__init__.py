"""Quality and cost: what a set of samples is worth, and what it took.

`evaluate_images` gives all quality figures, each a `Measure` that carries its feature network, reference, sample
count, floor and seeds. `cost` counts and times; `kid`, `inception_score`
and `precision_recall` are modules of their own. The modules import torch and nothing of hasten but its errors.
"""

from .evaluate import evaluate_features, evaluate_images, floor_table, reference_from_images, without_neighbours
from .features import extract, feature_net, net_name
from .frechet import Moments, frechet_distance, frechet_interval, moments
from .measure import Measure, spell_seeds
from .precision_recall import Manifold, manifold
from .references import Reference, make_reference, reference, save_reference

__all__ = [
    "Manifold", "Measure", "Moments", "Reference", "evaluate_features", "evaluate_images",
    "extract", "feature_net", "floor_table", "frechet_distance", "frechet_interval", "make_reference",
    "manifold", "moments", "net_name", "reference", "reference_from_images", "save_reference", "spell_seeds",
    "without_neighbours",
]  # fmt: skip
