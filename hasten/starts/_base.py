"""Base class of the initialisations."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..sampling import Bindable, Noise

__all__ = ["Start"]


class Start(Bindable):
    """Base of the initialisations: frozen dataclasses that compute the state from which a sampler starts.

    `nfe`: evaluations of networks other than the model's own, in addition to the sampler's. `gives_source`: it gives
    the network its condition `source`. `reads_images`: it begins from images.
    """

    nfe: ClassVar[int] = 0
    gives_source: ClassVar[bool] = False
    reads_images: ClassVar[bool] = True

    @property
    def time(self) -> float | None:
        """The time at which the grid begins; None: that of the grid itself."""
        return None

    def begin(self, denoiser: nn.Module, noise: Noise, t: Tensor, images: Tensor | None = None, **cond: Any) -> Tensor:
        """The initial state x_t (B, *S).

        Args:
            denoiser: with the guides around it.
            noise: of the samples.
            t: the first time of the grid.
            images: (B, ...), for initialisations that use them.
            cond: conditions of the network.
        """
        raise NotImplementedError

    def wrap(self, denoiser: nn.Module, images: Tensor | None = None) -> nn.Module:
        """The denoiser to sample with; by default the same one."""
        return denoiser
