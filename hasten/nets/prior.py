"""Generators of the state at which a truncated model begins: the model's own network once more, or one of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .unet import UNet


class SharedPrior(nn.Module):
    """The denoiser's own network at the time t = 1, which training below T' leaves free, as a generator of z_T'.

        z = alpha_T' F(xi, 1) + sigma_T' xi,    xi ~ N(0, I)

    F is the network's raw output. It has no weights of its own.

    Args:
        time: T'.

    References:
        Zheng, He, Chen, Zhou 2022, arXiv:2202.09671 (TDPM+).
    """

    def __init__(self, time: float) -> None:
        super().__init__()
        self.config = {"time": float(time)}
        self.time = float(time)

    def forward(self, denoiser: Any, noise: Tensor, **cond: Any) -> Tensor:
        """z (B, *S) at time T'.

        Args:
            denoiser: the trained one, without guides.
            noise: xi, (B, *S).
            cond: conditions of its network.
        """
        scale = float(denoiser.schedule.prior_std(1.0))
        raw = denoiser.raw(noise if scale == 1 else scale * noise, 1.0, **cond)
        return with_noise(denoiser.schedule, self.time, raw, noise)


class PriorNet(nn.Module):
    """A generator of z_T' of its own, `z = alpha_T' F(xi, label) + sigma_T' xi`, with F zero at first.

    F is a U-Net for images (C, H, W), and a perceptron for other samples.

    Args:
        shape: S of a sample.
        time: T'.
        classes: 0 for none. Label `classes` is the null class; `label=None` is the null class for all.
        widths: channels of the U-Net, or two layers of the perceptron of the last of them.
        blocks, patch: of the U-Net, see `UNet`.

    Raises:
        ValueError: for a shape that the U-Net does not take.
    """

    def __init__(
        self,
        shape: Sequence[int],
        time: float,
        classes: int = 0,
        widths: Sequence[int] = (32, 64),
        blocks: int = 1,
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.config = {
            "shape": list(shape),
            "time": float(time),
            "classes": classes,
            "widths": list(widths),
            "blocks": blocks,
            "patch": patch,
        }
        self.time, self.classes = float(time), classes
        self.unet: UNet | None = None
        if len(shape) == 3:
            self.unet = UNet(shape[0], widths=widths, blocks=blocks, classes=classes, patch=patch)
            if shape[1] % self.unet.multiple or shape[2] % self.unet.multiple:
                raise ValueError(f"sides {shape[1]}x{shape[2]} are not multiples of {self.unet.multiple}")
            return
        size, width = math.prod(shape), widths[-1]
        self.label = nn.Embedding(classes + 1, width)
        self.first = nn.Linear(size, width)
        last = nn.Linear(width, size)
        self.body = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, denoiser: Any, noise: Tensor, label: Tensor | None = None, **cond: Any) -> Tensor:
        """z (B, *S) at time T', for noise (B, *S) and labels (B,) int64 in 0..classes; other conditions are not used.

        `denoiser` tells the schedule.
        """
        dtype = next(self.parameters()).dtype
        x = noise.to(dtype)
        if self.unet is not None:
            raw = self.unet(x, x.new_zeros(len(x)), label if self.classes else None)
        else:
            if label is None or not self.classes:
                label = torch.full((len(x),), self.classes, dtype=torch.long, device=x.device)
            raw = self.body(self.first(x.flatten(1)) + self.label(label)).reshape(x.shape)
        return with_noise(denoiser.schedule, self.time, raw.to(noise.dtype), noise)


def with_noise(schedule: Any, time: float, raw: Tensor, noise: Tensor) -> Tensor:
    """`alpha raw + sigma noise` at a time, in the dtype of the noise."""
    return float(schedule.alpha(time)) * raw + float(schedule.sigma(time)) * noise
