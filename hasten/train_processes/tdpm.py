"""Truncated diffusion: a chain that is cut at T' and begins from a generator trained with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..denoiser import Denoiser
from ..errors import BadInput, check_choices, check_numbers
from ..model.model import Model
from ..nets.prior import PriorNet, SharedPrior
from ..predictions import V
from ..schedules.continuous import VPCosine
from ..schedules.truncated import Truncated
from ..train.implicit_prior import PriorTraining
from ..train.losses import DenoisingLoss
from ..train.sources import Data
from ..train.trained_module import TrainedModule
from ._base import MakeUNet, TrainProcess, TrainSettings

__all__ = ["TDPM"]


@dataclass(frozen=True)
class TDPM(TrainProcess):
    """`E_{t <= T'} w |error|^2 + distance(z_T' of the data, G(xi))`: all evaluations but one are spent below T'.

    At T' the noise hides the details, so that a generator trained in minutes draws z_T' well; the steps below T' repair
    the rest. Per batch: a denoising step, a step of the generator, a step of its critic. Sampling: `starts.prior`, one
    evaluation, then any sampler from T'.

    Not for a model of which many steps are expected: a plain one is as good then, and simpler to train. The smaller T',
    the fewer steps are needed and the more has to be done by the generator.

    Args:
        time: T', on the cosine path alpha = cos(pi t / 2).
        distance: "gan", a critic with R1 penalty, or "ct", conditional transport.
        prior: G: "shared", the network itself at t = 1 (TDPM+), or "own", a network of its own.
        prior_widths: of an own network.
        generator_lr, critic_lr: peak learning rates. A critic of a higher rate soon wins; with "shared", a generator of
            a much higher rate disturbs the denoising.
        r1: weight of the gradient penalty of "gan".

    Raises:
        BadInput: for unknown choices and a time outside (0, 1).

    References:
        Zheng, He, Chen, Zhou 2022, arXiv:2202.09671; Zheng, Zhou 2020, arXiv:2012.14350 (conditional transport).
    """

    time: float = 0.4
    distance: str = "gan"
    prior: str = "shared"
    prior_widths: tuple[int, ...] = (32, 64)
    generator_lr: float = 3e-4
    critic_lr: float = 1e-4
    r1: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self, distance=("gan", "ct"), prior=("shared", "own"))
        check_numbers(self)
        if not 0 < self.time < 1:
            raise BadInput(f"tdpm needs 0 < time < 1, found {self.time}")
        if not (self.generator_lr > 0 and self.critic_lr > 0 and self.r1 >= 0):
            raise BadInput("tdpm needs generator_lr and critic_lr above 0 and r1 of at least 0")

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        """The network on the cosine path up to T', v-prediction."""
        return Denoiser(unet(), Truncated(VPCosine(offset=0.0), self.time), V())

    def modules(self, denoiser: Denoiser, data: Data, settings: TrainSettings) -> list[TrainedModule]:
        """The denoiser, its generator and what judges that."""
        loss = DenoisingLoss(label_drop=settings.label_drop)
        classes = len(data.classes or ())
        prior: nn.Module = SharedPrior(self.time)
        if self.prior == "own":
            patch = int(getattr(denoiser.net, "patch", 1))
            try:
                prior = PriorNet(data.shape, self.time, classes, self.prior_widths, patch=patch)
            except ValueError as e:
                raise BadInput(f"tdpm: prior_widths={self.prior_widths}: {e}") from e
        training = PriorTraining(denoiser, prior, tuple(data.shape), classes, loss)
        model = TrainedModule(
            "model", denoiser, lambda batch: loss(denoiser, batch), lr=settings.lr, optimiser=settings.optimizer
        )
        if self.distance == "gan":
            return [model, *training.gan(self.generator_lr, self.critic_lr, self.r1)]
        return [model, *training.transport(self.generator_lr, self.critic_lr)]

    def finish(self, averaged: Mapping[str, nn.Module], model: Model) -> Model:
        """The model with its part "prior", which sampling begins from."""
        prior: Any = SharedPrior(self.time)
        if self.prior == "own":
            prior = averaged["prior"] if self.distance == "gan" else averaged["prior"]["generator"]  # type: ignore[index]
        parts = {**model.parts, "prior": prior.eval().requires_grad_(False).cpu()}
        return replace(model, parts=parts, start="prior", times="trailing", steps=5)
