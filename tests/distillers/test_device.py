"""Losses on a device: nothing is mixed with the CPU, and next to nothing is copied to it or waited for in a loss."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.distillers import DistillTask
from hasten.nets.unet import UNet
from hasten.pick import names, pick
from hasten.schedules import Discrete, VPCosine
from hasten.train.losses import DenoisingLoss, LogNormal

from ._device import DEVICE, Pretend, Remote, counted, moved
from ._images import Squares
from ._toy import Steady

SHAPE = (1, 16, 16)


class Drawn:
    """Pairs that are not drawn."""

    def __init__(self, count: int, states: int) -> None:
        self.count, self.states, self.batch_size = count, states, 8

    def __len__(self) -> int:
        return self.count

    def part(self, start: int, stop: int | None = None) -> Drawn:
        return Drawn((self.count if stop is None else stop) - start, self.states)

    def batches(self, batch_size: int, seed: int = 0) -> Drawn:
        return self

    def __getitem__(self, step: Any) -> dict[str, Tensor]:
        batch = Squares()[0] | {"noise": torch.randn(8, *SHAPE)}
        return batch | ({"states": torch.randn(8, self.states, *SHAPE)} if self.states else {})


class OneStep(DistillTask):
    """A task whose stages are one loss of each player on the device; `seen` holds what each was."""

    seen: dict[str, Counter[str]]

    def fit(self, name: str, modules: list[Any], budget_weight: float = 1.0, batches: Any = None, **more: Any) -> Any:
        source = self.batches if batches is None else batches
        shared = {key: Remote(value) for key, value in source[0].items()}
        for p in modules:
            moved(p.module)
        for last in (False, True):  # in the first turn tables are moved to where they stay
            batch = dict(shared)
            for p in modules:
                p.module.train()
                with counted() as found, torch.set_grad_enabled(last):
                    loss = p.loss(batch)
                self.seen[f"{name} {p.name}"] = found
                if last:
                    loss.backward()
        return {p.name: p.module.eval().requires_grad_(False) for p in modules}

    def pairs(self, name: str, count: int, **how: Any) -> Any:
        return Drawn(count, len(how.get("states", ())))


def remote_task(out: Path, prediction: str = "v") -> OneStep:
    torch.manual_seed(3)
    net = UNet(1, widths=(8,), classes=2, embedding=16)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    schedule = VPCosine(offset=0.0) if prediction == "v" else Discrete.linear()
    base = moved(Denoiser(net, schedule, prediction).eval().requires_grad_(False))
    job = OneStep(base, base, Squares(), SHAPE, out, steps=Steady(10), show=False)  # type: ignore[arg-type]
    job.seen = {}
    return job


# the smallest that go through every line; R1 is a gradient of a gradient, which the pretended device does not know
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
    *(name for name in names("distillers") if name not in SPELLED),
    "guided:steps=(2,)", "guided:steps=(2,),kind=stochastic", "guided:steps=(4,2),shared=true",
    "reflow:pairs=16", "reflow:pairs=16,steps=2,coupling=ot_class", "diffusion_gan",
    "diffusion_gan:critic=heads,times=all", "diffusion_gan:posterior=true", "dmd:steps=4",
    "consistency:mode=training,curriculum=ect", "consistency:curriculum=root,levels=lognormal", "dsno:pairs=16",
    "sft_pg:steps=2,bound=spectral,balance=true", "rcfd:steps=(2,),width=8", "mmd:steps=2,width=8",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has no autocast for the name that the pretended device goes by."""
    plain = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a, **k: contextlib.nullcontext() if kind == "meta" else plain(kind, *a, **k)
    )


@pytest.mark.parametrize(
    "method, prediction", [*((method, "v") for method in METHODS), ("progressive:steps=(2,)", "eps"), ("dmd", "eps")]
)
def test_a_loss_copies_next_to_nothing_to_the_device(method: str, prediction: str, tmp_path: Path) -> None:
    with Pretend():
        job = remote_task(tmp_path, prediction)
        pick("distillers", method).distill(job)
    assert job.seen
    for name, found in job.seen.items():
        copies = sum(n for what, n in found.items() if what.startswith("to"))
        waits = sum(n for what, n in found.items() if what.startswith("wait"))
        print(method, prediction, name, copies, waits, dict(found))
        assert copies <= 2, (name, found)


def test_a_loss_of_training_copies_nothing_to_the_device() -> None:
    for loss in (DenoisingLoss(label_drop=0.5), DenoisingLoss(spread=False, times=LogNormal())):
        with Pretend():
            job = remote_task(Path())
            with counted() as found:
                loss(job.denoiser, {key: Remote(value) for key, value in Squares()[0].items()})
        assert not found


def test_the_pretended_device_counts_and_refuses() -> None:
    with Pretend():
        x = Remote(torch.randn(4, 2))
        with counted() as found:
            assert (x * torch.tensor(2.0)).device == DEVICE  # numbers are let through, as on a GPU
            x * torch.randn(4, 1).to(DEVICE)
            x[torch.tensor([0])]
            float(x.sum())
        assert sum(found.values()) == 3, found
        with pytest.raises(RuntimeError, match="one device"):
            x + torch.randn(4, 2)
        layer = moved(nn.Linear(2, 1))
        layer(x).sum().backward()
        assert isinstance(layer.weight.grad, Remote)
