"""The network whose features compare a student with its target: trained in a stage of the run, or random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BadInput
from ..nets.classifier import Classifier
from ..nets.joint import with_source, with_source_shape
from ._task import DistillTask


def trained_classifier(
    task: DistillTask, budget_weight: float, width: int = 32, lr: float = 1e-3, joint: bool = False
) -> Classifier:
    """Train the stage `classifier`: a classifier of the task's images, by cross-entropy.

    Args:
        task: with labelled batches.
        budget_weight: share of the training budget, relative to the other stages'.
        width: channels of the network.
        lr: peak learning rate.
        joint: it reads each image with its source, where there is one.

    Returns:
        The averaged network, frozen, in eval mode.

    Raises:
        BadInput: for a task without labels.
    """
    if "label" not in task.batches[0]:
        raise BadInput(
            "a classifier needs images with labels of the model's classes: this model has no classes, or the data has "
            "no labels (mmd:features=random and rcfd:features=random,beta=0 work without them)"
        )
    net = random_classifier(task, width, joint)

    def loss_fn(batch: dict[str, Tensor]) -> Tensor:
        x = with_source(batch["x"], task.cond(batch)) if joint else batch["x"]
        return F.cross_entropy(net(x)[1], batch["label"])

    module = task.trained_module("classifier", net, loss_fn, lr, weight_decay=0.01)
    trained: Any = task.fit("classifier", [module], budget_weight=budget_weight)["classifier"]
    return trained


def random_classifier(task: DistillTask, width: int = 32, joint: bool = False) -> Classifier:
    """The network with random weights, a function of the task's seed; its features serve for a kernel, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        shape = with_source_shape(task.shape, task.one_cond()) if joint else task.shape
        net = Classifier(shape, task.label_count or 1, width)
    return net.to(next(task.denoiser.parameters()).device)
