"""What a comparison of models of prompts measures beside the distances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.ranks import Ranks
from ..metrics import extract
from ..metrics.difference import WINDOW, structural_similarity
from ..metrics.prompt_match import prompt_diversity
from ..workflows.captioned import CaptionedSet
from ..workflows.distribute import sample_many
from ..workflows.prompt_figures import IMAGES_PER_PROMPT, diversity_features
from ..workflows.prompts import is_image
from .jobs import Job, sampling_arguments

BATCH = 64  # pairs of images compared at once


def prompt_figures(captioned: CaptionedSet, images: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
    """Prompt match of a row's images, image k with prompt k mod their number."""
    features = extract(captioned.judge, images)[0]
    match = captioned.prompt_match(features, [prompts[k % len(prompts)] for k in range(len(images))])
    return {} if match is None else {"prompt_match": match.value, "prompt_match_error": match.error}


def diversity_figures(
    captioned: CaptionedSet, job: Job, images: Tensor, prompts: Sequence[str], seed: int, protocol: dict[str, Any],
    ranks: Ranks,
) -> dict[str, Any]:  # fmt: skip
    """Diversity of a row's images within a prompt, for which all processes sample what is missing."""

    def sample(count: int, texts: Sequence[str], first: int) -> Tensor | None:
        return sample_many(
            job.model, count, list(texts), first, protocol["batch_size"], ranks=ranks,
            accelerated=job.variant.accelerators, **sampling_arguments(job.model, job.variant, protocol["dtype"]),
        )  # fmt: skip

    groups = diversity_features(captioned.judge, images, prompts, seed, sample, IMAGES_PER_PROMPT)
    if groups is None:
        return {}
    found = prompt_diversity(groups)
    return {"diversity": found.within, "diversity_error": found.error}


def mean_ssim(images: Tensor, others: Tensor) -> float | None:
    """Mean structural similarity to others of the same seeds; None for what is no image, or too small."""
    if not is_image(images.shape[1:]) or min(images.shape[-2:]) < WINDOW:
        return None
    pairs = zip(images.split(BATCH), others.split(BATCH), strict=True)
    return float(torch.cat([structural_similarity(one, other) for one, other in pairs]).mean())
