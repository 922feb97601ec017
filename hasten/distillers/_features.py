"""The network through whose features a student is compared: trained first, as a stage of the run, or left at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BadInput
from ..nets.classifier import Classifier
from ._task import Task


def classifier(task: Task, share: float, width: int = 32, lr: float = 1e-3) -> Classifier:
    """The stage `classifier`: a classifier of the task's own images, by cross-entropy; averaged, frozen, in eval mode.

    share: of the budget, relative to the other stages. Raises BadInput for a task without labels.
    """
    if "label" not in task.batches[0]:
        raise BadInput(
            "a classifier needs images with labels of the model's classes: this model has no classes, or the data no "
            "labels (mmd:features=random works without them)"
        )
    net = untrained(task, width)

    def lesson(batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(net(batch["x"])[1], batch["label"])

    player = task.player("classifier", net, lesson, lr, weight_decay=0.01)
    trained: Any = task.fit("classifier", [player], share=share)["classifier"]
    return trained


def untrained(task: Task, width: int = 32) -> Classifier:
    """The network with its first weights, a function of the task's seed; its features are good for a kernel, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        net = Classifier(task.shape, task.label_count or 1, width)
    return net.to(next(task.denoiser.parameters()).device)
