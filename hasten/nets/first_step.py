"""The clean sample guessed from pure noise: the network of a first step from t = 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .unet import UNet


class FirstStepNet(nn.Module):
    """`x1(z, c) = mean_c + U(z, c)`, an estimate of E[x | z, c] for z pure noise, `(B, *S), (B,) -> (B, *S)`.

    Where z holds nothing of x the estimate depends on c alone, and for classes a table of means is all that it can be.
    The U-Net `U`, without any time (its clock is always 0), is for what a table cannot say; it begins at zero.
    Zhang, Yin, Li, Xie 2024, 2403.08381.

    shape: S of a sample, (C, H, W) where there is a U-Net.
    classes: 0 for none. Label `classes` is "no class"; `label=None` means that for all.
    widths, blocks, patch: of the U-Net, see `UNet`; without widths there is none.

    Raises ValueError for a shape that the U-Net does not take.
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
            "shape": list(shape), "classes": classes, "widths": list(widths), "blocks": blocks, "patch": patch,
        }  # fmt: skip
        self.classes = classes
        self.mean = nn.Parameter(torch.zeros(classes + 1, *shape))
        self.unet: UNet | None = None
        if widths:
            if len(shape) != 3:
                raise ValueError(f"a U-Net takes samples of shape (C, H, W), got {tuple(shape)}")
            self.unet = UNet(shape[0], widths=widths, blocks=blocks, classes=classes, patch=patch)
            if shape[1] % self.unet.multiple or shape[2] % self.unet.multiple:
                raise ValueError(
                    f"sides {shape[1]}x{shape[2]} do not divide by {self.unet.multiple}: fewer widths, or another patch"
                )

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """x1 (B, *S) of noise `z` (B, *S), labels (B,) int64 in 0..classes."""
        if label is None:
            label = torch.full((len(z),), self.classes, dtype=torch.long, device=z.device)
        x = self.mean[label]
        if self.unet is not None:
            x = x + self.unet(z, z.new_zeros(len(z)), label if self.classes else None)
        return x
