"""Sixteen-pixel images of two classes and a tiny U-Net, for what only images have: convolutions, feature maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.denoiser import Denoiser
from hasten.distillers import DistillTask
from hasten.nets.unet import UNet
from hasten.predictions import V
from hasten.schedules import VPCosine


class Squares:
    """`batches[k]`: a bright square in one of two corners, (8, 1, 16, 16) in [-1, 1], and which corner."""

    batch_size = 8

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(step)
        label = torch.randint(0, 2, (8,), generator=g)
        x = torch.full((8, 1, 16, 16), -1.0)
        for image, corner in zip(x, label, strict=True):
            at = 8 * int(corner)
            image[:, at : at + 8, at : at + 8] = 1.0
        return {"x": x + 0.05 * torch.randn(x.shape, generator=g), "label": label}


def unet() -> Denoiser:
    """With random weights everywhere, also where training begins at zero."""
    torch.manual_seed(3)
    net = UNet(1, widths=(8, 16), classes=2, embedding=16)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return Denoiser(net, VPCosine(offset=0.0), V()).eval().requires_grad_(False)


def image_task(out: Path, steps: int = 2, **more: Any) -> DistillTask:
    """A task with that network as its teacher."""
    base = unet()

    class Few(dict):
        def __missing__(self, key: str) -> int:
            return steps

    more.setdefault("codec", "image")
    return DistillTask(teacher=base, denoiser=base, batches=Squares(), shape=(1, 16, 16), out=out, steps=Few(), show=False,
                device="cpu", **more)  # type: ignore[arg-type]  # fmt: skip
