"""Translate the images of a folder by a bridge, or by a network that reads a source image."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .. import images as pictures
from ..errors import BadInput, check_int
from ..files import check_writable, locked, refuse_inside, write_file
from ..plan.config import SamplingConfig
from ..progress import fraction_of, ignore_messages
from ..sampling import Progress
from ..storage.provenance import versions
from ..train.data import open_data, to_float
from ..train.sources import Data, MixedSizes

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..model.model import Model
    from ..plan.config import SamplingOptions

__all__ = ["TranslateRequest", "translate_images"]

GRID = 64  # images of a grid at most, by default
CHUNK = 256  # images in memory at once


@dataclass(frozen=True)
class TranslateRequest:
    """Which images are translated.

    Args:
        n: the first n; None: all into a folder, 64 at most into a grid.
        label: class of the results, see `Model.labels`.
        seed: of the noise of the first image; image k has `seed + k`.
        batch_size: images in the network at once.

    Raises:
        BadInput: for numbers out of range.
    """

    n: int | None = None
    label: Any = None
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.n is not None:
            check_int("n", self.n, 1)
        check_int("batch_size", self.batch_size, 1)


def translate_images(
    model: Model,
    images: str | Path | Data,
    out: str | Path,
    request: TranslateRequest | None = None,
    config: SamplingConfig | None = None,
    *,
    progress: Progress | None = None,
    warn: Callable[[str], None] = ignore_messages,
    command: str = "",
    **options: Unpack[SamplingOptions],
) -> dict[str, Any]:
    """Translate images, each into a file of the same name, or all into a grid below their sources.

    Args:
        model: with a `source_shape`.
        images: the sources; those of another size than the model's are cropped and resized, which `warn` says.
        out: a folder, or a PNG file for a grid of pairs.
        request: which of them; None: all.
        config: how to sample; None: as the model recommends. options: fields of it.
        progress: called with (done, in all).
        warn: called with a line for what the user should know.
        command: the command line that the files hold.

    Returns:
        A dict: files, model, sha256, the sampling settings, n, seconds, images_per_second.

    Raises:
        BadInput: for a model without sources, and for images that cannot be read; nothing is written then.
    """
    request, out = TranslateRequest() if request is None else request, Path(out)
    shape = model.source_shape
    if shape is None:
        raise BadInput(f"{model.name} makes samples from noise, not from images: see hasten sample and hasten restyle")
    if model.source_factor > 1:
        raise BadInput(f"{model.name} makes images {model.source_factor} times larger: see hasten upscale")
    if model.codec == "raw":
        raise BadInput(f"{model.name} makes samples of shape {model.shape}, which are no images: use it in Python")
    grid = out.suffix.lower() == ".png"
    if not isinstance(images, Data):
        refuse_inside(out, images, "--out")
    check_writable(out if grid else out / "0.png")
    data = images if isinstance(images, Data) else open_sources(images, shape, warn)
    n = min(len(data), GRID if grid else len(data)) if request.n is None else request.n
    if n > len(data):
        raise BadInput(f"{data.source or 'the data'} holds {len(data)} images, asked for {n}")
    if grid and n < len(data) and request.n is None:
        warn(f"the grid shows the first {n} of {len(data)} images: give a folder as --out for all")
    resolved = model.resolve(config, batch_size=min(n, request.batch_size), **options)
    text = {"command": command, "model": f"{model.name} {model.sha256}", "versions": versions()}
    files: list[Path] = []
    rows = []
    began = time.perf_counter()
    with locked(out.parent if grid else out):
        for first in range(0, n, CHUNK):
            count = min(CHUNK, n - first)
            source = to_float(data.images(list(range(first, first + count))))
            x = model.sample(
                count,
                request.label,
                request.seed + first,
                resolved,
                batch_size=request.batch_size,
                images=source,
                progress=fraction_of(progress, first, n, CHUNK),
            )
            if grid:
                rows.append((source, x))
                continue
            for k, image in enumerate(x):
                name = output_name(data, first + k)
                files.append(write_file(out / name, pictures.encode_png(pictures.to_pil(image), text)))
        if grid:
            import torch

            sources, results = (torch.cat(each) for each in zip(*rows, strict=True))
            sheet = pictures.make_image_grid(pictures.interleave_rows(sources, results, 8), min(n, 8))
            files.append(write_file(out, pictures.encode_png(sheet, text)))
    seconds = time.perf_counter() - began
    return {
        "files": [str(file) for file in files],
        "model": model.name,
        "sha256": model.sha256,
        **resolved.settings(),
        "n": n,
        "seed": request.seed,
        "seconds": seconds,
        "images_per_second": n / seconds,
    }


def open_sources(path: str | Path, shape: tuple[int, ...], warn: Callable[[str], None]) -> Data:
    """The images of a path in the size (C, H, W) of the sources, resized where they have another."""
    common: dict[str, Any] = {"split": None, "channels": shape[0], "label": "none", "caption": "none"}
    try:
        data = open_data(path, **common)
    except MixedSizes:
        data = open_data(path, size=(shape[1], shape[2]), **common)
        warn(f"{path}: the images are cropped and resized to {shape[2]}x{shape[1]}")
    if tuple(data.shape[1:]) != tuple(shape[1:]):
        warn(f"{path}: the images are resized from {data.shape[2]}x{data.shape[1]} to {shape[2]}x{shape[1]}")
        data = open_data(path, size=(shape[1], shape[2]), report=False, **common)
    return data


def output_name(data: Data, k: int) -> str:
    """The file of result k: that of its source, as PNG; for arrays its number."""
    if data.files is None or not data.files[k]:
        return f"{k:06d}.png" if data.files is None else "translated.png"
    path = PurePosixPath(data.files[k])
    same = sum(PurePosixPath(name).with_suffix("") == path.with_suffix("") for name in data.files) > 1
    return f"{path}.png" if same else str(path.with_suffix(".png"))
