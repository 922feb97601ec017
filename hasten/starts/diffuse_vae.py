"""Condition a diffusion model on the image of a generator, which it refines from pure noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from ..denoiser import Wrapper
from ..errors import BadInput, HastenError
from ..sampling import Noise
from ._base import Start
from .early_stop import PART, generated_images

__all__ = ["DiffuseVAE", "Sourced"]


@dataclass(frozen=True)
class DiffuseVAE(Start):
    """Every evaluation gets the image x_hat of the model's variational autoencoder as its input `source`.

    The autoencoder decides what is in the image, the diffusion adds what it leaves out: fewer steps are enough. The
    sampler begins where it always does. NFE: 0 in addition to the sampler's; the decoder runs once.

    Args:
        generator: the network "generator", set by `bind`.

    References:
        Pandey, Mukherjee, Rai, Kumar 2022, arXiv:2201.00308.
    """

    generator: Any = field(default=None, repr=False, metadata={"bound": True})
    nfe: ClassVar[int] = 0
    gives_source: ClassVar[bool] = True

    def bind(self, statistics: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> DiffuseVAE:
        """The start with the model's own autoencoder.

        Raises:
            BadInput: where the model has none.
        """
        if PART not in parts:
            raise BadInput("diffuse_vae needs a model trained with its autoencoder: hasten train --process diffuse_vae")
        return replace(self, generator=parts[PART])

    def wrap(self, denoiser: nn.Module, images: Tensor | None = None) -> nn.Module:
        """The denoiser that is given the source; images (B, *S) are refined in place of the autoencoder's, if any."""
        return Sourced(denoiser, images)

    def begin(self, denoiser: nn.Module, noise: Noise, t: Tensor, images: Tensor | None = None, **cond: Any) -> Tensor:
        """The usual first state (B, *S); draws the source.

        Raises:
            BadInput: for a denoiser that `wrap` did not make.
        """
        if not isinstance(denoiser, Sourced) or self.generator is None:
            raise BadInput("diffuse_vae: bind it to a model, and call begin with the denoiser that wrap returned")
        e = noise.initial()
        if images is None:
            denoiser.source = generated_images(self.generator, noise, **cond).to(e)
        schedule: Any = denoiser.schedule
        return float(schedule.prior_std(t)) * e


class Sourced(Wrapper):
    """A denoiser whose network gets `source` (B, *S) at every evaluation.

    An evaluation of some samples only has `rows` (R,), integers.

    Args:
        denoiser: the inner one.
        source: None: to be set before the first evaluation.
    """

    takes_rows: ClassVar[bool] = True
    source: Tensor | None

    def __init__(self, denoiser: nn.Module, source: Tensor | None = None) -> None:
        super().__init__(denoiser)
        self.register_buffer("source", source, persistent=False)

    def forward(self, x_t: Tensor, t: Tensor | float, *, rows: Tensor | None = None, **cond: Any) -> Any:
        """The inner denoiser's x0 (B, *S)."""
        return self.denoiser(x_t, t, **cond, source=self._rows(x_t, rows))

    def raw(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The inner network's output (B, *S)."""
        raw: Tensor = self.denoiser.raw(x_t, t, **cond, source=self._rows(x_t, None))
        return raw

    def features(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Any:
        """The inner denoiser's middle features."""
        return self.denoiser.features(x_t, t, **cond, source=self._rows(x_t, None))

    def _rows(self, x_t: Tensor, rows: Tensor | None) -> Tensor:
        """The source of the samples of x_t."""
        if self.source is None:
            raise HastenError("diffuse_vae: the source is not there yet: call begin first")
        source = self.source.to(x_t)
        if rows is not None:
            return source[rows.to(x_t.device)]
        repeats, rest = divmod(len(x_t), len(source))
        if rest or not repeats:
            raise HastenError(
                f"this sampler evaluates {len(x_t)} of {len(source)} samples, and the source cannot know which: use "
                "one that evaluates all"
            )
        return source.repeat(repeats, *[1] * (source.ndim - 1))
