"""Restyling of Fashion-MNIST's test images: the distilled pair against DDIM inversion and sampling.

    hasten distill runs/guided/guidance --data /usr/share/datasets/fashion-mnist --out runs/encoder \
        --method 'encoder:steps=(16,),start=64,lr=1e-3' --evaluations 1e5 --batch-size 64
    hasten distill runs/guided/guidance --data /usr/share/datasets/fashion-mnist --out runs/decoder \
        --method 'guided:steps=(16,),start=64' --evaluations 1e5 --batch-size 64
    python -m recipes.fashion_restyle --encoder runs/encoder --decoder runs/decoder --out runs/restyle

The images of one class are encoded without guidance and decoded as another class. One JSON line per method: model
evaluations per image; accuracy: fraction classified as the target class by the bundled classifier; kept: correlation of
the 7x7 block means of result and source; chance: that of results and other sources of the same class; rms: difference
from DDIM inversion and sampling with --fine steps each. The picture has a block per pair of classes: the sources, then
a row per method.
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
from hasten.files import write_file
from hasten.images import encode_png, make_image_grid
from hasten.metrics import feature_net
from hasten.tasks.style_transfer import restyle
from hasten.train import open_data

DATA = "/usr/share/datasets/fashion-mnist"
PAIRS = (("Ankle boot", "Sneaker"), ("Ankle boot", "Bag"), ("Pullover", "Dress"), ("Shirt", "T-shirt"))
SHOWN = 8


def layout(x: Tensor) -> Tensor:
    """Centred block means (n, 49) of unit norm, whose inner products are correlations."""
    blocks = F.adaptive_avg_pool2d(x.mean(1, keepdim=True), 7).flatten(1)
    blocks = blocks - blocks.mean(1, keepdim=True)
    return F.normalize(blocks, dim=1)


def figures(results: list[Tensor], sources: list[Tensor], fine: list[Tensor], targets: list[int]) -> dict[str, float]:
    """Means over the pairs of classes."""
    net, totals = feature_net("fashion"), {"accuracy": [], "kept": [], "chance": [], "rms": []}  # type: ignore[var-annotated]
    for made, source, truth, target in zip(results, sources, fine, targets, strict=True):
        with torch.no_grad():
            totals["accuracy"].append((net(made)[1].argmax(1) == target).float().mean())
        totals["kept"].append((layout(made) * layout(source)).sum(1).mean())
        totals["chance"].append((layout(made) * layout(source.roll(1, 0))).sum(1).mean())
        totals["rms"].append((made - truth).square().mean().sqrt())
    return {name: float(torch.stack(values).mean()) for name, values in totals.items()}


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
    """Restyle with all methods, and write `rows.jsonl` and `restyled.png`."""
    base, up, down = hasten.load(teacher), hasten.load(encoder), hasten.load(decoder)
    test = open_data(data, split="test")
    assert test.labels is not None and base.classes is not None
    short = (up.steps, down.steps)
    methods: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        f"DDIM, {fine} + {fine} steps": (base, base, {"encode_steps": fine, "decode_steps": fine}),
        f"DDIM, {short[0]} + {short[1]} steps": (base, base, {"encode_steps": short[0], "decode_steps": short[1]}),
        f"distilled pair, {short[0]} + {short[1]} steps": (up, down, {}),
    }
    sources, targets, made = [], [], {name: [] for name in methods}  # type: ignore[var-annotated]
    rows: list[dict[str, Any]] = []
    for first, second in PAIRS:
        own, other = base.class_index(first), base.class_index(second)
        indices = (test.labels == own).nonzero()[:n, 0].tolist()
        sources.append(test.images(indices).float() / 127.5 - 1)
        targets.append(other)
    spent = {}
    for name, (encodes, decodes, steps) in methods.items():
        ddim = {} if decodes is down else {"sampler": "ddim", "times": "trailing"}
        for (first, second), source in zip(PAIRS, sources, strict=True):
            done = restyle(encodes, decodes, source, first, second, guidance_scale=guidance_scale, **steps, **ddim)
            made[name].append(done.images)
            spent[name] = done.evaluations
    out.mkdir(parents=True, exist_ok=True)
    truth = made[next(iter(methods))]
    for name in methods:
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
        torch.cat([source[:SHOWN], *(made[name][k][:SHOWN] for name in methods)]) for k, source in enumerate(sources)
    ]
    write_file(out / "restyled.png", encode_png(make_image_grid(torch.cat(blocks), SHOWN)))


if __name__ == "__main__":
    cyclopts.run(main)
