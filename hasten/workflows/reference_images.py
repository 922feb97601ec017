"""Reference statistics of a user's own real images, with a real-data baseline, cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..distributed.ranks import Ranks
from ..errors import BadInput, HastenError
from ..metrics import Reference, extract, feature_net, floor_table, make_reference, net_name, save_reference
from ..metrics import reference as load_reference
from ..metrics.references import BUNDLED
from ..train.data import open_data
from ..utils.environment import cache_folder

VERSION = 1
MINIMUM_IMAGES = 20  # two halves of ten
BATCH = 256


def is_images(path: str | Path) -> bool:
    """Whether a reference is a set of real images, not statistics of them."""
    folder = Path(path)
    return str(path) not in BUNDLED and folder.exists() and not (folder / "features.json").is_file()


def resolve_reference(
    reference: str | Path | Reference | None,
    features: str | nn.Module | None,
    shape: Sequence[int],
    device: torch.device,
    ranks: Ranks,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Reference | None, nn.Module | None]:
    """Resolve the reference that samples are evaluated against, and the feature network of it.

    Args:
        reference: statistics, their bundled name or folder; or a folder, zip or array of real images, whose features
            are extracted by `features` once and cached.
        features: the feature network or its name. Default: that of the statistics.
        shape: (C, H, W) of the samples.
        device: of the feature network.
        ranks: the processes; the main process of each machine fills the cache.
        report: receives a line about new statistics.

    Returns:
        The statistics, and the feature network on `device`; None and None without a reference.

    Raises:
        BadInput: if the two do not fit together, or such samples cannot be evaluated.
    """
    if reference is None:
        if features is not None:
            raise BadInput("features need a reference: give --reference, such as a folder of real images")
        return None, None
    if not (len(shape) == 3 and shape[0] in (1, 3)):
        raise BadInput(f"samples of shape {tuple(shape)} are no grey or RGB images: they have no reference")
    if not isinstance(reference, Reference) and is_images(reference):
        if features is None:
            raise BadInput(f"{reference} holds images: give --features, the network that extracts their features")
        net = check_feature_net(features, shape).to(device)
        with ranks.main_process_first():
            return cached_reference(Path(reference), net, shape, report), net
    statistics = reference if isinstance(reference, Reference) else load_reference(reference)
    net = check_feature_net(features or statistics.features, shape).to(device)
    if net_name(net) != statistics.features:
        raise BadInput(f"the reference holds {statistics.features} features, not those of {net_name(net)}")
    return statistics, net


def check_feature_net(features: str | nn.Module, shape: Sequence[int]) -> nn.Module:
    """The feature network. Raises BadInput if it does not support samples of `shape`."""
    net = feature_net(features)
    if net_name(net) == "fashion" and shape[0] != 1:
        raise BadInput(
            "the features of fashion are for grey garments: for RGB images use --features efficientnet_lite0 "
            "(or inception)"
        )
    return net


def cached_reference(path: Path, net: nn.Module, shape: Sequence[int], report: Callable[[str], None]) -> Reference:
    """The reference statistics of a folder, zip or array of real images, cached on disk.

    Its real-data baseline (`floor`) is the distance of one random half of the images to the other, for several counts.

    Args:
        path: of the images.
        net: the feature network.
        shape: (C, H, W) that the images are resized to.
        report: receives a line if the statistics are new.

    Raises:
        BadInput: if there are too few images, or they cannot be read.
    """
    key = {"files": file_states(path), "features": net_name(net), "shape": list(shape), "version": VERSION}
    text = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    cached = cache_folder() / "references" / text
    if (cached / "features.json").is_file():
        try:
            return replace(load_reference(cached), name=path.name)
        except HastenError:  # incomplete or of an old version: computed again
            shutil.rmtree(cached, ignore_errors=True)
    channels, height, width = shape
    data = open_data(path, size=(height, width), channels=channels)
    if len(data) < MINIMUM_IMAGES:
        raise BadInput(
            f"{path} holds {len(data)} images: a reference needs at least {MINIMUM_IMAGES}, better 2,000 or more"
        )
    batches = [range(first, min(first + BATCH, len(data))) for first in range(0, len(data), BATCH)]
    extracted = [extract(net, data.images(batch)) for batch in batches]
    features = torch.cat([batch for batch, _ in extracted])
    logits = None if extracted[0][1] is None else torch.cat([batch for _, batch in extracted if batch is not None])
    statistics = make_reference(features, path.name, "all", net_name(net), None, logits)
    statistics = replace(statistics, floor={**statistics.floor, **real_baseline(features)})
    report(f"reference: {len(data)} images of {path}, features of {net_name(net)}; cached in {cached}")
    temporary = cached.parent / f".{text}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        save_reference(statistics, temporary)
        os.replace(temporary, cached)
    except OSError:  # no cache, or another process was faster
        shutil.rmtree(temporary, ignore_errors=True)
    return statistics


def real_baseline(features: Tensor, seed: int = 0) -> dict[str, dict[int, float]]:
    """The metrics of real images against others of the same set: one random half against the other.

    Args:
        features: of all the images, (n, d).
        seed: of the halves.

    Returns:
        {metric: {count of images: value}}.
    """
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    one, two = features[order[: len(order) // 2]], features[order[len(order) // 2 :]]
    counts = sorted({len(two) // k for k in (1, 2, 4, 8, 16) if len(two) // k >= 10})
    table = floor_table(two, make_reference(one, "half", "half", "own"), counts)
    table.pop("inception_score", None)
    return table


def file_states(path: Path) -> list[list[object]]:
    """Name, size and modification time of every file, as a proxy for the content."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [
        ["" if file == path else file.relative_to(path).as_posix(), file.stat().st_size, file.stat().st_mtime_ns]
        for file in files
    ]
