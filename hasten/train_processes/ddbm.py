"""Train a denoising diffusion bridge model (DDBM)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from ..denoiser import Denoiser
from ..errors import check_numbers
from ..model.model import Model
from ..processes.ddbm import DDBM, BridgeEDM
from ..train.data import to_float
from ..train.sources import Data
from ._base import MakeUNet, TrainProcess

MEASURED = 512


@dataclass(frozen=True)
class TrainDDBM(TrainProcess):
    """A diffusion between pairs of images, pinned to the source, which the network reads at every step.

    The preconditioning uses the variances and the covariance of the first 512 pairs. The model samples by `dbim`.

    Args:
        base: "vp" or "ve".
        sigma_max: of "ve": the noise level at the source.

    References:
        Zhou, Lou, Khanna, Ermon 2023, arXiv:2309.16948; Zheng et al. 2024, arXiv:2405.15885 (dbim).
    """

    base: str = "vp"
    sigma_max: float = 80.0
    needs_source: ClassVar[bool] = True
    takes_source: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(self)
        DDBM(self.base, sigma_max=self.sigma_max)

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        process = DDBM(self.base, sigma_max=self.sigma_max)
        return Denoiser(unet(source_channels=data.shape[0]), process, measured_prediction(process, data))

    def finish(self, averaged: Mapping[str, nn.Module], model: Model) -> Model:
        return replace(model, sampler="dbim", times="karras", steps=10)


def measured_prediction(process: DDBM, data: Data) -> BridgeEDM:
    """The preconditioning of a bridge for the second moments of some of its pairs."""
    rows = torch.linspace(0, len(data) - 1, min(len(data), MEASURED)).long().tolist()
    x = to_float(data.images(rows)).double()
    y = x if data.conditions is None else data.conditions(rows)["source"].double()
    # about 0, as the input of the network is
    v0, v1, k = (float((p * q).mean()) for p, q in ((x, x), (y, y), (x, y)))
    v0, v1 = max(v0, 1e-4), max(v1, 1e-4)
    limit = 0.99 * (v0 * v1) ** 0.5  # the pairs of an identical or blank set would leave nothing to learn
    return BridgeEDM(v0**0.5, v1**0.5, min(max(k, -limit), limit), float(process.alpha(1.0)), float(process.sigma(1.0)))
