"""Metrics of a classifier's logits: inception score and class accuracy."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from ..errors import BadInput
from .measure import check_finite_rows


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """`exp(mean_x KL(p(y|x) || p(y)))`, from 1 (all images alike or undecided) to K (certain and evenly spread).

    The samples are shuffled first, because samples in label order would have few classes in each split.

    Args:
        logits: `(N, K)`.
        splits: number of equal splits.
        seed: of the shuffling.

    Returns:
        Mean and standard deviation over the splits.

    Raises:
        BadInput: for another shape, or values that are not finite.

    References:
        Salimans et al. 2016, arXiv:1606.03498.
    """
    if logits.ndim != 2 or not 1 <= splits <= len(logits):
        raise BadInput(f"logits {tuple(logits.shape)} cannot be divided into {splits} splits")
    check_finite_rows("logits", logits)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    log_p = logits.cpu().double()[order].log_softmax(dim=1)
    scores = []
    for split in log_p.tensor_split(splits):
        log_marginal = split.logsumexp(dim=0) - math.log(len(split))
        scores.append((split.exp() * (split - log_marginal)).sum(dim=1).mean().exp())
    v = torch.stack(scores)
    return float(v.mean()), float(v.std(correction=0))


def class_accuracy(logits: Tensor, labels: Tensor, level: float = 0.95) -> tuple[float, tuple[float, float]]:
    """Fraction of samples whose largest logit is the requested label, and its Wilson interval.

    It measures that samples follow their label, not that they are real or diverse: guidance raises it above that of
    real images.

    Args:
        logits: `(N, K)`.
        labels: `(N,)`, the requested classes.
        level: of the interval, in (0, 1).

    Returns:
        The accuracy, and the low and high end of its interval.

    Raises:
        BadInput: if the shapes do not match, or for values that are not finite.

    References:
        Wilson 1927.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise BadInput(f"{tuple(labels.shape)} labels do not belong to logits {tuple(logits.shape)}")
    check_finite_rows("logits", logits)
    n = len(labels)
    p = float((logits.argmax(dim=1).cpu() == labels.cpu()).double().mean())
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return p, (max(centre - half, 0.0), min(centre + half, 1.0))
