"""Train the classifier whose features evaluate Fashion-MNIST samples, and compute the test split's statistics.

    python -m recipes.fashion_features --out hasten/zoo/fashion_features

Writes fp16 weights (0.78 MB), reference statistics (2.69 MB) and `features.json`. Result, one core of an AMD EPYC
(Zen 5), torch 2.13, bf16 autocast, seed 0: 9 epochs in 442 CPU seconds, test accuracy 92.93 %; the
statistics and baselines take 80 CPU seconds more.

Frechet distance to the test split (10,000 images) of real training images, by count (mean of up to four disjoint sets):
1,000 0.187 | 2,000 0.104 | 5,000 0.0524 | 10,000 0.0327 | 60,000 0.0146. Of the test split changed: noise of deviation
0.1 5.70 | 3x3 blur 7.93 | one class of ten missing 0.859 | mirrored 7.03 | moved by one pixel 0.099. Of pure noise:
84.8. So at 10,000 images a missing class is at 26 times the real-data baseline, and slight noise at 174. Precision
.875, recall .874, density 1.00, coverage .970 of real images at 10,000; inception score 6.42. These are not FID values
and are only comparable with values on the same features.

Also tried, same seed: no label smoothing and shifts of one pixel only. As accurate (92.90 %), with a baseline of
0.0619 at 10,000, and about equally sensitive to the changes (20 times the baseline for the missing class, 151 for
noise, 381 for blur, 7 for one pixel): not used.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from hasten.errors import BadInput
from hasten.files import sha256
from hasten.metrics import extract, frechet_distance, make_reference, moments, save_reference
from hasten.metrics.evaluate import floor_table
from hasten.metrics.fashion import CLASSES, FashionClassifier, fashion_classifier
from hasten.metrics.references import write_card
from hasten.train.data import open_data, to_float

DATA = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist


def read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) uint8 and labels (N,) int64 of `train` or `test`."""
    data = open_data(folder, split, channels=1)
    if data.labels is None or data.shape != (1, 28, 28):
        raise BadInput(f"{folder} does not hold Fashion-MNIST: images {data.shape}")
    return data.images(range(len(data))), data.labels


def shift(images: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Move every image by up to `max_shift` pixels in each direction, padding with black (-1)."""
    b, _, h, w = images.shape
    padded = F.pad(images, (max_shift, max_shift, max_shift, max_shift), value=-1.0)
    dy, dx = torch.randint(0, 2 * max_shift + 1, (2, b, 1), generator=generator)
    rows = (dy + torch.arange(h))[:, :, None]
    columns = (dx + torch.arange(w))[:, None, :]
    return padded[torch.arange(b)[:, None, None], 0, rows, columns][:, None]


def train(
    images: Tensor,
    labels: Tensor,
    epochs: int = 9,
    batch: int = 128,
    rate: float = 3e-3,
    smoothing: float = 0.05,
    shift_by: int = 2,
    seed: int = 0,
) -> FashionClassifier:
    """AdamW, one-cycle cosine rate, label smoothing, shifts by up to `shift_by` pixels; bf16 autocast."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = FashionClassifier()
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.02)
    steps, warm, step = epochs * (len(images) // batch), 300, 0
    start = time.process_time()
    for epoch in range(epochs):
        net.train()
        total = 0.0
        for index in torch.randperm(len(images), generator=generator).split(batch):
            if len(index) < batch:
                continue
            lr = rate * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            x = shift(to_float(images[index]), shift_by, generator)
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(x)[1]
            loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, step = total + float(loss.detach()), step + 1
        spent = time.process_time() - start
        print(f"epoch {epoch + 1}/{epochs} loss {total * epochs / steps:.4f} cpu {spent:.0f} s", flush=True)
    return net.eval()


def save_classifier(net: FashionClassifier, folder: Path) -> None:
    """`weights.safetensors` in fp16 and its hash in `features.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half().contiguous() for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    (folder / "weights.safetensors").write_bytes(save(state))
    digest = sha256(folder / "weights.safetensors")
    write_card(folder, {"format": 1, "sha256": {"weights.safetensors": digest}, "classes": list(CLASSES)})


def measure(folder: Path, data: Path) -> None:
    """Reference statistics of the test split with baselines, written to `folder`; prints the sanity rows."""
    net = fashion_classifier(folder)
    images, labels = read(data, "test")
    features, logits = extract(net, images)
    test = make_reference(features, "Fashion-MNIST", "test", net.name, labels, logits)
    train_images = read(data, "train")[0]
    order = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(0))
    train_features = extract(net, train_images[order])[0]
    test = replace(test, floor={**floor_table(train_features, test), **test.floor})
    save_reference(test, folder)
    print("accuracy on test", test.accuracy)
    for metric, table in test.floor.items():
        print("floor", metric, {n: float(f"{v:.4g}") for n, v in table.items()})

    clean, noise = to_float(images), torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    rows = {
        "train, 60k": train_features,
        "test + noise 0.1": extract(net, clean + 0.1 * noise)[0],
        "test, 3x3 blur": extract(net, F.avg_pool2d(F.pad(clean, (1, 1, 1, 1), value=-1.0), 3, stride=1))[0],
        "test, one class missing": features[labels != 6],
        "test, mirrored": extract(net, clean.flip(3))[0],
        "test, moved by 1 px": extract(net, clean.roll(1, dims=3))[0],
        "noise": extract(net, noise)[0],
    }
    for name, f in rows.items():
        print(f"frechet {name}: {frechet_distance(*moments(f), test.mean, test.covariance):.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the four IDX .gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the statistics")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep-weights", action="store_true", help="only recompute the statistics")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.keep_weights:
        save_classifier(train(*read(args.data, "train"), epochs=args.epochs), args.out)
    measure(args.out, args.data)


if __name__ == "__main__":
    main()
