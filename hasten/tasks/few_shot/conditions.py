"""What a network is conditioned on for the images of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...denoiser import Denoiser
from ...errors import BadInput, nearest
from ...model.model import Model

__all__ = ["check_denoiser", "class_conditions", "prompts_or_labels"]

Conditions = dict[str, Tensor]


def check_denoiser(model: Model) -> None:
    """Refuse models whose denoising errors say nothing about an image.

    Raises:
        BadInput: for students of few steps, bridges, networks that read a source image, and wrapped networks.
    """
    denoiser: Any = model.denoiser
    if not isinstance(denoiser, Denoiser):
        raise BadInput(f"{model.name} has a {type(denoiser).__name__} around its network: use the plain model")
    if denoiser.guidance_range is not None or "distilled" in model.card:
        raise BadInput(f"{model.name} is a distilled student, which denoises at a few times only: use its teacher")
    if denoiser.schedule.bridge or not denoiser.schedule.ordinary or denoiser.source_channels:
        raise BadInput(f"{model.name} is a bridge or reads a source image: a model that samples from noise is needed")


def class_conditions(model: Model, condition: str, classes: Sequence[str]) -> tuple[Conditions, Conditions]:
    """The conditions that all classes share, each (1, ...), and those of each class, (K, 1, ...), none where they share
    all.

    Args:
        model: of labels, prompts or neither.
        condition: see `FewShotClassifier`.
        classes: their names.

    Raises:
        BadInput: for classes that the model does not have, and conditions that it does not take.
    """
    common, own = _label_of_each(model, condition, classes)

    def one(label: Any) -> Conditions:
        found = model.conditions(1, label)
        return {key: value for key, value in found.items() if not key.startswith("null_")}

    shared = {} if common is None and own is not None else one(common)
    if own is None:
        return shared, {}
    each = [one(label) for label in own]
    return shared or each[0], {key: torch.stack([cond[key] for cond in each]) for key in each[0]}


def prompts_or_labels(model: Model, condition: str, classes: Sequence[str]) -> list[Any]:
    """What `Model.sample` takes as label: one for all classes, or one for each; arguments as for `class_conditions`."""
    common, own = _label_of_each(model, condition, classes)
    return [common] if own is None else own


def _label_of_each(model: Model, condition: str, classes: Sequence[str]) -> tuple[Any, list[Any] | None]:
    """The label or prompt of all classes, and those of each, or None."""
    if model.conditioning is not None:
        if condition == "class":
            raise BadInput(f"{model.name} takes prompts: give one as condition, such as 'a photo of a {{}}'")
        if "{}" in condition:
            return condition.replace("{}", "").strip(), [condition.replace("{}", name) for name in classes]
        return "" if condition == "none" else condition, None
    if model.classes is None:
        if condition != "none":
            raise BadInput(f"{model.name} has no classes and takes no prompts: condition must be 'none'")
        return None, None
    null = model.denoiser.null_label
    if condition == "none":
        if null is None:
            raise BadInput(f"{model.name} always needs a class: condition must be 'class' or one of its classes")
        return "none", None
    if condition != "class":
        model.class_index(condition)  # refuses others
        return condition, None
    known = {name.lower() for name in model.classes}
    for name in classes:
        if name.lower() not in known:
            raise BadInput(f"{model.name} has no class {name!r}: {nearest(name, model.classes)}; or condition='none'")
    return None if null is None else "none", list(classes)
