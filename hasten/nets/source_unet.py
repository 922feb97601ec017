"""A U-Net that reads a second image, enlarged if it is smaller, concatenated to the noisy one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.resizing import enlarge
from .embeddings import Embeddings
from .unet import UNet

__all__ = ["SourceUNet"]


class SourceUNet(nn.Module):
    """A `UNet` of `[x, source]`: `(B, C, H, W), (B,), (B,), source (B, K, H, W) -> (B, C_out, H, W)`; with a factor
    the source is (B, K, H / factor, W / factor), and is enlarged first (SR3, Saharia et al. 2021, arXiv:2104.07636).

    Args:
        channels: image channels C of x.
        source_channels: channels K of the source.
        out_channels: of the output. Default: `channels`.
        shifted: the noisy image is read as `x + source`: of the process `z_t = alpha x_0 + source + sigma eps` x is
            `z_t - source` (DiffuseVAE's second form, Pandey et al. 2022, arXiv:2201.00308); K = C.
        source_factor: how many times smaller the source is.
        options: further arguments of `UNet`.
    """

    def __init__(
        self,
        channels: int = 3,
        source_channels: int = 3,
        out_channels: int | None = None,
        shifted: bool = False,
        source_factor: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        if shifted and channels != source_channels:
            raise ValueError(f"a shifted source has the channels of x, {channels}, got {source_channels}")
        out = channels if out_channels is None else out_channels
        self.unet = UNet(channels + source_channels, out_channels=out, **options)
        self.config = {**self.unet.config, "channels": channels, "source_channels": source_channels}
        self.config |= {"shifted": True} if shifted else {}
        self.config |= {"source_factor": source_factor} if source_factor > 1 else {}
        self.shifted = shifted
        self.source_channels, self.source_factor = source_channels, source_factor
        self.classes, self.null_label = self.unet.classes, self.unet.null_label
        self.multiple = math.lcm(self.unet.multiple, source_factor)
        self.guidance_range, self.step_counts = self.unet.guidance_range, self.unet.step_counts

    def forward(
        self, x: Tensor, time: Tensor, label: Tensor | None = None, source: Tensor | None = None, **inputs: Tensor
    ) -> Tensor:
        """Raw output (B, C_out, H, W); `source` (B, K, H, W), the other arguments as for `UNet`.

        Raises:
            ValueError: without a source of K channels.
        """
        emb = self.embed(time, label, source, **inputs)
        return self.decode(*self.encode(x, emb), emb)

    def embed(
        self, time: Tensor, label: Tensor | None = None, source: Tensor | None = None, **inputs: Tensor
    ) -> Embeddings:
        """The `UNet`'s embedding, with the source.

        Raises:
            ValueError: without a source of K channels.
        """
        if source is None or source.shape[1] != self.source_channels:
            found = "none" if source is None else tuple(source.shape)
            raise ValueError(f"this U-Net needs source= of {self.source_channels} channels, got {found}")
        return Embeddings({"time": self.unet.embed(time, label, **inputs), "source": source})

    def encode(self, x: Tensor, emb: Embeddings) -> tuple[list[Tensor], Tensor]:
        """The `UNet`'s encoder, of x and the source."""
        source = enlarge(emb["source"].to(x.dtype), self.source_factor)
        read = x + source if self.shifted else x
        return self.unet.encode(torch.cat([read, source], dim=1), emb["time"])

    def decode(self, skips: list[Tensor], middle: Tensor, emb: Embeddings) -> Tensor:
        """The `UNet`'s decoder."""
        return self.unet.decode(skips, middle, emb["time"])
