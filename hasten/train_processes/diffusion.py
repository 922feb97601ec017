"""Train ordinary diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..denoiser import Denoiser
from ..errors import BadInput, check_choices
from ..predictions import prediction_from
from ..schedules.continuous import Flow, SubVP, VPCosine, VPLinear
from ..train.losses import (
    DenoisingLoss,
    EDMWeight,
    LikelihoodWeight,
    LogitNormal,
    LogNormal,
    MinSNR,
    Uniform,
    UniformLogSNR,
    snr_weight,
    truncated_snr_weight,
    v_weight,
    x0_weight,
)
from ..train.sources import Data
from ._base import MakeUNet, TrainProcess, TrainSettings

SCHEDULES = {"cosine": VPCosine(offset=0.0), "vp": VPLinear(), "sub_vp": SubVP(), "flow": Flow()}
WEIGHTS = {
    "own": None, "x0": x0_weight, "snr": snr_weight, "v": v_weight, "truncated_snr": truncated_snr_weight,
    "min_snr": MinSNR(), "edm": EDMWeight(), "likelihood": LikelihoodWeight(),
}  # fmt: skip
TIMES: dict[str, Any] = {
    "uniform": Uniform(),
    "log_snr": UniformLogSNR(),
    "logit_normal": LogitNormal(),
    "log_normal": LogNormal(),
}


@dataclass(frozen=True)
class Diffusion(TrainProcess):
    """v-prediction on the cosine path `x_t = cos(pi t/2) x + sin(pi t/2) eps`: the default.

    Args:
        weight: of the squared error: "own", the prediction's own; "likelihood", that of the variational bound, for
            lower bits/dim, not for better images; "x0", "snr", "v", "truncated_snr", "min_snr", "edm" (`train.losses`).
        times: their distribution: "uniform"; "log_snr", uniform in log SNR, which the likelihood weight should have;
            "logit_normal", "log_normal".
        schedule: "cosine", "vp", "sub_vp" or "flow".
        prediction: "v", "eps" (not on a schedule that ends at pure noise), "x0", "flow" or "edm".

    References:
        Salimans, Ho 2022, arXiv:2202.00512; Song, Durkan, Murray, Ermon 2021, arXiv:2101.09258 (likelihood).
    """

    weight: str = "own"
    times: str = "uniform"
    schedule: str = "cosine"
    prediction: str = "v"

    def __post_init__(self) -> None:
        check_choices(
            self, weight=tuple(WEIGHTS), times=tuple(TIMES), schedule=tuple(SCHEDULES),
            prediction=("v", "eps", "x0", "flow", "edm"),
        )  # fmt: skip
        if self.prediction == "eps" and SCHEDULES[self.schedule].zero_snr:
            raise BadInput(
                f"eps says nothing of the image at the end of the schedule {self.schedule}, which is pure noise: take "
                "prediction=v, or schedule=vp"
            )

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        return Denoiser(unet(), SCHEDULES[self.schedule], prediction_from(self.prediction))

    def batch_loss(self, denoiser: Denoiser, settings: TrainSettings) -> DenoisingLoss:
        weight: Any = WEIGHTS[self.weight]
        if self.weight == "likelihood" and self.times == "log_snr":
            weight = snr_weight  # the rest of the weight is in the density of the times
        return DenoisingLoss(label_drop=settings.label_drop, times=TIMES[self.times], weight=weight)
