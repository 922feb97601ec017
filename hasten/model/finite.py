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
from .resolve import Way


def check_sample(
    x: Tensor, made: list[Tensor], way: Way, denoiser: nn.Module, noise: Noise, given: Tensor | None,
    cond: dict[str, Any], decoder: Any = None, runtime: str = "fp32",
) -> None:  # fmt: skip
    """Refuse a batch of samples (n, ...) that `way` drew and that is not finite. It is then sampled once more to find
    out where that began. `made`: the batches before it; they and this one are in the error's `images`.

    denoiser: as it was sampled, with the guides and the start around it. given: what the start began from.
    """

    def again(watched: nn.Module) -> Tensor:
        fresh = Noise(noise.seeds, noise.shape, noise.dtype, noise.device)
        begin = None if way.start is None else way.start.begin(watched, fresh, way.times[0], given, **cond)
        return draw(watched, way.sampler, way.times, fresh, x=begin, plan=way.plan, cond=cond)

    try:
        check_images(x, noise.seeds, lambda: origin(denoiser, again, decoder, runtime))
    except NonFinite as error:
        error.images = torch.cat([*made, x.float().cpu()])
        raise
