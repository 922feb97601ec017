"""Train a model on one's own images: data, network, loss and loop put together, and a Model saved at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .denoiser import Denoiser
from .errors import BadInput
from .machine import choose, parse, spell
from .model import Model
from .nets.unet import UNet
from .predictions import V
from .ranks import Ranks
from .schedules import VPCosine
from .train.data import Batches, Data, open_data
from .train.fit import Fit, Player
from .train.losses import DenoisingLoss


def train_model(
    data: str | Path | Data,
    out: str | Path,
    steps: int | None = None,
    minutes: float | None = None,
    size: int | None = None,
    channels: int | None = None,
    label: str | None = None,
    widths: Sequence[int] | None = None,
    blocks: int = 1,
    patch: int | None = None,
    batch_size: int = 64,
    lr: float = 1e-3,
    label_drop: float = 0.1,
    flip: bool = False,
    runtime: str = "auto",
    seed: int = 0,
    device: str | None = None,
    name: str | None = None,
    show: bool = True,
    accumulate: int = 1,
    shard: bool = False,
) -> Model:
    """Train a U-Net with v-prediction on the cosine path `x_t = cos(pi t/2) x + sin(pi t/2) eps`; save it in `out`.

    The network's averaged weights become the model. Labels are dropped at the rate `label_drop`, so that a model of
    classes can be guided. The same call goes on from the checkpoint in `out` where an earlier one was stopped.

    data, size, channels, label: as `open_data` takes them. steps, minutes: the budget, 30 minutes if neither is given.
    widths: channels of each resolution, finest first (default: by the side of the images). blocks: residual blocks a
    level. patch: side of the squares that the network takes as one pixel. lr: peak rate of AdamW.
    runtime: `fp32`, `bf16` (autocast), or `auto`: what is faster here. show: a progress bar on a terminal.
    accumulate: parts of a batch that are computed one after another, to need less memory. Under torchrun, each process
    takes its share of every batch, and the first one writes (see `Fit`). shard: divide the network among them too.

    Raises BadInput for data or settings that cannot be used, HastenError where the loss stops being finite, and
    KeyboardInterrupt, with a line that says what was kept, at Ctrl-C.

    Reference: Salimans, Ho 2022, 2202.00512 (v-prediction); Ho, Salimans 2022, 2207.12598 (label dropout).
    """
    source = data if isinstance(data, Data) else open_data(data, size=size, channels=channels, label=label)
    out = Path(out)
    if steps is None and minutes is None:
        minutes = 30.0
    ranks = Ranks.start(device)
    torch.manual_seed(seed)
    net = network(source, widths, blocks, patch)
    denoiser = Denoiser(net, VPCosine(offset=0.0), V(), null_label=net.classes or None)
    loss = DenoisingLoss(label_drop=label_drop)
    precision = ranks.once(lambda: number_format(denoiser, source, runtime, batch_size, ranks.device))
    fit = Fit(
        steps=steps, minutes=minutes, precision=precision, seed=seed, device=device, accumulate=accumulate, shard=shard
    )
    player = Player("model", denoiser, lambda batch: loss(denoiser, batch), lr=lr)
    averaged = fit([player], Batches(source, batch_size, seed=seed, flip=flip), out, show)["model"]
    assert isinstance(averaged, Denoiser)
    card: dict[str, Any] = {
        "data": source.source,
        "images": len(source),
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "precision": precision,
        "label_drop": label_drop if source.labels is not None else 0.0,
        "last": last_line(out / "log.jsonl"),
    }
    model = Model(
        denoiser=averaged.eval().requires_grad_(False).cpu(),
        name=name or out.resolve().name,
        shape=source.shape,
        classes=source.classes,
        guidance_scale=1.5 if source.classes else 1.0,
        card=card,
    )
    if ranks.first:
        model.save(out)
    ranks.wait()
    return model


def network(data: Data, widths: Sequence[int] | None, blocks: int, patch: int | None) -> UNet:
    """A U-Net for these images, with a level more for every doubling of the side beyond 32."""
    channels, height, width = data.shape
    side = max(height, width)
    if widths is None:
        widths = (64, 128) if side <= 32 else (64, 128, 192) if side <= 64 else (64, 128, 192, 256)
    if patch is None:
        patch = 2 if side >= 24 else 1
    try:
        net = UNet(channels, widths=widths, blocks=blocks, patch=patch, classes=len(data.classes or ()))
    except ValueError as e:
        raise BadInput(str(e)) from e
    if height % net.multiple or width % net.multiple:
        near = max(round(side / net.multiple), 1) * net.multiple
        raise BadInput(
            f"images of {height}x{width} do not fit a network of patch {patch} and {len(widths)} levels, "
            f"which needs sides that {net.multiple} divides: give --size {near}, or other widths and patch"
        )
    return net


def number_format(denoiser: Denoiser, data: Data, runtime: str, batch_size: int, device: torch.device) -> str:
    """`fp32` or `bf16`, as asked or as a timing of the forward pass finds."""
    if runtime != "auto":
        return spell(parse(runtime)).split("+")[0]
    x = torch.randn(min(batch_size, 64), *data.shape, device=device)
    return spell(choose(denoiser.to(device), x, f"train {denoiser.net}")).split("+")[0]


def last_line(log: Path) -> dict[str, Any]:
    """The last line of a training log: step, seconds, loss."""
    lines = log.read_text().splitlines() if log.is_file() else []
    return json.loads(lines[-1]) if lines else {}
