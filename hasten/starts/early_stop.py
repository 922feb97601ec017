"""Start from the images of any generator, diffused once to a time before pure noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_numbers
from ..sampling import Noise
from ..schedules.base import Schedule
from ..schedules.truncated import Truncated
from ..utils.random import MAX_SEED
from ._base import Start

__all__ = ["EarlyStop", "generated_images"]

PART = "generator"
OFFSET = 1 << 40  # between the seeds of the generator and those of the diffusion


@dataclass(frozen=True)
class EarlyStop(Start):
    """Images of a generator, diffused once: z_T' = alpha x + sigma e, e ~ N(0, I), then the usual sampler from T'.

    The reverse process contracts what is wrong with them: a bias b of the generator is b v / (v + q^2) in the end for
    Gaussian data of variance v, q = sigma / alpha at T' (`starts.ccdf.remaining`); a perfect generator has no bias at
    any T'. NFE: 0 in addition to the sampler's, and what the generator costs.

    Args:
        time: T', at which the grid begins; None: the end of the model's schedule, if that is truncated.
        generator: what draws the images: a hasten model, `hasten.load(FOLDER)`; for `Model.sample` and the command line
            also the folder of one or a bundled name; or a function `generator(latents (B, *latent), **cond) -> images
            (B, *S)`, for example the network of a GAN. None: the model's part "generator", which `hasten train
            --process es_ddpm` trains.
        latent: shape of the generator's latents, standard normal; (): its `latent_shape`, or else that of a sample.

    References:
        Lyu, Xu, Yang, Lin, Dai 2022, arXiv:2205.12524.
    """

    time: float | None = None
    generator: Any = None
    latent: tuple[int, ...] = ()
    nfe: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.time is not None and not 0 < self.time < 1:
            raise BadInput(f"early_stop needs 0 < time < 1, found {self.time}")
        check_numbers(self)

    def bind(self, statistics: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> EarlyStop:
        """The start with the model's own generator, where it names none.

        Raises:
            BadInput: where the model has none either.
        """
        if self.generator is not None:
            return self
        if PART not in parts:
            raise BadInput(
                "early_stop needs a generator of images: generator=FOLDER of a model, or a model that was trained with "
                "its own, hasten train DATA --process es_ddpm"
            )
        return replace(self, generator=parts[PART])

    def begin(self, denoiser: nn.Module, noise: Noise, t: Tensor, images: Tensor | None = None, **cond: Any) -> Tensor:
        """z (B, *S) at time t.

        Raises:
            BadInput: for images of another shape, and at the noisy end of a schedule that is not truncated, where
                nothing is left of them.
        """
        schedule: Any = denoiser.schedule
        check_begin(schedule, float(t))
        e = noise.initial()
        x = generated_images(self.generator, noise, self.latent, **cond).to(e)
        return float(schedule.alpha(t)) * x + float(schedule.sigma(t)) * e


def check_begin(schedule: Schedule, t: float) -> None:
    """Raise BadInput where the grid begins at pure noise, or above the end of a truncated schedule."""
    if isinstance(schedule, Truncated) and t > schedule.end + 1e-6:
        raise BadInput(f"this model was trained up to t = {schedule.end:g}, found a grid that begins at {t:g}")
    if t > schedule.t_max - 1e-6 and not isinstance(schedule, Truncated):
        raise BadInput(f"early_stop begins before pure noise, found t = {t:g}, the end of the schedule: give it time=")


@torch.no_grad()
def generated_images(generator: Any, noise: Noise, latent: tuple[int, ...] = (), **cond: Any) -> Tensor:
    """Images (B, *S) of a generator, image k a function of the seed k and its conditions.

    Args:
        generator: a model or a function, see `EarlyStop`.
        noise: of the samples; the generator's own numbers have other seeds, so that they are independent of it.
        latent: shape of its latents, see `EarlyStop`.
        cond: conditions, (B, ...).

    Raises:
        BadInput: for what is no generator, and for images of another shape.
    """
    seeds = [(seed + OFFSET) % (MAX_SEED + 1) for seed in noise.seeds]
    expected = (len(noise), *noise.shape)
    if hasattr(generator, "sample") and hasattr(generator, "denoiser"):
        x = torch.cat([_model_samples(generator, seeds[a:b], cond, a, b) for a, b in _runs(seeds)])
    elif callable(generator):
        shape = tuple(latent or getattr(generator, "latent_shape", ()) or noise.shape)
        own = {key: value for key, value in cond.items() if not key.startswith("null_")}
        call = generator.to(noise.device) if isinstance(generator, nn.Module) else generator
        x = call(Noise(seeds, shape, noise.dtype, noise.device).initial(), **own)
    else:
        raise BadInput(
            f"early_stop: {generator!r} draws no images: load the model first, hasten.load(FOLDER), or give a function "
            "of the latents"
        )
    if not isinstance(x, Tensor) or tuple(x.shape) != expected:
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise BadInput(f"the generator must give images of shape {expected}, it gave {found}")
    return x


def _model_samples(model: Any, seeds: list[int], cond: Mapping[str, Any], a: int, b: int) -> Tensor:
    """Samples of a model for consecutive seeds, the rows from a to b of the conditions."""
    label = cond["label"][a:b].cpu() if "label" in cond and model.classes is not None else None
    if label is not None and model.classes is not None and int(label.max()) >= len(model.classes):
        raise BadInput(f"{model.name} cannot draw images without a class: give label=")
    sample: Tensor = model.sample(len(seeds), label=label, seed=seeds[0], batch_size=len(seeds))
    return sample


def _runs(seeds: list[int]) -> list[tuple[int, int]]:
    """The ranges [a, b) of consecutive seeds."""
    cuts = [0, *(k for k in range(1, len(seeds)) if seeds[k] != seeds[k - 1] + 1), len(seeds)]
    return list(zip(cuts, cuts[1:]))
