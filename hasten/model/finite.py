"""Samples that are not finite are an error that says where that began."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFinite
from ..plan.diagnose import origin
from ..plan.draw import draw_unchecked as draw
from ..sampling import Noise
from ..utils.finite import check_images
from .resolve import Resolved


def check_sample(
    x: Tensor, batches: list[Tensor], resolved: Resolved, denoiser: nn.Module, noise: Noise, source: Tensor | None,
    cond: dict[str, Any], decoder: Any = None,
) -> None:  # fmt: skip
    """Refuse a batch of samples (n, ...) that is not finite. It is then sampled once more to find out where that began.

    `batches`: the batches before it; they and this one are in the error's `images`.

    denoiser: as it was sampled, with the guides and the start around it. source: what the initialisation began from.
    """

    def again(watched: nn.Module) -> Tensor:
        fresh = Noise(noise.seeds, noise.shape, noise.dtype, noise.device)
        begin = (
            None if resolved.start is None else resolved.start.begin(watched, fresh, resolved.times[0], source, **cond)
        )
        return draw(watched, resolved.sampler, resolved.times, fresh, x=begin, plan=resolved.plan, cond=cond)

    try:
        check_images(x, noise.seeds, lambda: origin(denoiser, again, decoder, resolved.config.precision or "fp32"))
    except NonFinite as error:
        error.images = torch.cat([*batches, x.float().cpu()])
        raise
