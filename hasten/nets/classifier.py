"""A small classifier whose features a distiller looks through; another network than the one that judges."""

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
    """Samples (B, *S) to features (B, 4 width) and logits (B, classes), both float32.

    Images (C, H, W): three scales, each a strided 3x3 convolution (the first not strided) and a residual block; the
    features are the mean over the pixels of the last map. Other shapes: a perceptron of two layers on all numbers, the
    features its last activations. SiLU and GroupNorm throughout: smooth in the sample, and no statistics of a batch.

    shape: S. classes: at least 1. width: channels of the finest scale.
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
            before = shape[0]
            for scale in range(3):
                channels = width * 2**scale
                layers += [nn.Conv2d(before, channels, 3, stride=1 if scale == 0 else 2, padding=1), Residual(channels)]
                before = channels
            layers += [group_norm(before), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        else:
            inside = int(torch.Size(shape).numel())
            layers = [nn.Flatten(), nn.Linear(inside, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width, classes)

    def features(self, x: Tensor) -> Tensor:
        """What the last linear layer reads, (B, 4 width)."""
        with torch.autocast(x.device.type, enabled=False):  # what is compared must not be rounded to half precision
            return self.trunk(x.float())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        with torch.autocast(x.device.type, enabled=False):
            return features, self.head(features)
