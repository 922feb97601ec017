"""The figures of images of prompts: prompt match, diversity, nearest training pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed.ranks import Ranks
from ..errors import BadInput
from ..images import to_uint8
from ..metrics import Measure, evaluate_features, extract, spell_seeds
from ..metrics.nearest_images import Memorisation, memorisation, nearest_distances
from ..metrics.prompt_match import Diversity, prompt_diversity
from ..metrics.text_judge import TextJudge
from ..model.model import Model
from ..progress import ignore_messages
from .captioned import CaptionedSet, bundled_captions, open_captioned
from .prompts import image_shape, is_image

__all__ = [
    "PromptDetails",
    "captions_for",
    "diversity_features",
    "measure_prompts",
    "nearest_train_images",
    "prompt_summary",
]

DIVERSITY_PROMPTS = 25
IMAGES_PER_PROMPT = 4
TRAIN_BLOCK = 1024

Sampler = Callable[[int, Sequence[str], int], "Tensor | None"]


def captions_for(
    model: Model,
    chosen: tuple[Any, str, Any],
    others: tuple[Any, Any],
    ranks: Ranks,
    report: Callable[[str], None] = ignore_messages,
) -> CaptionedSet | None:
    """The captioned pictures that a model's images are measured against; None where there are none.

    Args:
        model: of prompts; of any other model the result is None.
        chosen: the data, the split that is held out, and the judge; see `EvaluateConfig`.
        others: the reference and the feature network that were asked for in their place.
        ranks: the processes; the main process of each machine fills the cache.
        report: receives lines on what is there.

    Raises:
        BadInput: for data without a judge, both data and a reference, and for a model that takes no prompts.
    """
    (data, split, judge), (reference, features) = chosen, others
    if model.conditioning is None:
        if data is not None or judge is not None:
            raise BadInput(f"{model.name} takes no prompts: --data and --judge are for models that do; use --reference")
        return None
    if data is not None and (reference is not None or features is not None):
        raise BadInput("--data is the reference, in the features of --judge: leave out --reference and --features")
    judge = model.card.get("judge") if judge is None else judge
    if data is None:
        if reference is not None or judge is None:
            return None
        found = None if isinstance(judge, TextJudge) else bundled_captions(judge, model.device)
        if found is not None:
            report("without --data FOLDER images are not compared with their nearest training pictures")
        return found
    if judge is None:
        raise BadInput(f"{model.name} names no judge: give --judge, a folder of contrastive towers or of a CLIPModel")
    shape = image_shape(model)
    if not is_image(shape):
        raise BadInput(f"samples of shape {tuple(shape)} are no grey or RGB images: they have no judge")
    with ranks.main_process_first():
        return open_captioned(data, judge, shape, split, model.device, report)


def measure_prompts(
    captioned: CaptionedSet,
    images: Tensor,
    prompts: Sequence[str],
    seeds: range,
    groups: Tensor | None = None,
    bootstrap: int = 100,
) -> tuple[dict[str, Measure], dict[str, Any], Tensor]:
    """The measures of images of prompts in the features of a judge.

    Args:
        captioned: what they are measured against.
        images: (N, C, H, W) in [-1, 1]; image k has prompt k mod their number.
        prompts: the prompts.
        seeds: of the images.
        groups: features (P, k, D) of several images of each prompt, see `diversity_features`; None: no diversity.
        bootstrap: repeats of the interval of the Fréchet distance.

    Returns:
        Measures by name, with `prompt_match` and `diversity`; what the two were computed from; the features (N, D).
    """
    judge, reference = captioned.judge, captioned.reference
    features = extract(judge, images)[0]
    measures = evaluate_features(features, reference, None, None, seeds, bootstrap)
    common: dict[str, Any] = {"features": judge.name, "seeds": spell_seeds(seeds), "better": "higher"}
    details: dict[str, Any] = {}
    match = captioned.prompt_match(features, [prompts[k % len(prompts)] for k in range(len(images))])
    if match is not None:
        real = captioned.match
        measures["prompt_match"] = Measure(
            name="prompt_match", value=match.value, reference=f"{reference.name} {reference.split} captions",
            count=match.count, reference_count=match.candidates, floor=None if real is None else real.value,
            interval=match.interval, **common,
        )  # fmt: skip
        details["prompt_match"] = {**vars(match), "real": None if real is None else vars(real)}
    if groups is not None:
        diversity = prompt_diversity(groups)
        measures["diversity"] = Measure(
            name="diversity", value=diversity.within, reference=f"prompts with {diversity.images} images each",
            count=diversity.prompts * diversity.images, reference_count=diversity.prompts,
            spread=diversity.error, **common,
        )  # fmt: skip
        details["diversity"] = vars(diversity)
    return measures, details, features


def diversity_features(
    judge: nn.Module, images: Tensor, prompts: Sequence[str], seed: int, sample: Sampler, per_prompt: int,
    limit: int = DIVERSITY_PROMPTS,
) -> Tensor | None:  # fmt: skip
    """Features of several images of each of the first prompts, for `prompt_diversity`.

    Image m of prompt j is image `j + m len(prompts)` of a longer run: it is taken from `images` where they hold it, and
    otherwise sampled from the same seed, so that the result does not depend on how many images there are.

    Args:
        judge: extracts the features.
        images: (N, C, H, W), those from `seed` on.
        prompts: P prompts.
        seed: of image 0.
        sample: `sample(n, prompts, seed)` gives n further images, or None in processes that do not need them.
        per_prompt: images of each, at least 2.
        limit: prompts at most.

    Returns:
        (prompts, per_prompt, D); None where `sample` gave None.
    """
    count = min(len(prompts), limit)
    rows = []
    for m in range(per_prompt):
        first = m * len(prompts)
        if first + count <= len(images):
            rows.append(images[first : first + count])
            continue
        extra = sample(count, prompts[:count], seed + first)
        if extra is None:
            return None
        rows.append(extra)
    features = extract(judge, torch.cat(rows))[0]
    return features.reshape(per_prompt, count, -1).transpose(0, 1)


def nearest_train_images(captioned: CaptionedSet, images: Tensor, features: Tensor) -> dict[str, Memorisation]:
    """Distances of images to their nearest training pictures, against those of held-out pictures.

    Args:
        captioned: with its pictures; without training pictures the result is empty.
        images: (N, C, H, W) in [-1, 1].
        features: theirs, (N, D).

    Returns:
        By space: `pixels`, root mean square differences on the scale 0 to 1, and `features`, Euclidean distances.
    """
    known = captioned.train_features
    if captioned.open_train is None or known is None or captioned.held_out is None:
        return {}
    pixels, real_features = captioned.held_out
    train = captioned.open_train()
    made = torch.from_numpy(np.ascontiguousarray(to_uint8(images).transpose(0, 3, 1, 2)))
    queries = torch.cat([flat_pixels(made), flat_pixels(pixels)])
    scale = queries.shape[1] ** 0.5

    def blocks() -> Iterator[Tensor]:
        for first in range(0, len(train), TRAIN_BLOCK):
            yield flat_pixels(train.images(list(range(first, min(first + TRAIN_BLOCK, len(train))))))

    result = {}
    for space, (distances, index) in {
        "pixels": nearest_distances(queries, blocks()),
        "features": nearest_distances(torch.cat([features, real_features]), known.split(TRAIN_BLOCK)),
    }.items():
        distances = distances / (scale if space == "pixels" else 1.0)
        result[space] = memorisation(distances[: len(images)], distances[len(images) :], index[: len(images)])
    return result


def flat_pixels(images: Tensor) -> Tensor:
    """uint8 images as rows in [0, 1]."""
    return images.flatten(1).float() / 255


@dataclass
class PromptDetails:
    """What an evaluation of prompts finds beside its measures, of the first block of seeds.

    Args:
        values: as JSON; empty where no prompts were measured.
        lines: the same as text.
    """

    values: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """`values`, a copy."""
        return dict(self.values)

    def measure(
        self, captioned: CaptionedSet, images: Tensor, prompts: Sequence[str], seeds: range, sample: Sampler,
        per_prompt: int,
    ) -> dict[str, Measure] | None:  # fmt: skip
        """The measures of a block of images; None in processes that do not get the images that `sample` gives."""
        groups = None
        if per_prompt > 1:
            groups = diversity_features(captioned.judge, images, prompts, seeds.start, sample, per_prompt)
            if groups is None:
                return None
        measures, details, features = measure_prompts(captioned, images, prompts, seeds, groups)
        if not self.values:
            neighbours, known = nearest_train_images(captioned, images, features), captioned.train_features
            self.values = {
                "judge": {"name": captioned.judge.name, "features": captioned.judge.features},
                **details,
                "nearest": {space: found.to_dict() for space, found in neighbours.items()},
            }
            self.lines = prompt_summary(details, neighbours, len(known) if known is not None else 0)
        return measures


def prompt_summary(details: dict[str, Any], neighbours: dict[str, Memorisation], train: int) -> list[str]:
    """Lines on prompt match, diversity and nearest training pictures.

    Args:
        details: of `measure_prompts`.
        neighbours: of `nearest_train_images`.
        train: number of training pictures.
    """
    lines = []
    if match := details.get("prompt_match"):
        real = match["real"]
        share = f" ({match['value'] / real['value']:.0%} of it)" if real and real["value"] else ""
        beside = f"; real pictures {real['value']:.1%} +- {real['error']:.1%}{share}" if real else ""
        lines.append(
            f"prompt match {match['value']:.1%} +- {match['error']:.1%}: the right caption among "
            f"{match['candidates']} (chance {1 / match['candidates']:.1%}){beside}"
        )
    if found := details.get("diversity"):
        d = Diversity(**found)
        lines.append(
            f"diversity {d.within:.4g} +- {d.error:.2g}: mean distance of two images of one prompt ({d.images} of each "
            f"of {d.prompts}); of two prompts {d.between:.4g}. Real pictures have no second one of the same prompt"
        )
    for space, m in neighbours.items():
        verdict = "memorised" if m.memorised else "not memorised"
        copies = f"; {m.copies} held-out ones that are copies of training pictures are left out" if m.copies else ""
        lines.append(
            f"nearest of {train} training pictures in {space}: median {m.generated:.4g}, of held-out real ones "
            f"{m.real:.4g}; {m.share:.1%} are nearer than the first percentile of these, {m.threshold:.4g} (unseen "
            f"ones: 1%), {m.share_tenth:.1%} than the tenth (10%): {verdict}{copies}"
        )
    return lines
