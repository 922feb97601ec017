"""Statistics of a user's own real images: made once, with a real-data baseline, and kept in the cache."""

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
from ..utils.environment import cache_folder

VERSION = 1
LEAST = 20  # images: two halves of ten
BATCH = 256


def is_images(place: str | Path) -> bool:
    """Whether a reference is real images, not statistics of them."""
    folder = Path(place)
    return str(place) not in BUNDLED and folder.exists() and not (folder / "features.json").is_file()


def reference_for(
    reference: str | Path | Reference | None,
    features: str | nn.Module | None,
    shape: Sequence[int],
    device: torch.device,
    ranks: Ranks,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Reference | None, nn.Module | None]:
    """What samples of `shape` are judged by: statistics and the network behind them, on `device`; None without any.

    reference: statistics, their bundled name or folder; or a folder, zip or array of real images, seen through
        `features`, with every process taking them from the cache where the first of the machine put them.
    Raises BadInput where the two do not go together, or cannot judge such samples.
    """
    if reference is None:
        if features is not None:
            raise BadInput("features are for a reference: give --reference, such as a folder of real images")
        return None, None
    if not (len(shape) == 3 and shape[0] in (1, 3)):
        raise BadInput(f"samples of shape {tuple(shape)} are no grey or RGB images: a reference cannot judge them")
    if not isinstance(reference, Reference) and is_images(reference):
        if features is None:
            raise BadInput(f"{reference} holds images: give --features, the network to look at them with")
        net = usable_feature_net(features, shape).to(device)
        with ranks.main_process_first():
            return of_images(Path(reference), net, shape, say), net
    known = reference if isinstance(reference, Reference) else load_reference(reference)
    net = usable_feature_net(features or known.features, shape).to(device)
    if net_name(net) != known.features:
        raise BadInput(f"the reference holds {known.features} features: {net_name(net)} cannot judge against it")
    return known, net


def usable_feature_net(features: str | nn.Module, shape: Sequence[int]) -> nn.Module:
    """The feature network, where it can look at such images."""
    net = feature_net(features)
    if net_name(net) == "fashion" and shape[0] != 1:
        raise BadInput(
            "the features of fashion are for grey garments: for colour images use --features efficientnet_lite0 "
            "(or inception)"
        )
    return net


def of_images(place: Path, net: nn.Module, shape: Sequence[int], say: Callable[[str], None]) -> Reference:
    """The reference that a folder, zip or array of real images makes, from the cache where it is there.

    Its baseline (`floor`) is the distance of one random half of the images to the other, at several counts.
    """
    from ..train.data import open_data

    key = {"files": file_list(place), "features": net_name(net), "shape": list(shape), "version": VERSION}
    text = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    kept = cache_folder() / "references" / text
    if (kept / "features.json").is_file():
        try:
            return replace(load_reference(kept), name=place.name)
        except HastenError:  # cut off or of an old version: made again
            shutil.rmtree(kept, ignore_errors=True)
    channels, height, width = shape
    data = open_data(place, size=(height, width), channels=channels)
    if len(data) < LEAST:
        raise BadInput(f"{place} holds {len(data)} images: a reference needs at least {LEAST}, better 2,000 or more")
    numbers = [range(first, min(first + BATCH, len(data))) for first in range(0, len(data), BATCH)]
    found = [extract(net, data.images(part)) for part in numbers]
    features = torch.cat([seen for seen, _ in found])
    logits = None if found[0][1] is None else torch.cat([given for _, given in found if given is not None])
    made = make_reference(features, place.name, "all", net_name(net), None, logits)
    made = replace(made, floor={**made.floor, **baseline(features)})
    say(f"reference: {len(data)} images of {place}, seen by {net_name(net)}; kept in {kept}")
    part = kept.parent / f".{text}.{os.getpid()}.tmp"
    try:
        part.mkdir(parents=True, exist_ok=True)
        save_reference(made, part)
        os.replace(part, kept)
    except OSError:  # no cache, or another process was faster: next time it is made again
        shutil.rmtree(part, ignore_errors=True)
    return made


def baseline(features: Tensor, seed: int = 0) -> dict[str, dict[int, float]]:
    """{metric: {n: value}} that n real images get against others of the same set: one random half against the other."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    one, two = features[order[: len(order) // 2]], features[order[len(order) // 2 :]]
    counts = sorted({len(two) // k for k in (1, 2, 4, 8, 16) if len(two) // k >= 10})
    table = floor_table(two, make_reference(one, "half", "half", "own"), counts)
    table.pop("inception_score", None)
    return table


def file_list(place: Path) -> list[list[object]]:
    """Name, size and time of change of every file, which stand for what is in them."""
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return [
        ["" if path == place else path.relative_to(place).as_posix(), path.stat().st_size, path.stat().st_mtime_ns]
        for path in files
    ]
