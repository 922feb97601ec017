"""Whether images show what their prompts say, and how much the images of one prompt differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from ..utils.devices import as_float64
from .measure import check_finite_rows

CANDIDATES = 100
TIE = 1e-6  # the rounding of products of unit vectors in float32


@dataclass(frozen=True)
class PromptMatch:
    """How often the right caption is retrieved.

    Args:
        value: fraction of the images, in [0, 1].
        error: its standard error, over prompts.
        candidates: distinct captions among which the right one must win; 1 / candidates is chance.
        count: images.
    """

    value: float
    error: float
    candidates: int
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, within [0, 1]."""
        return max(self.value - 1.96 * self.error, 0.0), min(self.value + 1.96 * self.error, 1.0)


def prompt_match(
    images: Tensor,
    captions: Sequence[str],
    texts: Tensor,
    distinct: Sequence[str],
    candidates: int = CANDIDATES,
    seed: int = 0,
) -> PromptMatch:
    """How often the caption of an image is nearer to it than `candidates - 1` other captions.

        mean_i [ <image_i, text_i>  >  max_j <image_i, text_j> ],

    j over captions that are drawn for image i without replacement from the others; ties count as wrong.

    Args:
        images: unit vectors (N, E).
        captions: of each image; each must be among `distinct`.
        texts: unit vectors (M, E) of `distinct`.
        distinct: M >= 2 different captions, from which the others are drawn.
        candidates: captions in all; M where there are fewer.
        seed: of the draws, which are the same for the same captions.

    Raises:
        BadInput: for fewer than two distinct captions, captions that are not among them, and values that are not
            finite.

    References:
        Park et al. 2021, "Benchmark for compositional text-to-image synthesis" (R-precision); Radford et al. 2021,
        arXiv:2103.00020.
    """
    index = {text: k for k, text in enumerate(distinct)}
    if len(index) < 2 or len(index) != len(distinct) or len(texts) != len(distinct):
        raise BadInput(f"prompt match needs two different captions or more, found {len(index)}")
    if len(images) != len(captions):
        raise BadInput(f"{len(images)} images but {len(captions)} captions")
    if missing := [text for text in captions if text not in index]:
        raise BadInput(f"the caption {missing[0][:80]!r} is not among the distinct captions")
    check_finite_rows("vectors", images, texts)
    count = min(candidates, len(distinct))
    generator = torch.Generator().manual_seed(seed)
    right: list[bool] = []
    vectors, texts = images.detach().cpu().double(), texts.detach().cpu().double()
    for vector, caption in zip(vectors, captions, strict=True):
        own = index[caption]
        others = torch.randperm(len(distinct) - 1, generator=generator)[: count - 1]
        others = others + (others >= own)
        scores = texts[others] @ vector
        right.append(bool(texts[own] @ vector > scores.max() + TIE))
    value = sum(right) / len(right)
    return PromptMatch(value, clustered_error(right, captions, value), count, len(right))


def clustered_error(right: Sequence[bool], captions: Sequence[str], value: float) -> float:
    """The standard error of a fraction, where the images of one caption are not independent.

        sqrt(sum over captions of (sum of its deviations)^2) / N,

    which is sqrt(p (1 - p) / N) for captions of one image each.
    """
    sums: dict[str, float] = {}
    for one, caption in zip(right, captions, strict=True):
        sums[caption] = sums.get(caption, 0.0) + one - value
    return math.sqrt(sum(total**2 for total in sums.values())) / len(right)


@dataclass(frozen=True)
class Diversity:
    """How much images differ.

    Args:
        within: mean distance of two images of one prompt.
        error: its standard error, over prompts.
        between: mean distance of images of different prompts.
        prompts, images: prompts, and images of each.
        by_prompt: what `within` is the mean of, for paired comparisons of generators.
    """

    within: float
    error: float
    between: float
    prompts: int
    images: int
    by_prompt: tuple[float, ...] = ()


def prompt_diversity(features: Tensor) -> Diversity:
    """Mean pairwise distances of the features of images within and between prompts.

    Zero within prompts is a generator that ignores its noise. Real images of one prompt are seldom there to compare
    with: compare generators, by the same features and as many images.

    Args:
        features: (P, k, D), k >= 2 images of each of P prompts.

    Raises:
        BadInput: for fewer than two images of a prompt, or values that are not finite.
    """
    if features.ndim != 3 or features.shape[1] < 2:
        raise BadInput(f"diversity needs features (prompts, 2 or more images, D), found {tuple(features.shape)}")
    check_finite_rows("features", features)
    x = as_float64(features)
    prompts, images = x.shape[:2]
    pairs = torch.triu_indices(images, images, offset=1)
    within = (x[:, pairs[0]] - x[:, pairs[1]]).norm(dim=2).mean(dim=1)
    error = float(within.std()) / math.sqrt(prompts) if prompts > 1 else 0.0
    between = [float(torch.pdist(x[:, k]).mean()) for k in range(images)] if prompts > 1 else [0.0]
    mean_between = sum(between) / len(between)
    return Diversity(float(within.mean()), error, mean_between, prompts, images, tuple(within.tolist()))
