"""The loss of a candidate against the plain model, seed by seed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..metrics import Reference, extract, net_name
from ..metrics.paired import psnr_by_image
from ..metrics.paired_loss import PairedLoss, distance_loss, mean_loss

__all__ = ["Distance", "Figure", "Psnr", "Unlikeness"]

Rows = Mapping[str, Tensor]  # values of each seed, by name, each (N, ...)
SCALE = "scale"


class Figure(Protocol):
    """What a loss is measured by."""

    name: str
    seeds: int  # of a certificate, by default
    least: int  # of a round

    def rows(self, images: Tensor, plain: Tensor) -> dict[str, Tensor]:
        """What of each seed the loss is computed from."""
        ...

    def loss(self, rows: Rows, plain: Rows, groups: Sequence[Hashable] | None) -> PairedLoss:
        """The loss of a candidate."""
        ...

    def show(self, loss: float) -> str:
        """A loss in words."""
        ...

    def bound(self, loss: float) -> str:
        """A bound of the loss in words."""
        ...


@dataclass
class Psnr:
    """The mean PSNR to the plain model's images of the same seeds; the loss is its negative."""

    name: str = "PSNR to the plain model's images"
    seeds: int = 64
    least: int = 4

    def rows(self, images: Tensor, plain: Tensor) -> dict[str, Tensor]:
        """Decibels of each pair."""
        return {"psnr": psnr_by_image(images, plain)}

    def loss(self, rows: Rows, plain: Rows, groups: Sequence[Hashable] | None) -> PairedLoss:
        """The negative mean."""
        return mean_loss(-rows["psnr"], groups=groups)

    def show(self, loss: float) -> str:
        """As in '31.2 dB'."""
        return f"{-loss:.1f} dB"

    def bound(self, loss: float) -> str:
        """As in 'at least 30.0 dB'."""
        return f"at least {-loss:.1f} dB"


@dataclass
class Distance:
    """By how much the Fréchet distance to real images is larger than the plain model's, as a share of that.

    Args:
        reference: statistics of the real images.
        net: their feature network.
    """

    reference: Reference
    net: nn.Module
    name: str = ""
    seeds: int = 480
    least: int = 16

    def __post_init__(self) -> None:
        self.name = f"Fréchet distance to {self.reference.name} ({net_name(self.net)} features) over the plain model's"
        # with fewer images than half the features the jackknife leaves most of the bias, and every loss is about 0
        self.least = max(self.least, len(self.reference.mean) // 2)

    def rows(self, images: Tensor, plain: Tensor) -> dict[str, Tensor]:
        """Features of the images."""
        return {"features": extract(self.net, images)[0]}

    def loss(self, rows: Rows, plain: Rows, groups: Sequence[Hashable] | None) -> PairedLoss:
        """The ratio of the distances, less 1."""
        reference = self.reference
        return distance_loss(rows["features"], plain["features"], reference.mean, reference.covariance, groups)

    def show(self, loss: float) -> str:
        """As in '3.1 % larger'."""
        return f"{abs(100 * loss):.1f} % {'larger' if loss >= 0 else 'smaller'}"

    def bound(self, loss: float) -> str:
        """As in 'at most 5.0 % larger'."""
        return f"at most {self.show(loss)}" if loss >= 0 else f"at least {self.show(loss)}"


@dataclass
class Unlikeness:
    """The distance of features to the plain image of the same seed, as a share of that between two seeds.

    For models without real images to compare with.

    Args:
        net: the feature network.
        scale, scale_error: mean distance between the plain images of two seeds of one prompt, and its standard error.
    """

    net: nn.Module
    scale: float = 1.0
    scale_error: float = 0.0
    name: str = ""
    seeds: int = 64
    least: int = 4
    plain_features: dict[int, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.name = f"distance of {net_name(self.net)} features to the plain image, over that between two seeds"

    def rows(self, images: Tensor, plain: Tensor) -> dict[str, Tensor]:
        """Feature distances of each pair."""
        difference = extract(self.net, images)[0].double() - extract(self.net, plain)[0].double()
        return {"distance": difference.flatten(1).norm(dim=1)}

    def calibrate(self, images: Tensor, others: Tensor) -> None:
        """Set the scale from the plain images of two seeds of each prompt."""
        distances = self.rows(images, others)["distance"]
        self.scale = float(distances.mean())
        self.scale_error = float(distances.std() / len(distances) ** 0.5)

    def loss(self, rows: Rows, plain: Rows, groups: Sequence[Hashable] | None) -> PairedLoss:
        """The mean distance over the scale."""
        return mean_loss(rows["distance"], max(self.scale, 1e-12), self.scale_error, groups)

    def show(self, loss: float) -> str:
        """As in '4.2 % of another seed'."""
        return f"{100 * loss:.1f} % of what another seed changes"

    def bound(self, loss: float) -> str:
        """As in 'at most ...'."""
        return f"at most {self.show(loss)}"


def joined(parts: Sequence[Rows]) -> dict[str, Tensor]:
    """Rows of consecutive seeds as one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
