"""Train super-resolution: diffusion from noise of large images that reads the small one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import BadInput, check_choice, check_int, check_number
from ..model.model import Model
from ..model.residual import encode_residual
from ..nets.lwtdm import LWTDM
from ..predictions import prediction_from
from ..schedules.base import Schedule
from ..schedules.continuous import VPCosine
from ..schedules.discrete import Discrete
from ..train.data import to_float
from ..train.losses import DenoisingLoss
from ..train.sources import Data
from ..train.trained_module import TrainedModule
from ._base import MakeUNet, TrainProcess, TrainSettings

MEASURED = 256  # images of which the differences from the enlarged ones are measured


@dataclass(frozen=True)
class SuperResolution(TrainProcess):
    """Diffusion from noise of images that are `factor` times larger than the source image, which the network reads.

    `x_t = alpha x + sigma eps`, where x is the image, or with `residual` the difference from the enlarged source over
    its standard deviation. The defaults converge in a few thousand steps; the paper's are `width=384,dropout=0.1,
    schedule=linear,prediction=eps,loss=l1,residual=false`.

    Args:
        factor: of the sides, 2, 4, 8, ...
        network: "lwtdm", or "unet": a U-Net of the enlarged source and x (SR3), with the widths of the run.
        width: of `LWTDM`, a multiple of 128.
        dropout: of `LWTDM`, in [0, 1).
        schedule: "cosine", which ends at pure noise, or "linear", the paper's table of 2000 betas from 5e-4 to 2e-2.
        prediction: "v", "eps" or "x0".
        loss: "l2" or "l1".
        residual: whether x is the difference from the enlarged source.

    Raises:
        BadInput: for a value that cannot be.

    References:
        An, Xue, Huo, Xiang, Pan 2024, "Efficient remote sensing image super-resolution via lightweight diffusion
        models", IEEE Geoscience and Remote Sensing Letters; Saharia et al. 2021, arXiv:2104.07636 (SR3); Li et al.
        2021, arXiv:2104.14951 (residual prediction); Lin et al. 2023, arXiv:2305.08891 (an end at pure noise).
    """

    factor: int = 4
    network: str = "lwtdm"
    width: int = 128
    dropout: float = 0.0
    schedule: str = "cosine"
    prediction: str = "v"
    loss: str = "l2"
    residual: bool = True

    needs_source: ClassVar[bool] = True
    takes_source: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_int("super_resolution: factor", self.factor, 2)
        check_int("super_resolution: width", self.width, 1)
        if not 0 <= check_number("super_resolution: dropout", self.dropout) < 1:
            raise BadInput(f"super_resolution: dropout is a fraction below 1, found {self.dropout}")
        check_choice("super_resolution: network", self.network, ("lwtdm", "unet"))
        check_choice("super_resolution: schedule", self.schedule, ("cosine", "linear"))
        check_choice("super_resolution: prediction", self.prediction, ("v", "eps", "x0"))
        check_choice("super_resolution: loss", self.loss, ("l2", "l1"))
        if self.prediction == "eps" and self.schedule == "cosine":
            raise BadInput(
                "super_resolution: an eps-prediction says nothing at the pure noise in which the cosine schedule ends: "
                "set schedule=linear, or prediction v or x0"
            )

    @property
    def degradation(self) -> str:
        """What makes the sources where the run names nothing else."""
        return f"low_resolution:factor={self.factor}"

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        assert data.conditions is not None  # the run gives the sources of a process that needs them
        channels, height, width = data.shape
        wanted = (channels, height // self.factor, width // self.factor)
        found = tuple(data.conditions([0])["source"].shape[1:])
        if height % self.factor or width % self.factor or found != wanted:
            raise BadInput(
                f"super_resolution: images of {width}x{height} and factor {self.factor} need sources of "
                f"{width / self.factor:g}x{height / self.factor:g}, found {found[2]}x{found[1]}"
            )
        table: Schedule = VPCosine(offset=0.0)
        if self.schedule == "linear":
            table = Discrete.from_betas(torch.linspace(5e-4, 2e-2, 2000, dtype=torch.float64))
        net: Any
        if self.network == "unet":
            net = unet(source_channels=channels, source_factor=self.factor)
        else:
            net = lwtdm(channels, height, width, self.factor, self.width, self.dropout)
        return Denoiser(net, table, prediction_from(self.prediction))

    def modules(self, denoiser: Denoiser, data: Data, settings: TrainSettings) -> list[TrainedModule]:
        std = residual_std(data, self.factor) if self.residual else None
        denoiser.residual_std = std  # for `finish`; an attribute of the average too
        loss = DenoisingLoss(label_drop=0.0, norm=self.loss)

        def of_batch(batch: dict[str, Tensor]) -> Tensor:
            if std is not None:
                batch = {**batch, "x": encode_residual(batch["x"], batch["source"], self.factor, std)}
            return loss(denoiser, batch)

        return [TrainedModule("model", denoiser, of_batch, lr=settings.lr, optimiser=settings.optimizer)]

    def finish(self, averaged: Mapping[str, nn.Module], model: Model) -> Model:
        std = getattr(model.denoiser, "residual_std", None)
        changes: dict[str, Any] = {"codec": "residual", "residual_std": std} if std is not None else {}
        return replace(model, steps=20, classes=None, **changes)


def lwtdm(channels: int, height: int, width: int, factor: int, features: int, dropout: float) -> LWTDM:
    """The network for images of this size. Raises BadInput for sides and widths that it does not take."""
    try:
        net = LWTDM(channels, factor=factor, width=features, dropout=dropout)
    except ValueError as e:
        raise BadInput(f"super_resolution: {e}") from e
    if height % net.multiple or width % net.multiple:
        near = max(round(max(height, width) / net.multiple), 1) * net.multiple
        raise BadInput(
            f"super_resolution: images of {width}x{height} do not fit LWTDM at factor {factor}, whose sides are "
            f"multiples of {net.multiple}: set crop (--crop) {near}"
        )
    return net


def residual_std(data: Data, factor: int) -> float:
    """The standard deviation of images minus their enlarged sources, over some of the data.

    Raises:
        BadInput: where the images are their enlarged sources, and nothing is left to learn.
    """
    assert data.conditions is not None
    rows = sorted(set(torch.linspace(0, len(data) - 1, MEASURED).round().long().tolist()))
    source = data.conditions(rows)["source"]
    std = float(encode_residual(to_float(data.images(rows)), source, factor, 1.0).double().square().mean().sqrt())
    if not std > 1e-6 or not math.isfinite(std):
        raise BadInput(f"{data.source or 'the data'}: the enlarged small images equal the large ones: all is smooth")
    return std
