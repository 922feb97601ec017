"""Base class of the guides."""

from __future__ import annotations

from torch import nn

from ..sampling import Bindable

__all__ = ["Guide"]


class Guide(Bindable):
    """Base of the guides: frozen dataclasses whose `wrap` returns a steered denoiser of the same call signature."""

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """The steered denoiser.

        Args:
            denoiser: a `Denoiser`, or one with other guides around it.

        Raises:
            BadInput: for a denoiser that the guide cannot steer.
        """
        return denoiser
