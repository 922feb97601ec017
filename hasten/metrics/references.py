"""Reference statistics of real images, as a folder of two files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput, NonFinite, nearest
from ..files import sha256, write_atomic
from .frechet import moments
from .inception_score import class_accuracy, inception_score

ZOO = Path(__file__).resolve().parent.parent / "zoo"
BUNDLED = {"fashion": ZOO / "fashion_features"}
CARD = "features.json"


@dataclass(frozen=True)
class Reference:
    """Statistics of real images in one feature space.

    Args:
        name, split: of the images.
        features: name of the feature network (see `features.net_name`).
        count: number of images.
        mean: `(D,)` float64.
        covariance: `(D, D)` float64.
        sample: features `(M, D)` float32 of M of them in random order, for kernel and neighbour metrics.
        histogram: images per class, empty without labels.
        accuracy: the classifier's own on these images, or None.
        floor: the real-data baseline {metric: {n: value}}: the metrics of n real training images.
    """

    name: str
    split: str
    features: str
    count: int
    mean: Tensor
    covariance: Tensor
    sample: Tensor
    histogram: tuple[int, ...] = ()
    accuracy: float | None = None
    floor: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def floor_at(self, metric: str, n: int) -> float | None:
        """The real-data baseline of a metric at n samples; None if unknown.

        Linear in 1/n between the counts in the table, extrapolated down to half the smallest and up to twice the
        largest; a single entry is used for every n.
        """
        table = sorted((int(k), v) for k, v in self.floor.get(metric, {}).items())
        if len(table) == 1:
            return table[0][1]
        if not table or not table[0][0] / 2 <= n <= table[-1][0] * 2:
            return None
        right = next((i for i, (count, _) in enumerate(table) if count >= n and i > 0), len(table) - 1)
        (n0, v0), (n1, v1) = table[right - 1], table[right]
        return v0 + (v1 - v0) * (1 / n - 1 / n0) / (1 / n1 - 1 / n0)


def make_reference(
    features: Tensor,
    name: str,
    split: str,
    net: str,
    labels: Tensor | None = None,
    logits: Tensor | None = None,
    keep: int = 10_000,
    seed: int = 0,
) -> Reference:
    """Reference statistics from the features of real images.

    With logits and labels over the same K classes, inception score and accuracy of these images become the baseline of
    these two metrics; the other baselines need further real images (`evaluate.floor_table`).

    Args:
        features: `(N, D)`.
        name, split: of the images.
        net: name of the feature network.
        labels: `(N,)` or None.
        logits: `(N, K)` or None.
        keep: how many rows to store for kernel and neighbour metrics, chosen at random, rounded as in the file.
        seed: of that choice.
    """
    mean, covariance = moments(features)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:keep]
    histogram = () if labels is None else tuple(int(n) for n in torch.bincount(labels))
    accuracy, floor = None, {}
    if logits is not None:
        floor["inception_score"] = {len(logits): inception_score(logits)[0]}
        if labels is not None and logits.shape[1] == len(histogram):
            accuracy = class_accuracy(logits, labels)[0]
            floor["accuracy"] = {len(logits): accuracy}
    sample = narrow(features[order]).float()
    return Reference(name, split, net, len(features), mean, covariance, sample, histogram, accuracy, floor)


def narrow(sample: Tensor) -> Tensor:
    """Features in the dtype of the file: float16, or float32 if float16 would overflow."""
    return sample.half() if float(sample.abs().max()) <= torch.finfo(torch.float16).max else sample.float()


def save_reference(reference: Reference, folder: str | Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write `reference.safetensors` and `features.json` into a folder.

    Entries of other files in an existing `features.json` (the network's weights) are preserved.

    Args:
        reference: the statistics.
        folder: created if it does not exist.
        extra: further entries of `features.json`.
    """
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "mean": reference.mean,
        "covariance": reference.covariance,
        "sample": narrow(reference.sample).contiguous(),
    }
    card: dict[str, Any] = _read_card(folder) if (folder / CARD).is_file() else {"format": 1, "sha256": {}}
    data, old = save(tensors), card.get("files", {}).get("reference", "reference.safetensors")
    digest = hashlib.sha256(data).hexdigest()
    name = old if card["sha256"].get(old) in (None, digest) else f"reference-{digest[:8]}.safetensors"
    write_atomic(folder / name, data)  # the old file is needed until the card names the new one
    card["sha256"] = {key: value for key, value in card["sha256"].items() if key != old} | {name: digest}
    if name != "reference.safetensors":
        card["files"] = {**card.get("files", {}), "reference": name}
    card["reference"] = {
        key: getattr(reference, key) for key in ("name", "split", "features", "count", "histogram", "accuracy")
    } | {"floor": {m: {str(n): v for n, v in t.items()} for m, t in reference.floor.items()}}
    write_card(folder, {**card, **(extra or {})})
    if old != name:
        (folder / old).unlink(missing_ok=True)


def reference(which: str | Path) -> Reference:
    """Load reference statistics.

    Args:
        which: a bundled name ("fashion") or a folder.

    Raises:
        BadInput: for an unknown name, a missing or damaged file, or a hash that does not match.
        NonFinite: for statistics that are not finite.
    """
    folder = BUNDLED.get(str(which), Path(which))
    if not folder.is_dir():
        raise BadInput(f"no reference statistics {str(which)!r}: not a folder; {nearest(str(which), BUNDLED)}")
    card = _read_card(folder)
    tensors = load_tensors(folder, "reference")
    if bad := [name for name, value in tensors.items() if not bool(value.isfinite().all())]:
        raise NonFinite(f"{folder / 'reference.safetensors'}: the statistics {bad[0]} hold NaN or infinity")
    try:
        r = card["reference"]
        floor = {m: {int(n): float(v) for n, v in t.items()} for m, t in r["floor"].items()}
        return Reference(
            name=r["name"],
            split=r["split"],
            features=r["features"],
            count=int(r["count"]),
            mean=tensors["mean"],
            covariance=tensors["covariance"],
            sample=tensors["sample"].float(),
            histogram=tuple(r["histogram"]),
            accuracy=r["accuracy"],
            floor=floor,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{folder / CARD} does not describe reference statistics: {error!r}") from None


def load_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """Load the tensors of `folder/stem.safetensors`; raises BadInput if its sha256 is not that in `features.json`."""
    card = _read_card(folder)
    path = folder / str(card.get("files", {}).get(stem, f"{stem}.safetensors"))
    expected = card["sha256"].get(path.name)
    if not path.is_file():
        raise BadInput(f"{path} is missing")
    if expected is None:
        raise BadInput(f"{folder / CARD} has no sha256 of {path.name}")
    if (actual := sha256(path)) != expected:
        raise BadInput(f"{path} is damaged or was replaced: sha256 {actual[:12]}, expected {expected[:12]}")
    from safetensors.torch import load_file

    return load_file(path)


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write `features.json` atomically."""
    write_atomic(folder / CARD, json.dumps(card, indent=1) + "\n")


def _read_card(folder: Path) -> dict[str, Any]:
    """Read `features.json`; raises BadInput if it is missing or not of format 1."""
    path = folder / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise BadInput(f"{folder} holds no {CARD}: not a folder of reference statistics") from None
    except ValueError as error:
        raise BadInput(f"{path} is not readable JSON: {error}") from None
    if not isinstance(card, dict) or card.get("format") != 1 or not isinstance(card.get("sha256"), dict):
        raise BadInput(f"{path} is not a feature card of format 1")
    return card
