"""The adversarial term of the loss of an autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import BadInput
from ..nets.patch_discriminator import PatchDiscriminator
from .trained_module import frozen_parameters

__all__ = ["PatchGan"]


class PatchGan:
    """Losses of a patch discriminator D and of the decoder against it, by the hinge form:

        D: (mean max(0, 1 - D(x)) + mean max(0, 1 + D(x'))) / 2          decoder: -lambda mean D(x')

    with `lambda = weight min(|dL/dw| / |d mean D(x')/dw|, 10^4)` where adaptive, for the decoder's last layer w and the
    rest of the loss L, else `lambda = weight`. The decoder's term is 0 until the discriminator has been trained once,
    so that `TrainedModule(..., start=fraction)` of the discriminator starts both.

    Args:
        discriminator: D.
        weight: >= 0.
        adaptive: balance the gradients of both terms at the last layer.

    Raises:
        BadInput: for a negative weight.

    References:
        Esser, Rombach, Ommer 2021, arXiv:2012.09841; Lim, Ye 2017, arXiv:1705.02894 (hinge).
    """

    def __init__(self, discriminator: PatchDiscriminator, weight: float, adaptive: bool = True) -> None:
        if not weight >= 0:
            raise BadInput(f"gan_weight must be 0 or more, got {weight}")
        self.discriminator, self.weight, self.adaptive = discriminator, weight, adaptive

    def decoder_term(self, out: Tensor, loss: Tensor, last: nn.Parameter) -> Tensor:
        """The decoder's term, a scalar.

        Args:
            out: reconstructions (B, C, H, W).
            loss: the rest of its loss, a scalar.
            last: the weight of its last layer.
        """
        if not self.discriminator.started:
            return torch.zeros_like(loss)
        with frozen_parameters(self.discriminator):
            fooled = -self.discriminator(out).float().mean()
        if not self.adaptive:
            return self.weight * fooled
        rest, own = (torch.autograd.grad(one, last, retain_graph=True)[0].norm() for one in (loss, fooled))
        return self.weight * (rest / (own + 1e-4)).clamp(max=1e4).detach() * fooled

    def discriminator_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The discriminator's loss on `x` and `reconstruction` of a batch, a scalar."""
        self.discriminator.started.fill_(1)
        real = self.discriminator(batch["x"]).float()
        fake = self.discriminator(batch["reconstruction"].detach()).float()
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
