"""What a comparison measures of a row beside distances to real images: pairs of seeds, prompts, diversity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.ranks import Ranks
from ..metrics.paired import Estimate, mean_estimate, ratio_estimate
from ..metrics.prompt_match import prompt_diversity
from ..workflows.distribute import sample_many
from ..workflows.evidence import Evidence
from ..workflows.prompt_figures import DIVERSITY_PROMPTS, IMAGES_PER_PROMPT, diversity_features
from .jobs import Job, sampling_arguments
from .restored_rows import BY_SEED

SCORES = ("prompt_score", "image_reward")
REFERENCE = "reference "  # before the name of a score: that of the reference's image of the same seed


def seed_figures(
    evidence: Evidence, images: Tensor, reference: Tensor | None, prompts: Sequence[str] | None
) -> dict[str, Any]:
    """The figures of a row's images, image k with prompt k mod their number.

    Args:
        evidence: What they are measured by.
        images: (N, C, H, W).
        reference: Those of the reference, of the same seeds; None for the reference itself.
        prompts: The prompts; None for a model that takes none.

    Returns:
        Means, prompt match, and under `by_seed` the values by seed, for `estimates`.
    """
    series: dict[str, Tensor] = {}
    figures: dict[str, Any] = {}
    if prompts:
        texts = [prompts[k % len(prompts)] for k in range(len(images))]
        match = evidence.match(images, texts)
        figures |= {} if match is None else {"prompt_match": match.value, "prompt_match_error": match.error}
        series |= evidence.prompt_scores(images, texts)
        if reference is not None and series:
            series |= {REFERENCE + name: values for name, values in evidence.prompt_scores(reference, texts).items()}
    if reference is not None:
        series |= evidence.paired(images, reference)
        difference = ((images - reference).double() / 2).square().flatten(1).mean(dim=1)
        figures["rms"] = float(difference.mean().sqrt())
    means = {name: float(values.mean()) for name, values in series.items() if not name.startswith(REFERENCE)}
    return {**figures, **means, BY_SEED: {name: values.tolist() for name, values in series.items()}}


def estimates(blocks: Sequence[dict[str, Any]], prompts: Sequence[str] | None) -> dict[str, list[float]]:
    """Take the values by seed out of the figures of blocks: 95 % intervals over the seeds of all blocks.

    Args:
        blocks: Figures of `seed_figures`; their values by seed are removed.
        prompts: Of which image k of a block has number k mod their count: images of one prompt are not independent.

    Returns:
        (value, low, high) by figure; of scores those of the difference to the reference.
    """
    every = [block.pop(BY_SEED, {}) for block in blocks]
    groups = [k % len(prompts) if prompts else (b, k) for b, one in enumerate(every) for k in range(length_of(one))]
    found: dict[str, list[float]] = {}
    for name in every[0] if every else ():
        if name.startswith(REFERENCE) or (name in SCORES and REFERENCE + name not in every[0]):
            continue
        values = torch.tensor([value for one in every for value in one[name]], dtype=torch.float64)
        if name in SCORES:
            values = values - torch.tensor([value for one in every for value in one[REFERENCE + name]])
        found[name] = bounds(mean_estimate(values, groups))
    return found


def length_of(series: Mapping[str, Sequence[float]]) -> int:
    """How many seeds there are."""
    return len(next(iter(series.values()), ()))


def bounds(estimate: Estimate) -> list[float]:
    """(value, low, high) for a row."""
    return [estimate.value, estimate.low, estimate.high]


def diversity_figures(
    evidence: Evidence, job: Job, images: Tensor, prompts: Sequence[str], seed: int, protocol: dict[str, Any],
    ranks: Ranks,
) -> dict[str, Any]:  # fmt: skip
    """Diversity of a row's images within a prompt, for which all processes sample what is missing: three further
    images of a quarter of the prompts, of 4 to 25."""

    def sample(count: int, texts: Sequence[str], first: int) -> Tensor | None:
        return sample_many(
            job.model, count, list(texts), first, protocol["batch_size"], ranks=ranks,
            accelerated=job.variant.accelerators, **sampling_arguments(job.model, job.variant, protocol["dtype"]),
        )  # fmt: skip

    assert evidence.net is not None
    limit = min(max(len(images) // 4, 4), DIVERSITY_PROMPTS)
    groups = diversity_features(evidence.net, images, prompts, seed, sample, IMAGES_PER_PROMPT, limit)
    if groups is None:
        return {}
    found = prompt_diversity(groups)
    return {
        "diversity": found.within,
        "diversity_error": found.error,
        "diversity_by_prompt": list(found.by_prompt),
    }


def set_diversity_ratio(row: dict[str, Any], reference: Mapping[str, Any]) -> None:
    """Set, in place, the diversity within a prompt relative to the reference's, and the distance to the reference's
    images relative to that between two of its seeds."""
    own, others = row.get("diversity_by_prompt"), reference.get("diversity_by_prompt")
    row["diversity_ratio"] = row["feature_ratio"] = None
    if not own or not others or len(own) != len(others) or not sum(others):
        return
    row["diversity_ratio"] = bounds(ratio_estimate(torch.tensor(own), torch.tensor(others)))
    if distance := (row.get("paired") or {}).get("feature_distance"):
        row["feature_ratio"] = [value / reference["diversity"] for value in distance]
