"""Data of `benchmarks.few_shot`: a synthetic set with a spurious background, Omniglot, kinds of clothes."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hasten.train.data import open_data

COLOURS = torch.tensor([[0.8, -0.8, -0.8], [-0.8, 0.8, -0.8], [-0.8, -0.8, 0.8], [0.8, 0.8, -0.8]])
CLOTHES = ("t-shirt", "pullover", "coat", "shirt")


def spurious(n: int, side: int, correlated: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Images (n, 3, side, side) in [-1, 1] and their classes 0..3: the colour of a 2x2 mark in the middle.

    The background has one of the same colours, weakened, and a little noise; it is that of the class in nine of ten
    images where `correlated`, else random.
    """
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    background = torch.randint(0, 4, (n,), generator=generator)
    if correlated:
        background = torch.where(torch.rand(n, generator=generator) < 0.9, y, background)
    shade = 0.5 * COLOURS[background] + 0.05 * torch.randn(n, 3, generator=generator)
    x = shade[:, :, None, None] + 0.05 * torch.randn(n, 3, side, side, generator=generator)
    middle = side // 4 * 2
    x[:, :, middle : middle + 2, middle : middle + 2] = COLOURS[y][:, :, None, None]
    return x.clamp(-1, 1), y


def decode(data: bytes, side: int) -> Tensor:
    """A drawing as (1, side, side) in [-1, 1], strokes white."""
    image = Image.open(io.BytesIO(data)).convert("L").resize((side, side), Image.Resampling.BOX)
    return 1 - torch.from_numpy(np.asarray(image).copy()).float()[None] / 127.5


def omniglot_background(path: Path, side: int) -> tuple[Tensor, list[str]]:
    """All drawings of the background alphabets, and their characters."""
    with zipfile.ZipFile(path) as file:
        names = sorted(n for n in file.namelist() if n.startswith("background/") and n.endswith(".png"))
        return torch.stack([decode(file.read(n), side) for n in names]), [n.rpartition("/")[0] for n in names]


def omniglot_run(path: Path, run: int, side: int) -> tuple[Tensor, list[str], Tensor, list[str]]:
    """Shots and test images of one of the 20 official runs (from 1), with the training file as the class of each."""
    with zipfile.ZipFile(path) as file:
        prefix = f"oneshot/run{run:02d}/"
        lines = file.read(f"{prefix}class_labels.txt").decode().split()
        pairs = [(a.rpartition("/")[2], b.rpartition("/")[2]) for a, b in zip(lines[::2], lines[1::2])]
        test = torch.stack([decode(file.read(f"{prefix}test/{a}"), side) for a, _ in pairs])
        shots = sorted({b for _, b in pairs})
        train = torch.stack([decode(file.read(f"{prefix}training/{b}"), side) for b in shots])
    return train, shots, test, [b for _, b in pairs]


def clothes(folder: Path, shots: int, images: int, draw: int) -> tuple[Tensor, list[str], Tensor, list[str]]:
    """`shots` training images of each of four kinds, the draw-th drawing, and the first `images` test images of all."""
    names = {"t-shirt": 0, "pullover": 2, "coat": 4, "shirt": 6}
    train, test = (open_data(folder, split=part, report=False) for part in ("train", "test"))
    assert train.labels is not None and test.labels is not None
    generator = torch.Generator().manual_seed(1000 + draw)
    rows, y = [], []
    for name in CLOTHES:
        mine = (train.labels == names[name]).nonzero()[:, 0]
        rows.append(mine[torch.randperm(len(mine), generator=generator)[:shots]])
        y += [name] * shots
    back = {number: name for name, number in names.items()}
    chosen = torch.tensor([k for k, label in enumerate(test.labels.tolist()) if label in back][:images])
    x = [data.images(part).float() / 127.5 - 1 for data, part in ((train, torch.cat(rows)), (test, chosen))]
    return x[0], y, x[1], [back[int(test.labels[k])] for k in chosen]
