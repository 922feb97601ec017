"""The first step from pure noise, for models that never saw any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..sampling import Noise

__all__ = ["SingDiffusion"]

PART = "first_step"


@dataclass(frozen=True)
class SingDiffusion:
    """One DDIM step from t = 1 (alpha = 0) to the sampler's first time t, by a network x1 of its own:

        z ~ N(0, I),   x_t = alpha_t x1(z, c) + sigma_t z

    A usual table ends at alpha > 0 (Stable Diffusion's at .068), yet sampling begins from N(0, I), which has lost
    alpha E[x | c]: images come out of average brightness. x1 is E[x | z, c], see `tuning/first_step`; it brings back
    the mean of a class, not the spread around it (of Gaussian data of variance v the probability-flow samples have
    q / sqrt(v + q^2) of the deviation, q = sigma / alpha at t, with this step as without it). Any sampler goes on from
    x_t. A model that itself starts at alpha = 0 (zero terminal SNR, v-prediction) needs no such step.

    Under guidance with scale w > 1, x1 = (x1_u + w (x1_c - x1_u)) / w (nothing is divided where w <= 1).

    Args:
        divide: False leaves out the division by w, which draws x1 towards 0: right for latents, whose mean is about 0,
            less so for data whose mean is not (pixels in [-1, 1]).
        net: bound, the part "first_step".

    NFE: 1 (2 under guidance) of the small network, beside the sampler's. The step is done in float32. `begin` raises
    BadInput at a time where alpha = 0: there the start does nothing.

    Reference: Zhang, Yin, Li, Xie 2024, 2403.08381.
    """

    divide: bool = True
    net: nn.Module | None = field(default=None, repr=False, metadata={"bound": True})
    nfe: ClassVar[int] = 1
    time: ClassVar[float | None] = None

    def bind(self, statistics: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> SingDiffusion:
        """The start with the model's own first step."""
        if PART not in parts:
            raise BadInput(
                "singdiffusion needs the model's first step: run hasten tune MODEL --method first_step --data IMAGES"
            )
        return replace(self, net=parts[PART])

    def begin(self, denoiser: nn.Module, noise: Noise, t: Tensor, images: Tensor | None = None, **cond: Any) -> Tensor:
        """x_t (B, *S) at time t, of labels `label` (B,) int64 where the model has classes."""
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
        net = self.net.to(z.device)  # type: ignore[union-attr]
        dtype = next(net.parameters()).dtype
        if w == 1 or label is None:
            return net(z.to(dtype), label).to(z.dtype)
        null = torch.full_like(label, net.classes)  # type: ignore[arg-type]
        c, u = net(torch.cat([z, z]).to(dtype), torch.cat([label, null])).to(z.dtype).chunk(2)
        x1 = u + w * (c - u)
        return x1 / w if self.divide and w > 1 else x1


def scale_at(denoiser: Any, t: Tensor) -> float:
    """The scale of the classifier-free guidance in a stack of wrappers at this time; 1 where there is none."""
    while isinstance(denoiser, nn.Module):
        guide = vars(denoiser).get("guide")
        if hasattr(guide, "scale") and hasattr(guide, "interval"):
            q = float(denoiser.schedule.q(t))
            return guide.scale if guide.interval is None or guide.interval[0] < q <= guide.interval[1] else 1.0
        denoiser = denoiser._modules.get("denoiser")
    return 1.0
