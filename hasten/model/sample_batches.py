"""The loop of `Model.sample` over its batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..denoiser import evaluating
from ..errors import BadInput
from ..nets.source_cache import caching_sources
from ..plan.draw import draw_unchecked as draw
from ..progress import fraction_of
from ..sampling import Callback, Noise, Progress, wrap_denoiser
from ..utils.devices import upload
from .finite import check_sample
from .resolve import Resolved

__all__ = ["sample_batches"]


class GivenNoise(Noise):
    """Noise that begins with given numbers (B, *S); later draws are those of the seeds."""

    def __init__(self, given: Tensor, seeds: range) -> None:
        super().__init__(seeds, given.shape[1:], given.dtype, given.device)
        self.given = given

    def initial(self) -> Tensor:
        """The given numbers."""
        return self.given


def sample_batches(
    model: Any,
    resolved: Resolved,
    n: int,
    label: Any,
    seed: int,
    batch_size: int,
    images: Tensor | None,
    given: Tensor | Noise | None,
    progress: Progress | None,
    callback: Callback | None,
) -> Tensor:
    """Samples (n, ...), float32 on the CPU; arguments as of `Model.sample`, checked, its config resolved.

    Raises:
        BadInput: for initial noise of another shape.
        NonFinite: for samples that are not finite.
    """
    conditions = model.conditions(n, label, seed)
    device, shape = model.device, model.shape
    takes_source = model.source_shape is not None and not getattr(resolved.start, "gives_source", False)
    if takes_source and images is not None and model.source_factor > 1:
        shape = (model.shape[0], *(side * model.source_factor for side in images.shape[2:]))
    if isinstance(given, Tensor) and tuple(given.shape) != (n, *shape):
        raise BadInput(f"noise must be of shape {(n, *shape)}, found {tuple(given.shape)}")
    if isinstance(given, Noise) and (len(given), *given.shape) != (n, *shape):
        raise BadInput(f"noise must be of shape {(n, *shape)}, found {(len(given), *given.shape)}")
    batches: list[Tensor] = []
    resolved.runtime.prepare(model.denoiser)
    with resolved.runtime.apply(), evaluating(model.denoiser), caching_sources(resolved.denoiser):
        for first in range(0, n, batch_size):
            count = min(batch_size, n - first)
            seeds = range(seed + first, seed + first + count)
            noise = Noise(seeds, shape, torch.float32, device)
            if isinstance(given, Noise):
                noise = given.rows(slice(first, first + count))
            elif given is not None:
                noise = GivenNoise(upload(given[first : first + count].float(), device), seeds)
            cond = {key: value[first : first + count] for key, value in conditions.items()}
            denoiser: Any = resolved.denoiser
            x = None
            source = None if images is None else upload(images[first : first + count], device)
            if takes_source and model.denoiser.source_channels and source is not None:
                cond["source"] = source
            if model.denoiser.schedule.bridge:
                x = model.denoiser.schedule.begin(noise.initial(), resolved.times[0], source)
            elif resolved.start is not None:
                denoiser = wrap_denoiser(resolved.start, denoiser, source)
                x = resolved.start.begin(denoiser, noise, resolved.times[0], source, **cond)
            tick = fraction_of(progress, first, n, batch_size)
            how: dict[str, Any] = {"plan": resolved.plan, "progress": tick, "callback": callback, "cond": cond}
            x = model.decode(draw(denoiser, resolved.sampler, resolved.times, noise, x=x, **how), source)
            check_sample(x, batches, resolved, denoiser, noise, source, cond, model.decoder)
            pixels = model.codec in ("image", "residual") or model.decoder is not None
            batches.append((x.float().clamp(-1, 1) if pixels else x.float()).cpu())
    return torch.cat(batches)
