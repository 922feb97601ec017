"""Train a variational diffusion model: the noise schedule is learned, and the loss is the bound in bits/dim."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import BadInput, check_numbers
from ..likelihood import decoder_log_probability
from ..likelihood._base import level_indices
from ..model.model import Model
from ..nets.fourier_unet import FourierUNet
from ..nets.monotone import MonotoneGamma
from ..predictions import Eps
from ..schedules.discrete import Discrete
from ..train.losses import DenoisingLoss, stratified
from ..train.sources import Data
from ..train.trained_module import TrainedModule
from ._base import MakeUNet, TrainProcess, TrainSettings

ENTRIES = 1000  # of the table that the learned schedule is saved as
TIME_SCALE = 100.0  # of lam, which spans about 9, in the time embedding


@dataclass(frozen=True)
class VDM(TrainProcess):
    """A variance-preserving process with `sigma^2 = sigmoid(gamma(t))`, trained on the variational bound in bits/dim,

        1/2 E gamma'(t) ||eps - eps_hat||^2 + KL(q(z_1 | x) || N(0, I)) - log P(x | z_0).

    The ends of gamma are trained on the bound. Its shape between them does not change the bound, only the variance of
    its estimate, which the shape is trained to lower. The learned schedule is saved as a table, `Discrete`, linear in
    log SNR, on which every sampler works. For low bits/dim, not for better images.

    Args:
        levels: K, the number of values of a pixel.
        gamma_min, gamma_max: -log SNR at the ends at first. None: for gamma_min the level at which the noise is a third
            of half a bin, -13.3 for 256 levels.
        ends, shape: whether the ends and the shape of gamma are learned.
        fourier: give the network Fourier features of its input, whose periods are two bins and one.

    References:
        Kingma, Salimans, Poole, Ho 2021, arXiv:2107.00630.
    """

    levels: int = 256
    gamma_min: float | None = None
    gamma_max: float = 5.0
    ends: bool = True
    shape: bool = True
    fourier: bool = True
    negative: ClassVar[tuple[str, ...]] = ("gamma_min", "gamma_max")

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise BadInput(f"vdm needs levels of at least 2, found {self.levels}")
        if not self.first_gamma < self.gamma_max:
            raise BadInput(f"vdm needs gamma_min < gamma_max, found {self.first_gamma:g} and {self.gamma_max:g}")
        check_numbers(self)

    @property
    def first_gamma(self) -> float:
        """gamma(0) before training."""
        return 2 * math.log(1 / (3 * (self.levels - 1))) if self.gamma_min is None else self.gamma_min

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        config: dict[str, Any] = {**unet().config, "time_scale": TIME_SCALE}  # type: ignore[dict-item]
        n = max(round(math.log2((self.levels - 1) / 2)), 0)
        net = FourierUNet(**config, exponents=(n, n + 1) if self.fourier else ())
        gamma = MonotoneGamma(self.first_gamma, self.gamma_max, ends=self.ends, shape=self.shape)
        return Denoiser(WithGamma(net, gamma), learned_schedule(gamma), Eps(), clock="lam")

    def modules(self, denoiser: Denoiser, data: Data, settings: TrainSettings) -> list[TrainedModule]:
        loss = BoundLoss(self.levels, settings.label_drop)
        return [
            TrainedModule(
                "model", denoiser, lambda batch: loss(denoiser, batch), lr=settings.lr, optimiser=settings.optimizer
            )
        ]

    def finish(self, averaged: Mapping[str, nn.Module], model: Model) -> Model:
        net: Any = model.denoiser.net
        denoiser = Denoiser(net.net, learned_schedule(net.gamma), Eps(), clock="lam").eval().requires_grad_(False)
        denoiser.null_label = model.denoiser.null_label
        low, high = (float(end) for end in net.gamma.bounds())
        return replace(model, denoiser=denoiser, card={**model.card, "levels": self.levels, "gamma": [low, high]})


class WithGamma(nn.Module):
    """A network and the schedule that is trained with it."""

    def __init__(self, net: FourierUNet, gamma: MonotoneGamma) -> None:
        super().__init__()
        self.net, self.gamma, self.config = net, gamma, net.config
        self.classes, self.null_label, self.multiple = net.classes, net.null_label, net.multiple

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """The raw output of the network."""
        result: Tensor = self.net(x, time, label)
        return result


@dataclass(frozen=True)
class BoundLoss:
    """The variational bound in continuous time, in bits/dim, with a learned schedule.

    Args:
        levels: K of the data.
        label_drop: probability that the label of a sample is dropped.
    """

    levels: int = 256
    label_drop: float = 0.0

    def __call__(self, denoiser: Denoiser, batch: dict[str, Tensor]) -> Tensor:
        """The mean bound of a batch `x` (B, C, H, W) in [-1, 1]; `denoiser.net` is a network with its `gamma`."""
        diffusion, prior, reconstruction = self.terms(denoiser, batch)
        return (diffusion + prior + reconstruction).mean()

    def terms(self, denoiser: Denoiser, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The three terms of each sample, (B,) float32."""
        net: Any = denoiser.net
        x = batch["x"].float()
        cond = DenoisingLoss(label_drop=self.label_drop).drop(batch, denoiser.null_label)
        unit = x[0].numel() * math.log(2)
        t = stratified(len(x), x.device).float().to(x.device)
        with torch.autocast(x.device.type, enabled=False):
            low, high = net.gamma.bounds()
            s, slope = net.gamma.shape(t)
            if net.gamma.learned_shape:
                seen: list[Tensor] = []  # the diffusion term of each sample, for the hooks below
                for value in (s, slope):
                    if value.requires_grad:
                        value.register_hook(lambda grad: 2 * seen[0] * grad)  # the gradient of its square
            gamma = low + (high - low) * s
            rate = (high - low) * slope
            eps = torch.randn_like(x)
            alpha, sigma = (torch.sigmoid(sign * gamma).sqrt().view(-1, 1, 1, 1) for sign in (-1, 1))
            z = alpha * x + sigma * eps
        error = (net(z, -0.5 * gamma, **cond).float() - eps).square().flatten(1).sum(1)
        diffusion = 0.5 * rate * error / unit
        if net.gamma.learned_shape:
            seen.append(diffusion.detach())
        prior = 0.5 * (
            torch.sigmoid(-high) * x.square().flatten(1).sum(1)
            + x[0].numel() * (torch.sigmoid(high) - 1 - nn.functional.logsigmoid(high))
        )
        q = torch.exp(0.5 * low)
        k = level_indices(x, self.levels)
        log_p = decoder_log_probability(x + q * torch.randn_like(x), k, self.levels, q)
        return diffusion, prior / unit, -log_p.float().flatten(1).sum(1) / unit


def learned_schedule(gamma: MonotoneGamma) -> Discrete:
    """The schedule as a table, `alpha^2 = sigmoid(-gamma)`."""
    values = torch.tensor(gamma.table(ENTRIES), dtype=torch.float64)
    return Discrete(tuple(torch.sigmoid(-values).tolist()), "log_q")
