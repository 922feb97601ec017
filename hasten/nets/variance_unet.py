"""A U-Net that also predicts the variance of a reverse step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .unet import UNet

__all__ = ["VarianceUNet"]


class VarianceUNet(nn.Module):
    """A `UNet` of 2C output channels: the raw output, and `o`, of which `v = (o + 1) / 2` interpolates the logarithm
    of the variance between its bounds, `log V = v log b + (1 - v) log b~`. `forward` is the raw output alone.

    Args:
        channels: of the image.
        options: further arguments of `UNet`.

    References:
        Nichol, Dhariwal 2021, arXiv:2102.09672.
    """

    def __init__(self, channels: int = 3, **options: Any) -> None:
        super().__init__()
        options.pop("out_channels", None)
        self.unet = UNet(channels, out_channels=2 * channels, **options)
        self.config = {key: value for key, value in self.unet.config.items() if key != "out_channels"}
        self.classes, self.null_label, self.multiple = self.unet.classes, self.unet.null_label, self.unet.multiple
        self.guidance_range, self.step_counts = self.unet.guidance_range, self.unet.step_counts

    def with_learned_variance(
        self, x: Tensor, time: Tensor, label: Tensor | None = None, **inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The raw output and `o`, each (B, C, H, W); arguments as for `UNet`."""
        raw, o = self.unet(x, time, label, **inputs).chunk(2, 1)
        return raw, o

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """The raw output (B, C, H, W)."""
        return self.with_learned_variance(x, time, label, **inputs)[0]
