"""A small classifier for feature losses of distillers; not the network that samples are evaluated with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import group_norm


class Residual(nn.Module):
    """`x + conv(SiLU(norm(conv(SiLU(norm(x))))))`, 3x3, `(B, C, H, W)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(channels), group_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class Classifier(nn.Module):
    """Samples (B, *S) -> features (B, 4 width) and logits (B, classes), both float32.

    Images (C, H, W): three scales, each a 3x3 convolution (of stride 2 from the second on) and a residual block; the
    features are the mean over the pixels of the last map. Other shapes: a two-layer perceptron, the features its last
    activations. SiLU and GroupNorm throughout: smooth in the sample, without batch statistics.

    Args:
        shape: S.
        classes: at least 1.
        width: channels of the finest scale.

    Raises:
        ValueError: for an empty shape, or no classes or width.
    """

    def __init__(self, shape: Sequence[int], classes: int, width: int = 32) -> None:
        super().__init__()
        shape = tuple(shape)
        if classes < 1 or width < 1 or not shape:
            raise ValueError(f"a classifier needs a shape, classes and width, got {shape}, {classes} and {width}")
        self.config = {"shape": list(shape), "classes": classes, "width": width}
        self.classes = classes
        if len(shape) == 3:
            layers: list[nn.Module] = []
            in_channels = shape[0]
            for scale in range(3):
                channels = width * 2**scale
                stride = 1 if scale == 0 else 2
                layers += [nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1), Residual(channels)]
                in_channels = channels
            layers += [group_norm(in_channels), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        else:
            size = int(torch.Size(shape).numel())
            layers = [nn.Flatten(), nn.Linear(size, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width, classes)

    def features(self, x: Tensor) -> Tensor:
        """The input of the last linear layer, (B, 4 width) float32."""
        with torch.autocast(x.device.type, enabled=False):  # features that are compared need full precision
            return self.trunk(x.float())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 4 width) and logits (B, classes)."""
        features = self.features(x)
        with torch.autocast(x.device.type, enabled=False):
            return features, self.head(features)
