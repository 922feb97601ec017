"""Training a generator of the diffused data at T', by a critic or by conditional transport."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..denoiser import Denoiser
from ..nets.critic import plain_critic
from ..nets.transport import Navigator, TransportFeatures
from ..predictions import spread
from .adversarial import margin_loss, r1_penalty
from .losses import DenoisingLoss
from .trained_module import TrainedModule, frozen_parameters
from .transport import TransportLoss

__all__ = ["PriorTraining"]

LAZY = 16  # one step in so many, on average, has the gradient penalty, with that weight


class PriorTraining:
    """The losses of a generator G of z_T' and of what judges it, against data diffused to T' with noise of its own.

    With d the critic, q the law of z_T' of data:

        L_G = softplus(-d(G(xi))),   L_d = softplus(-d(z)) + softplus(d(G(xi))) + r1 / 2 |grad d(z)|^2,   z ~ q

    or, by conditional transport, G and the navigator minimise and the features maximise `TransportLoss(z, G(xi))`.
    Labels are dropped as in the denoising loss, so that G also draws the states of the unconditional branch.

    Args:
        denoiser: whose schedule is diffused, and whose network a `SharedPrior` uses.
        prior: G, called as `prior(denoiser, xi, **cond)`.
        shape: S of a sample.
        classes: 0 for none.
        loss: the denoising loss, for its label dropping.
    """

    def __init__(
        self, denoiser: Denoiser, prior: Any, shape: tuple[int, ...], classes: int, loss: DenoisingLoss
    ) -> None:
        self.denoiser, self.prior, self.shape, self.classes, self.loss = denoiser, prior, shape, classes, loss
        # the module whose weights G has: its own, or those of the denoiser
        self.module: nn.Module = prior if any(True for _ in prior.parameters()) else denoiser

    def gan(self, lr: float, critic_lr: float, r1: float) -> list[TrainedModule]:
        """The generator, then its critic.

        Args:
            lr, critic_lr: peak learning rates.
            r1: weight of the gradient penalty.
        """
        critic = plain_critic(self.shape, self.classes)

        def judge(z: Tensor, label: Tensor | None) -> Tensor:
            logits: Tensor = critic(z, self.prior.time, label)
            return logits.float()

        def generator_loss(batch: dict[str, Tensor]) -> Tensor:
            fake, label = self.generate(batch)
            with frozen_parameters(critic):
                return F.softplus(-judge(fake, label)).mean()

        def critic_loss(batch: dict[str, Tensor]) -> Tensor:
            real, fake, label = self.diffused(batch), batch["prior_fake"], batch.get("prior_label")
            loss = margin_loss(judge(real, label), judge(fake, label), float("inf"))
            if r1 and float(torch.rand(())) < 1 / LAZY:
                loss = loss + LAZY * r1 / 2 * r1_penalty(lambda z: judge(z[0], label), [real])
            return loss

        return [self._generator(self.module, generator_loss, lr), _judge("critic", critic, critic_loss, critic_lr)]

    def transport(self, lr: float, critic_lr: float, width: int = 64) -> list[TrainedModule]:
        """The generator with the navigator, then the features.

        Args:
            lr, critic_lr: peak learning rates.
            width: of the features.
        """
        features, navigator = TransportFeatures(self.shape, width), Navigator(width)
        loss = TransportLoss(features, navigator)
        together = nn.ModuleDict({"generator": self.module, "navigator": navigator})

        def generator_loss(batch: dict[str, Tensor]) -> Tensor:
            fake, label = self.generate(batch)
            with frozen_parameters(features):
                return loss(self.diffused(batch), fake, label)

        def feature_loss(batch: dict[str, Tensor]) -> Tensor:
            with frozen_parameters(navigator):
                return -loss(self.diffused(batch), batch["prior_fake"], batch.get("prior_label"))

        return [self._generator(together, generator_loss, lr), _judge("features", features, feature_loss, critic_lr)]

    def generate(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """G(xi) (B, *S) and the labels (B,), left in the batch as `prior_fake` and `prior_label`."""
        cond = self.loss.drop(batch, self.denoiser.null_label)
        fake: Tensor = self.prior(self.denoiser, torch.randn_like(batch["x"]), **cond)
        label = cond.get("label")
        batch["prior_fake"] = fake.detach()
        if label is not None:
            batch["prior_label"] = label
        return fake, label

    def diffused(self, batch: dict[str, Tensor]) -> Tensor:
        """The data of a batch at T' (B, *S), with fresh noise."""
        x, schedule = batch["x"], self.denoiser.schedule
        alpha, sigma = (f(self.prior.time) for f in (schedule.alpha, schedule.sigma))
        return spread(alpha, x) * x + spread(sigma, x) * torch.randn_like(x)

    @staticmethod
    def _generator(module: nn.Module, loss: Callable[[dict[str, Tensor]], Tensor], lr: float) -> TrainedModule:
        return TrainedModule("prior", module, loss, lr=lr, betas=(0.0, 0.99), weight_decay=0.0)


def _judge(name: str, module: nn.Module, loss: Callable[[dict[str, Tensor]], Tensor], lr: float) -> TrainedModule:
    """What judges the generator, trained after it."""
    return TrainedModule(name, module, loss, lr=lr, betas=(0.0, 0.99), weight_decay=0.0)
