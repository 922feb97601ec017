"""The network of a first step from t = 1: an estimate of the clean sample from pure noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .unet import UNet


class FirstStepNet(nn.Module):
    """`x1(z, c) = mean_c + U(z, c)`, an estimate of E[x | z, c] for z pure noise, `(B, *S), (B,) -> (B, *S)`.

    Where z contains nothing of x the estimate depends on c alone: a table of class means is the optimum. The U-Net `U`,
    without time (its time input is always 0), can represent more; it is initialised to zero.

    Args:
        shape: S of a sample, (C, H, W) if there is a U-Net.
        classes: 0 for none. Label `classes` is the null class; `label=None` is the null class for all.
        widths, blocks, patch: of the U-Net, see `UNet`; without widths there is none.

    Raises:
        ValueError: for a shape that the U-Net does not take.

    References:
        Zhang, Yin, Li, Xie 2024, arXiv:2403.08381.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int = 0,
        widths: Sequence[int] = (),
        blocks: int = 1,
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.config = {
            "shape": list(shape),
            "classes": classes,
            "widths": list(widths),
            "blocks": blocks,
            "patch": patch,
        }
        self.classes = classes
        self.mean = nn.Parameter(torch.zeros(classes + 1, *shape))
        self.unet: UNet | None = None
        if widths:
            if len(shape) != 3:
                raise ValueError(f"a U-Net takes samples of shape (C, H, W), got {tuple(shape)}")
            self.unet = UNet(shape[0], widths=widths, blocks=blocks, classes=classes, patch=patch)
            if shape[1] % self.unet.multiple or shape[2] % self.unet.multiple:
                raise ValueError(
                    f"sides {shape[1]}x{shape[2]} are not multiples of {self.unet.multiple}: "
                    "use fewer widths or another patch"
                )

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """x1 (B, *S) for noise `z` (B, *S) and labels (B,) int64 in 0..classes."""
        if label is None:
            label = torch.full((len(z),), self.classes, dtype=torch.long, device=z.device)
        x = self.mean[label]
        if self.unet is not None:
            x = x + self.unet(z, z.new_zeros(len(z)), label if self.classes else None)
        return x
