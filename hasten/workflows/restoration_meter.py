"""The figures of restored images: PSNR, SSIM, LPIPS, consistency, and distances of the sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..metrics import extract, feature_net, net_name
from ..metrics.difference import WINDOW
from ..metrics.frechet import frechet_between
from ..metrics.kid import kid
from ..metrics.paired import mean_estimate
from ..metrics.restoration import as_levels, consistency_error, restoration_psnr, restoration_ssim
from ..nets.lpips import HOW_TO_GET, PerceptualDistance
from ..progress import ignore_messages
from ..train.data import to_float
from .evidence import perceptual_distance
from .restoration import PairGroup, RestorationPairs

__all__ = ["FIGURES", "RestorationMeter", "open_meter"]

BATCH = 16  # pairs compared at once
MINIMUM = 10  # images from which on a distance between sets is measured
KID_SET = 1000  # images of a subset of KID
FEATURES = "efficientnet_lite0"
# What is measured, with the heading of its column, its format, and whether more is better
FIGURES = {
    "psnr": ("PSNR dB", ".2f", True),
    "ssim": ("SSIM", ".4f", True),
    "lpips": ("LPIPS", ".4f", False),
    "frechet": ("Fréchet", ".2f", False),
    "kid": ("KID x1000", ".3f", False),
    "consistency": ("consistency", ".2f", False),
}


@dataclass
class RestorationMeter:
    """Measures images that were restored from the sources of pairs, against the true ones.

    Args:
        pairs: the pairs.
        border: pixels at each side that PSNR and SSIM leave out.
        perceptual: LPIPS; None: not measured.
        net: the feature network of Fréchet distance and KID; None: these are not measured.
    """

    pairs: RestorationPairs
    border: int = 0
    perceptual: PerceptualDistance | None = None
    net: nn.Module | None = None
    _truth: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What is measured with, for the record."""
        names: dict[str, Any] = {"border": self.border, "degrade": self.pairs.degrade}
        names |= {} if self.perceptual is None else {"lpips": self.perceptual.name}
        return names | ({} if self.net is None else {"features": net_name(self.net)})

    @torch.inference_mode()
    def by_image(self, images: Sequence[Tensor]) -> dict[str, Tensor]:
        """`psnr` (dB), `ssim`, `lpips` and, for a factor above 1, `consistency` (in units of 1/255) of each image.

        Args:
            images: (n, C, H, W) in [-1, 1] for each group of the pairs, in their order.

        Returns:
            (N,) each, float64. `ssim` is left out where an image is smaller than its window of 11 pixels, `lpips` where
            one is smaller than 32.
        """
        found: dict[str, list[Tensor]] = {}
        side = min(min(group.truths.shape[-2:]) for group in self.pairs.groups)
        for restored, group in zip(images, self.pairs.groups, strict=True):
            check_images_of(restored, group)
            for first in range(0, len(restored), BATCH):
                rows = slice(first, first + BATCH)
                x, truth, source = restored[rows], group.truths[rows], group.sources[rows]
                figures = {"psnr": restoration_psnr(x, truth, self.border)}
                if side - 2 * self.border >= WINDOW:
                    figures["ssim"] = restoration_ssim(x, truth, self.border)
                if self.perceptual is not None and side >= self.perceptual.smallest:
                    device = self.perceptual.shift.device
                    near, real = (as_levels(one).float().to(device) for one in (x, truth))
                    figures["lpips"] = self.perceptual.by_image(near, real).double().cpu()
                if self.pairs.factor > 1:
                    figures["consistency"] = consistency_error(x, source, self.pairs.factor)
                for name, values in figures.items():
                    found.setdefault(name, []).append(values)
        return {name: torch.cat(values) for name, values in found.items()}

    def of_sets(self, images: Sequence[Tensor]) -> dict[str, float]:
        """`frechet` and `kid` of all the images to all the true ones; empty without a feature network, and for fewer
        than 10 images."""
        if self.net is None or len(self.pairs) < MINIMUM:
            return {}
        if not self._truth:
            self._truth["features"] = self.features([group.truths for group in self.pairs.groups])
        features = self.features(images)
        subsets = 1 if len(features) <= KID_SET else 50
        return {
            "frechet": frechet_between(features, self._truth["features"]),
            "kid": kid(features, self._truth["features"], subsets, KID_SET)[0],
        }

    def features(self, images: Sequence[Tensor]) -> Tensor:
        """The features (N, D) of images by group."""
        assert self.net is not None
        return torch.cat([extract(self.net, group)[0] for group in images])

    def measure(self, images: Sequence[Tensor]) -> dict[str, Any]:
        """All figures: means by name, and under `interval` the 95 % intervals of those that are means over images, in
        which the pairs of one image are not independent."""
        groups = self.pairs.origins
        found = {name: mean_estimate(values, groups) for name, values in self.by_image(images).items()}
        means = {name: estimate.value for name, estimate in found.items()}
        intervals = {name: [estimate.low, estimate.high] for name, estimate in found.items()}
        return {**means, **self.of_sets(images), "interval": intervals}

    def bicubic(self) -> dict[str, Any]:
        """The figures of the sources themselves, enlarged by bicubic interpolation."""
        return self.measure(self.pairs.enlarged())

    def truth(self) -> list[Tensor]:
        """The true images in [-1, 1], by group."""
        return [to_float(group.truths) for group in self.pairs.groups]


def check_images_of(images: Tensor, group: PairGroup) -> None:
    """Raise BadInput for images that are not of the pairs' size."""
    if images.shape != group.truths.shape:
        raise BadInput(f"restored images must be {tuple(group.truths.shape)}, found {tuple(images.shape)}")


def open_meter(
    pairs: RestorationPairs,
    border: int = 0,
    features: str | Path | nn.Module | None = None,
    lpips: str | Path | None = None,
    device: torch.device | None = None,
    report: Callable[[str], None] = ignore_messages,
) -> RestorationMeter:
    """A meter with what is on this machine; nothing is downloaded.

    Args:
        pairs: of `open_pairs`.
        border: pixels at each side that PSNR and SSIM leave out.
        features: the feature network of Fréchet distance and KID, or its name. Default: `efficientnet_lite0`, where its
            weights are.
        lpips: the trunk of LPIPS, or a file or folder of its weights. Default: the first trunk that is found.
        device: of the networks.
        report: receives a line on each figure that is not measured, and why.

    Raises:
        BadInput: for what was named and cannot be loaded, and a border that leaves nothing.
    """
    side = min(min(group.truths.shape[-2:]) for group in pairs.groups)
    if 2 * border >= side:
        raise BadInput(f"border {border} leaves nothing of images of {side} pixels: at most {(side - 1) // 2}")
    perceptual = perceptual_distance(lpips)
    if perceptual is None:
        report(f"LPIPS is left out: its weights are not on this machine; {HOW_TO_GET} (--lpips FILE)")
    elif side < perceptual.smallest:
        report(f"LPIPS is left out: it needs images of at least {perceptual.smallest} pixels, these have {side}")
    if side - 2 * border < WINDOW:
        report(f"SSIM is left out: it needs images of at least {WINDOW} pixels")
    net: nn.Module | None = None
    try:
        net = feature_net(FEATURES if features is None else str(features) if isinstance(features, Path) else features)
    except BadInput as error:
        if features is not None:
            raise
        report(f"Fréchet distance and KID are left out: {error}")
    if net is not None and len(pairs) < MINIMUM:
        report(f"Fréchet distance and KID are left out: they need {MINIMUM} images, better 100 or more")
    for one in (perceptual, net):
        if isinstance(one, nn.Module) and device is not None:
            one.to(device)
    return RestorationMeter(pairs, border, perceptual, net)
