"""Start a truncated model from a generator of its own that was trained to draw the diffused data at T'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Wrapper
from ..errors import BadInput
from ..nets.prior import SharedPrior
from ..sampling import Noise
from ._base import Start

__all__ = ["Prior"]

PART = "prior"


@dataclass(frozen=True)
class Prior(Start):
    """z_T' = G(xi), xi ~ N(0, I), then the usual sampler from T': all its evaluations are spent below T'.

    G is trained adversarially, or by conditional transport, to draw the diffused data at T' (`hasten train --process
    tdpm`): the network of the model itself at a time of its own, or a separate one. NFE: 1 in addition to the sampler's
    (a separate generator may cost less).

    Args:
        net: the network "prior", `nets.prior.SharedPrior` or `PriorNet`, or any module with `time` (T') that is called
            as `net(denoiser, xi, **cond) -> z`; set by `bind`.

    References:
        Zheng, He, Chen, Zhou 2022, arXiv:2202.09671.
    """

    net: Any = field(default=None, repr=False, metadata={"bound": True})

    @property
    def nfe(self) -> int:  # type: ignore[override]
        """1, or 0 where the generator is the network of the model itself, whose evaluation is counted as such."""
        return int(not isinstance(self.net, SharedPrior))

    @property
    def time(self) -> float | None:
        """T'; None for a start that is not bound."""
        return None if self.net is None else float(self.net.time)

    def bind(self, statistics: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> Prior:
        """The start with the model's own generator.

        Raises:
            BadInput: where the model has none.
        """
        if PART not in parts:
            raise BadInput("prior needs a model trained with its own generator: hasten train DATA --process tdpm")
        return replace(self, net=parts[PART])

    def begin(self, denoiser: nn.Module, noise: Noise, t: Tensor, images: Tensor | None = None, **cond: Any) -> Tensor:
        """z (B, *S) at time t = T'.

        Raises:
            BadInput: at another time than the generator's.
        """
        if self.net is None:
            raise BadInput("this prior has no generator: bind it to a model")
        if abs(float(t) - self.net.time) > 1e-6:
            raise BadInput(
                f"the prior draws states of t = {self.net.time:.6g}, found a grid that begins at {float(t):.6g}: "
                "give it start="
            )
        xi = noise.initial()
        own = {key: value for key, value in cond.items() if not key.startswith("null_")}
        with torch.no_grad():
            z: Tensor = self.net.to(xi.device)(unwrapped(denoiser), xi, **own)
        return z.to(xi.dtype)


def unwrapped(denoiser: nn.Module) -> nn.Module:
    """The denoiser without the guides around it."""
    while isinstance(denoiser, Wrapper):
        denoiser = denoiser.denoiser
    return denoiser
