"""The first step from pure noise, for models that were not trained on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..sampling import Noise
from ._base import Start

__all__ = ["SingDiffusion"]

PART = "first_step"


@dataclass(frozen=True)
class SingDiffusion(Start):
    """One DDIM step from t = 1 (alpha = 0) to the sampler's first time t, by a network x1 of its own:

        z ~ N(0, I),   x_t = alpha_t x1(z, c) + sigma_t z

    A usual table ends at alpha > 0 (Stable Diffusion's at .068), yet sampling starts from N(0, I), which lacks alpha
    E[x | c]: images come out with average brightness. x1 is E[x | z, c], see `tuning/first_step`; it restores the mean
    of a class, not the variance around it (for Gaussian data of variance v the probability-flow samples have q / sqrt(v
    + q^2) of the standard deviation, q = sigma / alpha at t, with this step as without it). Any sampler continues from
    x_t. A model that itself starts at alpha = 0 (zero terminal SNR, v-prediction) needs no such step.

    Under guidance with scale w > 1, x1 = (x1_u + w (x1_c - x1_u)) / w (no division where w <= 1). NFE: 1 (2 under
    guidance) of the small network, in addition to the sampler's. The step is computed in float32.

    Args:
        divide: False omits the division by w, which draws x1 towards 0: right for latents, whose mean is about 0, less
            so for data with another mean (pixels in [-1, 1]).
        net: the network "first_step", set by `bind`.

    References:
        Zhang, Yin, Li, Xie 2024, arXiv:2403.08381.
    """

    divide: bool = True
    net: Any = field(default=None, repr=False, metadata={"bound": True})
    nfe: ClassVar[int] = 1

    def bind(self, statistics: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> SingDiffusion:
        """The start with the model's own first step.

        Raises:
            BadInput: where the model has none.
        """
        if PART not in parts:
            raise BadInput(
                "singdiffusion needs the model's first step: run hasten tune MODEL --method first_step --data IMAGES"
            )
        return replace(self, net=parts[PART])

    def begin(self, denoiser: nn.Module, noise: Noise, t: Tensor, images: Tensor | None = None, **cond: Any) -> Tensor:
        """x_t (B, *S) at time t, for labels `label` (B,) int64 where the model has classes.

        Raises:
            BadInput: at a time where alpha = 0, which needs no such step.
        """
        if self.net is None:
            raise BadInput("this singdiffusion has no network: bind it to a model")
        schedule: Any = denoiser.schedule
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        if alpha == 0:
            raise BadInput(
                f"singdiffusion leads from pure noise to a time with alpha > 0, found alpha = 0 at t = {float(t):g}: "
                "this model starts at pure noise by itself"
            )
        z = noise.initial()
        with torch.autocast(z.device.type, enabled=False), torch.no_grad():
            x1 = self._x1(z, cond.get("label"), scale_at(denoiser, t))
        return alpha * x1 + sigma * z

    def _x1(self, z: Tensor, label: Tensor | None, w: float) -> Tensor:
        """x1 (B, *S) under guidance of scale w."""
        net = self.net.to(z.device)
        dtype = next(net.parameters()).dtype
        if w == 1 or label is None:
            x1: Tensor = net(z.to(dtype), label).to(z.dtype)
            return x1
        null = torch.full_like(label, net.classes)
        c, u = net(torch.cat([z, z]).to(dtype), torch.cat([label, null])).to(z.dtype).chunk(2)
        x1 = u + w * (c - u)
        return x1 / w if self.divide and w > 1 else x1


def scale_at(denoiser: Any, t: Tensor) -> float:
    """The scale of the classifier-free guidance in a stack of wrappers at this time; 1 without guidance."""
    while isinstance(denoiser, nn.Module):
        guide: Any = vars(denoiser).get("guide")
        if hasattr(guide, "scale") and hasattr(guide, "interval"):
            schedule: Any = denoiser.schedule
            q = float(schedule.q(t))
            inside = guide.interval is None or guide.interval[0] < q <= guide.interval[1]
            return float(guide.scale) if inside else 1.0
        denoiser = denoiser._modules.get("denoiser")
    return 1.0
