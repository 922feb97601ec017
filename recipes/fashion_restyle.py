"""Restyling of Fashion-MNIST's test images: the distilled pair against DDIM there and back.

    hasten distill runs/guided/guidance --data /usr/share/datasets/fashion-mnist --out runs/encoder \
        --method 'encoder:steps=(16,),start=64,lr=1e-3' --evaluations 1e5 --batch-size 64
    hasten distill runs/guided/guidance --data /usr/share/datasets/fashion-mnist --out runs/decoder \
        --method 'guided:steps=(16,),start=64' --evaluations 1e5 --batch-size 64
    python -m recipes.fashion_restyle --encoder runs/encoder --decoder runs/decoder --out runs/restyle

The images of one class are encoded without guidance and decoded as another class. One JSON line a way: evaluations an
image; accuracy: share that the bundled classifier takes for the target class; kept: correlation of the 7x7 block means
of result and source, beside chance, that of results and other sources of the same class; rms: to what DDIM there and
back makes with --fine steps each way. The picture has a block for each pair of classes: the sources, then a row a way.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cyclopts
import torch
from torch import Tensor
from torch.nn import functional as F

import hasten
from hasten.files import write
from hasten.images import grid, png
from hasten.metrics import feature_net
from hasten.tasks.style_transfer import restyle
from hasten.train import open_data

DATA = "/usr/share/datasets/fashion-mnist"
PAIRS = (("Ankle boot", "Sneaker"), ("Ankle boot", "Bag"), ("Pullover", "Dress"), ("Shirt", "T-shirt"))
SHOWN = 8


def layout(x: Tensor) -> Tensor:
    """Block means (n, 49) without their own mean, of length one: products of two are correlations."""
    blocks = F.adaptive_avg_pool2d(x.mean(1, keepdim=True), 7).flatten(1)
    blocks = blocks - blocks.mean(1, keepdim=True)
    return F.normalize(blocks, dim=1)


def figures(results: list[Tensor], sources: list[Tensor], fine: list[Tensor], targets: list[int]) -> dict[str, float]:
    """Means over the pairs of classes."""
    net, told = feature_net("fashion"), {"accuracy": [], "kept": [], "chance": [], "rms": []}  # type: ignore[var-annotated]
    for made, source, truth, target in zip(results, sources, fine, targets, strict=True):
        with torch.no_grad():
            told["accuracy"].append((net(made)[1].argmax(1) == target).float().mean())
        told["kept"].append((layout(made) * layout(source)).sum(1).mean())
        told["chance"].append((layout(made) * layout(source.roll(1, 0))).sum(1).mean())
        told["rms"].append((made - truth).square().mean().sqrt())
    return {name: float(torch.stack(values).mean()) for name, values in told.items()}


def main(
    *,
    encoder: Path,
    decoder: Path,
    out: Path,
    teacher: str = "fashion",
    data: str = DATA,
    n: int = 32,
    fine: int = 128,
    guidance_scale: float = 2.0,
) -> None:
    """Restyle by all ways, and write `rows.jsonl` and `restyled.png`."""
    whole, up, down = hasten.load(teacher), hasten.load(encoder), hasten.load(decoder)
    test = open_data(data, split="test")
    assert test.labels is not None and whole.classes is not None
    few = (up.steps, down.steps)
    ways: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        f"DDIM, {fine} + {fine} steps": (whole, whole, {"encode_steps": fine, "decode_steps": fine}),
        f"DDIM, {few[0]} + {few[1]} steps": (whole, whole, {"encode_steps": few[0], "decode_steps": few[1]}),
        f"distilled pair, {few[0]} + {few[1]} steps": (up, down, {}),
    }
    sources, targets, made = [], [], {name: [] for name in ways}  # type: ignore[var-annotated]
    rows: list[dict[str, Any]] = []
    for first, second in PAIRS:
        own, other = whole.class_index(first), whole.class_index(second)
        chosen = (test.labels == own).nonzero()[:n, 0].tolist()
        sources.append(test.images(chosen).float() / 127.5 - 1)
        targets.append(other)
    spent = {}
    for name, (encodes, decodes, steps) in ways.items():
        ddim = {} if decodes is down else {"sampler": "ddim", "times": "trailing"}
        for (first, second), source in zip(PAIRS, sources, strict=True):
            done = restyle(encodes, decodes, source, first, second, guidance_scale=guidance_scale, **steps, **ddim)
            made[name].append(done.images)
            spent[name] = done.evaluations
    out.mkdir(parents=True, exist_ok=True)
    truth = made[next(iter(ways))]
    for name in ways:
        row = {
            "way": name,
            "evaluations": spent[name],
            "n": n * len(PAIRS),
            **figures(made[name], sources, truth, targets),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    blocks = [
        torch.cat([source[:SHOWN], *(made[name][k][:SHOWN] for name in ways)]) for k, source in enumerate(sources)
    ]
    write(out / "restyled.png", png(grid(torch.cat(blocks), SHOWN)))


if __name__ == "__main__":
    cyclopts.run(main)
