"""What images of prompts are measured by without real pictures: pairs of the same seeds, prompt match, diversity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..metrics import Measure, extract, feature_net, net_name, spell_seeds
from ..metrics.difference import WINDOW, structural_similarity
from ..metrics.paired import mean_estimate, psnr_by_image
from ..metrics.preference import ImageReward, find_image_reward
from ..metrics.prompt_match import PromptMatch, prompt_diversity, prompt_match
from ..metrics.text_judge import TextJudge, load_judge
from ..metrics.vision_folder import CoarsePixels
from ..nets.lpips import HOW_TO_GET, NAMES, PerceptualDistance, find_perceptual, load_perceptual
from ..progress import ignore_messages
from .captioned import CaptionedSet
from .prompts import is_image

__all__ = ["Evidence", "collect_evidence"]

BATCH = 64  # pairs of images compared at once
KEPT = 6  # sets of images whose features are in memory


@dataclass
class Evidence:
    """What measures images of prompts, and pairs of images of the same seeds.

    Args:
        net: the features of distances between two images, and of the diversity within a prompt; None: not measured.
        judge: compares images with prompts; None: that is not measured.
        perceptual: LPIPS; None: not measured.
        reward: ImageReward; None: not measured.
        captioned: pictures with captions that prompt match is among; None: it is among the prompts themselves.
    """

    net: nn.Module | None = None
    judge: TextJudge | None = None
    perceptual: PerceptualDistance | None = None
    reward: ImageReward | None = None
    captioned: CaptionedSet | None = None
    _texts: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _features: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def settings(self) -> dict[str, str]:
        """The names of what is measured with, for the record."""
        names = {} if self.net is None else {"features": net_name(self.net)}
        names |= {} if self.judge is None else {"judge": self.judge.name}
        names |= {} if self.perceptual is None else {"lpips": self.perceptual.name}
        return names | ({} if self.reward is None else {"preference": self.reward.name})

    def prompt_scores(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """How well each image fits its prompt, by figure, each (N,).

        `prompt_score` is 100 times the cosine between image and prompt in the judge's space (the CLIP score; with the
        weights of PickScore its score), `image_reward` that of ImageReward.

        Args:
            images: (N, C, H, W) in [-1, 1].
            prompts: of each image.
        """
        scores: dict[str, Tensor] = {}
        if self.judge is not None:
            vectors = self.judge.image_vectors(self.features(images, self.judge))
            scores["prompt_score"] = 100 * (vectors.double() * self.texts(prompts).double()).sum(1)
        if self.reward is not None:
            scores["image_reward"] = self.reward.scores(images, prompts)
        return scores

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """The judge's vectors of prompts, (n, E), each computed once."""
        assert self.judge is not None
        if missing := [text for text in dict.fromkeys(prompts) if text not in self._texts]:
            self._texts |= dict(zip(missing, self.judge.texts(missing), strict=True))
        return torch.stack([self._texts[text] for text in prompts])

    def match(self, images: Tensor, prompts: Sequence[str]) -> PromptMatch | None:
        """The prompt match of images, see `prompt_match`: among the captions, or the prompts themselves; None without a
        judge, and for fewer than two prompts."""
        if self.judge is None:
            return None
        if self.captioned is not None:
            return self.captioned.prompt_match(self.features(images, self.captioned.judge), prompts)
        distinct = list(dict.fromkeys(prompts))
        if len(distinct) < 2:
            return None
        vectors = self.judge.image_vectors(self.features(images, self.judge))
        return prompt_match(vectors, prompts, self.texts(distinct), distinct)

    def measures(
        self, images: Tensor, prompts: Sequence[str], seeds: range, groups: Tensor | None = None
    ) -> dict[str, Measure]:
        """The figures of images of prompts that need no real pictures: prompt match, prompt score, diversity.

        Args:
            images: (N, C, H, W) in [-1, 1]; image k has prompt k mod their number.
            prompts: the prompts.
            seeds: of the images.
            groups: features (P, k, D) of several images of each prompt by `net`; None: no diversity.
        """
        texts = [prompts[k % len(prompts)] for k in range(len(images))]
        common: dict[str, Any] = {"seeds": spell_seeds(seeds), "better": "higher", "floor": None}
        found: dict[str, Measure] = {}
        if (match := self.match(images, texts)) is not None and self.judge is not None:
            found["prompt_match"] = Measure(
                name="prompt_match", value=match.value, features=self.judge.name, reference="the prompts themselves",
                count=match.count, reference_count=match.candidates, interval=match.interval, **common,
            )  # fmt: skip
        for name, values in self.prompt_scores(images, texts).items():
            estimate = mean_estimate(values, texts)
            scorer = self.judge.name if name == "prompt_score" and self.judge is not None else "ImageReward"
            found[name] = Measure(
                name=name, value=estimate.value, features=scorer, reference="the image's own prompt",
                count=len(values), reference_count=estimate.count, interval=(estimate.low, estimate.high), **common,
            )  # fmt: skip
        if groups is not None and self.net is not None:
            d = prompt_diversity(groups)
            found["diversity"] = Measure(
                name="diversity", value=d.within, features=net_name(self.net),
                reference=f"prompts with {d.images} images each", count=d.prompts * d.images,
                reference_count=d.prompts, spread=d.error, **common,
            )  # fmt: skip
        return found

    def paired(self, images: Tensor, others: Tensor) -> dict[str, Tensor]:
        """How images differ from others of the same seeds, each (N,).

        `psnr` in dB; `ssim` of images of at least 11 pixels; `lpips` of at least 32; `feature_distance`, the Euclidean
        distance of the features.
        """
        figures = {"psnr": psnr_by_image(images, others)}
        if not is_image(images.shape[1:]):
            return figures
        pairs = list(zip(images.split(BATCH), others.split(BATCH), strict=True))
        side = min(images.shape[-2:])
        if side >= WINDOW:
            figures["ssim"] = torch.cat([structural_similarity(one, other) for one, other in pairs])
        if self.perceptual is not None and side >= self.perceptual.smallest:
            with torch.inference_mode():
                figures["lpips"] = torch.cat([self.lpips(one, other) for one, other in pairs])
        if self.net is not None:
            difference = self.features(images, self.net) - self.features(others, self.net)
            figures["feature_distance"] = difference.double().norm(dim=1)
        return figures

    def lpips(self, images: Tensor, others: Tensor) -> Tensor:
        """LPIPS of each pair, on the device of its weights, (n,) on the CPU."""
        assert self.perceptual is not None
        device = self.perceptual.shift.device
        return self.perceptual.by_image(images.to(device), others.to(device)).cpu()

    def features(self, images: Tensor, net: nn.Module) -> Tensor:
        """The features of images, (N, D); those of the last few sets of images are kept."""
        key = (id(net), id(images))
        if key not in self._features:
            while len(self._features) >= KEPT:
                self._features.pop(next(iter(self._features)))
            self._features[key] = (images, extract(net, images)[0])  # with the images, whose id must stay theirs
        return self._features[key][1]


def collect_evidence(
    features: str | Path | nn.Module | None = None,
    judge: Any = None,
    captioned: CaptionedSet | None = None,
    lpips: str | Path | None = None,
    device: torch.device | None = None,
    report: Callable[[str], None] = ignore_messages,
) -> Evidence:
    """What a model of prompts is measured by, from what is on this machine; nothing is downloaded.

    Args:
        features: a feature network, its name, or a folder of a CLIP, SigLIP or DINOv2 of transformers. None: the
            judge's, and without a judge coarse pixels.
        judge: what compares images with prompts, see `load_judge`; None: `captioned`'s, or `features` where this is a
            CLIP with its text tower.
        captioned: pictures with captions.
        lpips: its trunk (`alex`, `vgg`, `alex_shift_tolerant`, `vgg_shift_tolerant`), whose files are looked for where
            other packages leave them, or a file or folder of weights. None: the first trunk that is found.
        device: of the networks.
        report: receives a line on each figure that is not measured, and why.

    Raises:
        BadInput: for what was named and cannot be loaded.
    """
    net = None if features is None else feature_net(str(features) if isinstance(features, Path) else features)
    found = captioned.judge if captioned is not None else None if judge is None else load_judge(judge)
    if found is None and isinstance(net, TextJudge):
        found = net
    if found is None:
        report("prompt match is not measured: give --judge FOLDER, a CLIPModel of transformers with its tokenizer")
    if net is None and found is None:
        net = CoarsePixels()
        report(
            f"distances and diversity are of {net.name}: for those of a network give --features FOLDER, a CLIP, SigLIP "
            "or DINOv2 of transformers"
        )
    perceptual = perceptual_distance(lpips)
    if perceptual is None:
        report(f"LPIPS is not measured: its weights are not on this machine; {HOW_TO_GET} (--lpips FILE or FOLDER)")
    reward, line = find_image_reward()
    if line:
        report(line)
    chosen = net if net is not None else found
    assert chosen is not None
    evidence = Evidence(chosen, found, perceptual, reward, captioned)
    if device is not None:
        for one in (evidence.net, evidence.judge, evidence.perceptual):
            if isinstance(one, nn.Module):
                one.to(device)
    return evidence


def perceptual_distance(which: str | Path | None) -> PerceptualDistance | None:
    """LPIPS by its trunk, file or folder; None: the first trunk that is on this machine, or None.

    Raises:
        BadInput: where the one that was named is not there.
    """
    if which is None:
        return next((found for name in NAMES if (found := find_perceptual(name)) is not None), None)
    if str(which) not in NAMES:
        return load_perceptual(which)
    distance = find_perceptual(str(which))
    if distance is None:
        how = f"; {HOW_TO_GET}" if "shift" in str(which) else ": give their file or folder"
        raise BadInput(f"the weights of LPIPS {which} are not on this machine{how}")
    return distance
