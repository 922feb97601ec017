"""Few-shot classification by a diffusion model: an adapter for each class, weighted denoising errors, early stop."""

from __future__ import annotations

from .classifier import DiffusionClassifier, FewShotClassifier
from .elimination import AllTimes, PairedStop, Stages, eliminate
from .saved import export_loras, load_classifier, save_classifier
from .time_weights import attribute_size, time_step_weights

__all__ = [
    "AllTimes", "DiffusionClassifier", "FewShotClassifier", "PairedStop", "Stages", "attribute_size", "eliminate",
    "export_loras", "load_classifier", "save_classifier", "time_step_weights",
]  # fmt: skip
