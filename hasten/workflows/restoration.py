"""Pairs of degraded and true test images, and what restored ones are measured by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput, check_int
from ..model.model import Model
from ..pick import pick
from ..progress import ignore_messages
from ..train.any_size import AnySize, open_any_size
from ..train.data import to_float
from ..train.sources import NoSplits
from ..utils.resizing import enlarge

__all__ = ["PairGroup", "RestorationPairs", "open_pairs", "restores"]

MOST = 1000  # pairs that are measured by default


@dataclass(frozen=True)
class PairGroup:
    """Pairs of one size.

    Args:
        sources: the degraded images, uint8 (n, C, h, w).
        truths: the true ones, uint8 (n, C, H, W).
        origins: the image that each pair is cut from, by number.
    """

    sources: Tensor
    truths: Tensor
    origins: tuple[int, ...]


@dataclass(frozen=True)
class RestorationPairs:
    """Degraded and true images of the test split of some data.

    Args:
        groups: the pairs, by size.
        factor: how many times larger the true images are.
        degrade: what made the degraded ones, as `hasten train --degrade` takes it.
        source: the path of the data.
        description: of the pairs, in words.
    """

    groups: tuple[PairGroup, ...]
    factor: int
    degrade: str
    source: str = ""
    description: str = ""

    def __len__(self) -> int:
        """The number of pairs."""
        return sum(len(group.origins) for group in self.groups)

    @property
    def origins(self) -> list[int]:
        """The image that each pair is cut from, by number, in the order of the groups."""
        return [origin for group in self.groups for origin in group.origins]

    def enlarged(self) -> list[Tensor]:
        """The degraded images at the size of the true ones, by bicubic interpolation: (n, C, H, W) by group."""
        return [enlarge(to_float(group.sources), self.factor).clamp(-1, 1) for group in self.groups]

    def sources_of(self, rows: Sequence[int]) -> Tensor:
        """Degraded images in [-1, 1] of pairs of one size, (len(rows), C, h, w); numbers beyond the last begin again.

        Raises:
            BadInput: for pairs of several sizes.
        """
        if len(self.groups) != 1:
            raise BadInput(f"{self.source}: the pairs have {len(self.groups)} sizes: cut them to one")
        index = [row % len(self) for row in rows]
        return to_float(self.groups[0].sources[index])


def restores(model: Model) -> bool:
    """Whether a model makes its samples from degraded images."""
    return model.source_shape is not None


def open_pairs(
    model: Model,
    data: str | Path,
    split: str = "test",
    size: int | None = None,
    whole: bool = False,
    n: int | None = None,
    degrade: str | None = None,
    report: Callable[[str], None] = ignore_messages,
) -> RestorationPairs:
    """Make pairs of the test images of some data for a model that restores images, such as one of super-resolution.

    Each image is cut into squares that do not overlap, as many as there is room for, about its centre. The first pairs
    are the first squares of all images, then come the second ones, so that a few are of many images.

    Args:
        model: with a `source_shape`.
        data: images of any sizes, as `hasten train` takes them.
        split: of the data; where the data has no splits, all of it, which `report` says.
        size: side of the squares. Default: the sides of the model's own images.
        whole: take whole images in place of squares, cut to sides that the network takes.
        n: at most so many pairs. Default: all, 1,000 at most.
        degrade: what makes the degraded images. Default: what the model was trained with.
        report: receives a line for what the user should know.

    Raises:
        BadInput: for a model without sources, for data that cannot be read, and for sizes that the model does not take.
    """
    if model.source_shape is None:
        raise BadInput(f"{model.name} makes its images from noise alone: it restores nothing")
    if model.decoder is not None or model.codec not in ("image", "residual"):
        raise BadInput(f"{model.name} makes samples that are no images: pairs are of images")
    if n is not None:
        check_int("n", n, 1)
    factor, text = model.source_factor, degradation_of(model, degrade)
    method = pick("degradations", text)
    sides = cut_sides(model, size, whole)
    images = test_images(data, split, model.shape[0], report)
    cuts = cuts_of(images, sides, multiple_of(model), MOST if n is None else n, n is None, report)
    rows: dict[tuple[int, int], list[int]] = {}
    for number, (_, _, _, height, width) in enumerate(cuts):
        rows.setdefault((height, width), []).append(number)
    groups = []
    for (height, width), numbers in rows.items():
        truths = torch.stack([cut_out(images, cuts[number]) for number in numbers])
        sources = method(truths, numbers)
        wanted = (len(truths), model.source_shape[0], height // factor, width // factor)
        if tuple(sources.shape) != wanted:
            found, reads = (f"{each[-1]}x{each[-2]} with {each[1]} channels" for each in (tuple(sources.shape), wanted))
            raise BadInput(f"{text} makes images of {found} from {width}x{height}, and {model.name} reads {reads}")
        groups.append(PairGroup(sources, truths, tuple(cuts[number][0] for number in numbers)))
    kind = f"{sides[1]}x{sides[0]} squares" if sides is not None and sides[0] == sides[1] else "crops"
    kind = kind if sides is not None else "whole images"
    count = len({cut[0] for cut in cuts})
    description = f"{len(cuts)} {kind} of {count} images" if sides is not None else f"{len(cuts)} {kind}"
    return RestorationPairs(tuple(groups), factor, text, str(data), description)


def degradation_of(model: Model, degrade: str | None) -> str:
    """What makes degraded images for a model. Raises BadInput where it is not known."""
    known = degrade or model.card.get("degrade")
    if known:
        return str(known)
    if model.source_factor > 1:
        return f"low_resolution:factor={model.source_factor}"
    raise BadInput(f"{model.name} does not say what its sources are: give --degrade, such as downscale:factor=4")


def multiple_of(model: Model) -> int:
    """What the sides of the true images must be multiples of."""
    net: Any = model.denoiser.net
    return max(int(getattr(net, "multiple", 1) or 1), model.source_factor)


def cut_sides(model: Model, size: int | None, whole: bool) -> tuple[int, int] | None:
    """(H, W) of the crops; None for whole images. Raises BadInput for sizes that the model does not take."""
    own = (int(model.shape[1]), int(model.shape[2]))
    if whole and size is not None:
        raise BadInput("give size or whole, not both")
    if (whole or size not in (None, own[0])) and model.source_factor == 1:
        raise BadInput(f"{model.name} takes images of {own[1]}x{own[0]} only")
    if whole:
        return None
    if size is None:
        return own
    check_int("size", size, 1)
    if size % (step := multiple_of(model)):
        near = max(round(size / step), 1) * step
        raise BadInput(f"size must be a multiple of {step} for {model.name}, such as {near}, got {size}")
    return size, size


def test_images(data: str | Path, split: str, channels: int, report: Callable[[str], None]) -> AnySize:
    """The images of a split; all of them where there are no splits."""
    if Path(data).suffix.lower() == ".npy":  # one array
        return open_any_size(data, None, channels)
    try:
        return open_any_size(data, split, channels)
    except NoSplits:
        images = open_any_size(data, None, channels)
    report(f"{data} has no split {split!r}: all its {len(images)} images are used")
    return images


Cut = tuple[int, int, int, int, int]  # image, top, left, height, width


def cuts_of(
    images: AnySize, sides: tuple[int, int] | None, step: int, most: int, default: bool, report: Callable[[str], None]
) -> list[Cut]:
    """Where pairs are cut from, the first of every image before the second ones.

    Raises:
        BadInput: where no image is large enough.
    """
    layers: dict[int, list[Cut]] = {}
    small = 0
    for k, (full_height, full_width) in enumerate(images.sizes):
        height, width = sides or (full_height // step * step, full_width // step * step)
        rows, columns = (full_height // height, full_width // width) if min(height, width) else (0, 0)
        small += not rows * columns
        top, left = (full_height - rows * height) // 2, (full_width - columns * width) // 2
        for number in range(rows * columns):
            cut = (k, top + number // columns * height, left + number % columns * width, height, width)
            layers.setdefault(number, []).append(cut)
    cuts = [cut for number in sorted(layers) for cut in layers[number]]
    if not cuts:
        most_side = max(min(size) for size in images.sizes)
        need = f"crops of {sides[1]}x{sides[0]}" if sides else f"sides of {step} pixels"
        raise BadInput(f"{images.source}: no image has {need}: the largest has {most_side} pixels at its shorter side")
    if small:
        report(f"{images.source}: {small} images are too small, and left out")
    if default and len(cuts) > most:
        report(f"the first {most} of {len(cuts)} pairs are measured: --n sets another number")
    return cuts[:most]


def cut_out(images: AnySize, cut: Cut) -> Tensor:
    """One crop, uint8 (C, H, W)."""
    k, top, left, height, width = cut
    return images.read(k)[:, top : top + height, left : left + width]
