"""Losses on a device: nothing is mixed with the CPU, and next to nothing is copied to it or waited for in a loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.denoiser import Denoiser
from hasten.distillers import DistillTask
from hasten.nets.unet import UNet
from hasten.pick import method_names, pick
from hasten.schedules import Discrete, VPCosine
from hasten.train.losses import DenoisingLoss, LogNormal
from tests.pretend import Pretended, PretendedTensor, put

from ._images import Squares
from ._toy import Steady

SHAPE = (1, 16, 16)


class FakePairs:
    """Pairs of random numbers, without a teacher."""

    def __init__(self, count: int, states: int) -> None:
        self.count, self.states, self.batch_size = count, states, 8

    def __len__(self) -> int:
        return self.count

    def subset(self, start: int, stop: int | None = None) -> FakePairs:
        return FakePairs((self.count if stop is None else stop) - start, self.states)

    def batches(self, batch_size: int, seed: int = 0) -> FakePairs:
        return self

    def __getitem__(self, step: Any) -> dict[str, Tensor]:
        batch = Squares()[0] | {"noise": torch.randn(8, *SHAPE)}
        return batch | ({"states": torch.randn(8, self.states, *SHAPE)} if self.states else {})


class OneStep(DistillTask):
    """A task whose stages are one loss of each module on the device; `copies` holds the uploads of each."""

    device_events: Pretended
    copies: dict[str, int]

    def fit(
        self, name: str, modules: list[Any], budget_weight: float = 1.0, batches: Any = None, **options: Any
    ) -> Any:
        source = self.batches if batches is None else batches
        shared = {key: PretendedTensor(value) for key, value in source[0].items()}
        for p in modules:
            put(p.module)
        for last in (False, True):  # the first round moves tables to the device
            batch = dict(shared)
            for p in modules:
                p.module.train()
                self.device_events.clear()
                with torch.set_grad_enabled(last):
                    loss = p.loss(batch)
                self.copies[f"{name} {p.name}"] = self.device_events.count("upload", "")
                if last:
                    loss.backward()
        return {p.name: p.module.eval().requires_grad_(False) for p in modules}

    def pairs(self, name: str, count: int, **options: Any) -> Any:
        return FakePairs(count, len(options.get("states", ())))


def device_task(device: Pretended, out: Path, prediction: str = "v") -> OneStep:
    torch.manual_seed(3)
    net = UNet(1, widths=(8,), classes=2, embedding=16)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    schedule = VPCosine(offset=0.0) if prediction == "v" else Discrete.linear()
    base = put(Denoiser(net, schedule, prediction).eval().requires_grad_(False))
    job = OneStep(base, base, Squares(), SHAPE, out, steps=Steady(10), show=False)  # type: ignore[arg-type]
    job.device_events, job.copies = device, {}
    return job


# the smallest settings that run every line; R1 is a gradient of a gradient, which the pretended device does not support
SPELLED = {
    "guided",
    "reflow",
    "diffusion_gan",
    "dsno",
    "rcfd",
    "mmd",
    "progressive",
    "encoder",
    "adversarial",
    "sft_pg",
}
METHODS = [
    "progressive:steps=(2,)", "progressive:steps=(2,),order=2", "encoder:steps=(2,)", "adversarial:r1=0",
    *(name for name in method_names("distillers") if name not in SPELLED),
    "guided:steps=(2,)", "guided:steps=(2,),kind=stochastic", "guided:steps=(4,2),shared=true",
    "reflow:pairs=16", "reflow:pairs=16,steps=2,coupling=ot_class", "diffusion_gan",
    "diffusion_gan:critic=heads,times=all", "diffusion_gan:posterior=true", "dmd:steps=4",
    "consistency:mode=training,curriculum=ect", "consistency:curriculum=root,levels=lognormal", "dsno:pairs=16",
    "sft_pg:steps=2,bound=spectral,balance=true", "rcfd:steps=(2,),width=8", "mmd:steps=2,width=8",
]  # fmt: skip


@pytest.mark.parametrize(
    "method, prediction", [*((method, "v") for method in METHODS), ("progressive:steps=(2,)", "eps"), ("dmd", "eps")]
)
def test_a_loss_copies_next_to_nothing_to_the_device(method: str, prediction: str, tmp_path: Path) -> None:
    with Pretended() as device:
        job = device_task(device, tmp_path, prediction)
        pick("distillers", method).distill(job)
    assert job.copies
    for name, copies in job.copies.items():
        assert copies <= 2, (name, job.copies)


def test_a_loss_of_training_copies_nothing_to_the_device() -> None:
    for loss in (DenoisingLoss(label_drop=0.5), DenoisingLoss(spread=False, times=LogNormal())):
        with Pretended() as device:
            job = device_task(device, Path())
            batch = {key: PretendedTensor(value) for key, value in Squares()[0].items()}
            device.clear()
            loss(job.denoiser, batch)
        assert not device.count("upload", "") and not device.count("wait", ""), device.lines()
