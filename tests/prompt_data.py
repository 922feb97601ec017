"""Captioned pictures and a model of prompts whose images show them, for tests of what is measured on prompts."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.denoiser import Denoiser
from hasten.metrics.text_judge import TextJudge
from hasten.model import Model
from hasten.schedules import VPCosine

SIDE = 16
WORDS = ("fox", "cat", "dog", "owl", "bee", "ant")
COLOURS = ("red", "blue", "green", "grey", "pink")


def captions(n: int, first: int = 0) -> list[str]:
    """n different captions."""
    return [f"{COLOURS[k % 5]} {WORDS[k // 5 % 6]} {k // 30}" for k in range(first, first + n)]


def pattern(text: str) -> Tensor:
    """The picture of a text, (3, SIDE, SIDE) in [-0.7, 0.7]."""
    seed = zlib.crc32(text.encode())
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 1.4 - 0.7
    return F.interpolate(coarse, scale_factor=SIDE // 4)[0]


def write_captioned(folder: Path, counts: dict[str, int] | None = None, noise: float = 0.1) -> Path:
    """A folder of splits with metadata.jsonl; captions of the splits differ."""
    first = 0
    for number, (split, n) in enumerate((counts or {"train": 60, "test": 24}).items()):
        (folder / split).mkdir(parents=True)
        rng = np.random.default_rng(number)
        lines = []
        for k, text in enumerate(captions(n, first)):
            pixels = pattern(text).permute(1, 2, 0).numpy() + noise * rng.standard_normal((SIDE, SIDE, 3))
            file = f"{k:03d}.png"
            Image.fromarray((127.5 * (pixels + 1)).clip(0, 255).round().astype(np.uint8)).save(folder / split / file)
            lines.append(json.dumps({"file_name": file, "text": text}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        first += n
    return folder


class OracleJudge(TextJudge):
    """Knows the picture of every text: its vectors are the coarse pictures themselves."""

    def __init__(self) -> None:
        super().__init__(None, 1000, SIDE)
        self.scale = nn.Parameter(torch.ones(1))
        self.named("oracle")

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * F.avg_pool2d(self.resized(images), SIDE // 4).flatten(1)

    def project(self, features: Tensor) -> Tensor:
        return F.normalize(features - features.mean(1, keepdim=True), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.project(F.avg_pool2d(torch.stack([pattern(text) for text in texts]), SIDE // 4).flatten(1))

    def truncated(self, texts: Sequence[str]) -> int:
        return sum(len(text) > self.length for text in texts)


class ShownPrompts:
    """Conditions that are the pictures of the prompts."""

    def __init__(self, follow: bool = True) -> None:
        self.follow = follow
        self.asked: list[str] = []

    def texts(self, n: int, prompt: Any = None) -> list[str]:
        prompts = [prompt] if prompt is None or isinstance(prompt, str) else prompt
        return [prompts[k % len(prompts)] or "" for k in range(n)]

    def cond(self, n: int, prompt: Any = None, seed: int = 0) -> dict[str, Tensor]:
        texts = self.texts(n, prompt)
        self.asked += texts
        shown = torch.stack([pattern(text if self.follow else "blind") for text in texts])
        return {"text": shown, "null_text": torch.zeros_like(shown)}

    def to(self, device: Any) -> ShownPrompts:
        return self


class Shower(nn.Module):
    """x0 = picture of the prompt + a little of the noisy image."""

    null_conditions = True

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(noise))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, **null: Tensor) -> Tensor:
        return text + self.gain * x


def shower(noise: float = 0.1, follow: bool = True, **options: Any) -> Model:
    """A model of prompts whose images are the pictures of their prompts, with some noise."""
    denoiser = Denoiser(Shower(noise), VPCosine(), "x0").eval().requires_grad_(False)
    shape = (3, SIDE, SIDE)
    return Model(denoiser, "shower", shape, conditioning=ShownPrompts(follow), sampler="ddim", steps=2, **options)
