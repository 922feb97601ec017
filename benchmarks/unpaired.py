"""From one set to another without pairs: rectified flow, optimal-transport flow matching, DSBM and reflow.

    python -m benchmarks.unpaired --data DATA --out runs/unpaired --minutes 20

With --data the sets are the even classes (tops and bags) and the odd ones (trousers, dresses, shoes) of a Fashion-MNIST
folder; without it, the even and the odd digits of scikit-learn. Every model is trained for as many minutes; reflow,
after the first model, on its pairs. One row a model and number of steps 1, 5, 50: the transport cost, the mean of
|z_1 - z_0|^2 over images (pixels in [-1, 1]); accuracy, the fraction that a classifier takes for the second set; and
the Frechet distance to it in the classifier's features. The row "real" is of random pairs of real images.

A stopped run resumes, and rows that are there are not measured again (`rows.jsonl`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.metrics import feature_net
from hasten.metrics.frechet import frechet_distance, moments
from hasten.train import open_data
from hasten.train.data import to_float
from hasten.workflows.train import train_model

COUNTS = (1, 5, 50)


class DigitsJudge(nn.Module):
    """A classifier of 8x8 digits: images in [-1, 1] -> (features, logits), trained here in some seconds."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.out = nn.Linear(64, 64), nn.Linear(64, 10)
        optimizer = torch.optim.AdamW(self.parameters(), 3e-3)
        for _ in range(1500):
            rows = torch.randint(len(images), (256,))
            noisy = images[rows] + 0.1 * torch.randn_like(images[rows])
            loss = F.cross_entropy(self(noisy)[1], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.hidden(x.flatten(1)))
        return features, self.out(features)


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The 8x8 digits of scikit-learn, uint8 (n, 1, 8, 8), and their labels: four fifths to train on, one to test."""
    from sklearn.datasets import load_digits  # type: ignore[import-not-found,unused-ignore]

    found = load_digits()
    images = torch.from_numpy(np.round(found.images * (255 / 16)).astype(np.uint8))[:, None]
    labels, order = torch.from_numpy(found.target).long(), torch.randperm(len(found.target), generator=seeded(0))
    cut = len(order) * 4 // 5
    return (images[order[:cut]], labels[order[:cut]]), (images[order[cut:]], labels[order[cut:]])


def fashion(folder: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Fashion-MNIST, uint8 (n, 1, 28, 28), and its labels: training and test split."""
    parts = []
    for split in ("train", "test"):
        data = open_data(folder, split=split, report=False)
        assert data.labels is not None
        parts.append((data.images(list(range(len(data)))), data.labels))
    return parts[0], parts[1]


def seeded(seed: int) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", help="folder of Fashion-MNIST; by default the digits of scikit-learn")
    parser.add_argument("--out", type=Path, default=Path("runs/unpaired"))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--widths", type=int, nargs="+", default=(32, 64))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--noise", type=float, default=0.5, help="of DSBM")
    parser.add_argument("--first", type=int, default=400, help="steps of DSBM's first phase")
    parser.add_argument("--inner", type=int, default=100, help="steps of a direction's turn in DSBM")
    parser.add_argument("--pairs", type=int, default=5000, help="pairs that reflow trains on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    given = parser.parse_args()
    if given.data is None and importlib.util.find_spec("sklearn") is None:
        parser.error("the digits need scikit-learn: install it, or give --data, a folder of Fashion-MNIST")
    (train, labels), (test, test_labels) = digits() if given.data is None else fashion(given.data)
    judge = DigitsJudge(to_float(train), labels) if given.data is None else feature_net("fashion")
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "odd.npy", train[labels % 2 == 1][:, 0].numpy())
    np.save(out / "even.npy", train[labels % 2 == 0][:, 0].numpy())
    sources, targets = (to_float(test[test_labels % 2 == k][: given.n]) for k in (0, 1))
    reference = moments(judge(targets)[0])
    ledger = out / "rows.jsonl"
    done = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    known = {(row["model"], row["steps"]) for row in done}

    def record(name: str, steps: int, images: Tensor, begin: Tensor, **more: Any) -> None:
        with torch.no_grad():
            features, logits = judge(images)
        row = {
            "model": name,
            "steps": steps,
            "cost": round(float((images - begin).square().flatten(1).sum(1).mean()), 2),
            "accuracy": round(float((logits.argmax(1) % 2 == 1).float().mean()), 4),
            "frechet": round(float(frechet_distance(*moments(features), *reference)), 3),
            "n": len(images),
            **more,
        }
        with ledger.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    if ("real", 0) not in known:
        paired = targets[torch.randint(len(targets), (len(sources),), generator=seeded(0))]
        record("real", 0, paired, sources)
    dsbm = f"dsbm:noise={given.noise:g},first={given.first},inner={given.inner}"
    models = {"rf": "rectified_flow", "ot_cfm": "rectified_flow:coupling=ot", "dsbm": dsbm, "reflow": ""}
    first: Any = None  # the model whose pairs reflow trains on
    for name, process in models.items():
        data, source = out / "odd.npy", out / "even.npy"
        if name == "reflow":  # the pairs that the first model makes of the training sources
            data, process = out / "pairs.npy", "rectified_flow:coupling=paired"
            begin = to_float(torch.from_numpy(np.load(source)[: given.pairs])[:, None])
            source = out / "pair_sources.npy"
            if not data.exists():
                np.save(source, np.load(out / "even.npy")[: given.pairs])
                ends = first.sample(len(begin), images=begin, steps=20, batch_size=500)
                np.save(data, ((ends + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)[:, 0].numpy())
        model = train_model(
            data, out / name, process=process, source=str(source), minutes=given.minutes, seed=given.seed,
            widths=tuple(given.widths), batch_size=given.batch_size, precision="fp32", device=given.device,
        )  # fmt: skip
        model = model.to(given.device) if given.device else model
        first = model if name == "rf" else first
        for steps in COUNTS:
            if (name, steps) not in known:
                images = model.sample(len(sources), images=sources, steps=steps, seed=given.seed, batch_size=250)
                record(name, steps, images, sources, train_steps=model.card["last"]["step"])


if __name__ == "__main__":
    main()
