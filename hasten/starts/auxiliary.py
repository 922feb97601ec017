"""Start at a time before pure noise, from a density fitted to the diffused data there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..sampling import Noise
from ._base import Start

__all__ = ["Auxiliary"]

PART = "auxiliary"


@dataclass(frozen=True)
class Auxiliary(Start):
    """z_T* ~ nu at a time T* < 1, then the usual sampler from there: all its evaluations are spent where images form.

    nu is a density of the diffused data alpha x + sigma e at T*, fitted by maximum likelihood (`tuning/auxiliary`,
    which also chooses T*). The error of the score adds up over [0, T], so it grows with T; the divergence between nu
    and the diffused data falls with T: there is a finite optimal T, the smaller the better nu is.

    Sample k is a function of its own noise and label (`MixtureDensity.sample`). NFE: 0 in addition to the sampler's.

    Args:
        net: the network "auxiliary", a `MixtureDensity`, set by `bind`.

    References:
        Franzese, Rossi, Yang, Finamore, Rossi, Filippone, Michiardi 2022, arXiv:2206.05173.
    """

    net: Any = field(default=None, repr=False, metadata={"bound": True})
    nfe: ClassVar[int] = 0

    @property
    def time(self) -> float | None:
        """T*, the time of the density; None for a start that is not bound."""
        return None if self.net is None else float(self.net.time)

    def bind(self, statistics: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> Auxiliary:
        """The start with the model's own density.

        Raises:
            BadInput: where the model has none.
        """
        if PART not in parts:
            raise BadInput(
                "auxiliary needs the model's density: run hasten tune MODEL --method auxiliary --data IMAGES"
            )
        return replace(self, net=parts[PART])

    def begin(self, denoiser: nn.Module, noise: Noise, t: Tensor, images: Tensor | None = None, **cond: Any) -> Tensor:
        """z (B, *S) at time t = T*, for labels `label` (B,) int64 where the model has classes.

        Raises:
            BadInput: at another time than the density's.
        """
        if self.net is None:
            raise BadInput("this auxiliary start has no density: bind it to a model")
        if abs(float(t) - self.net.time) > 1e-9:
            raise BadInput(
                f"the density is of t = {self.net.time:.6g}, found a grid that begins at {float(t):.6g}: give it start="
            )
        e = noise.initial()
        net = self.net.to(e.device)
        with torch.autocast(e.device.type, enabled=False), torch.no_grad():
            sample: Tensor = net.sample(e, cond.get("label"))
        return sample
