"""`sample_to_files`: images of a model in PNG files that say inside how they were made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import images as pictures
from ..distributed.ranks import Ranks
from ..errors import BadInput, NonFinite, check_int
from ..files import check_writable, is_writing_process, locked, refuse_inside, write_file
from ..model.model import Label, Model
from ..pick import pick
from ..plan.config import SamplingConfig
from ..progress import ignore_messages
from ..sampling import Progress
from ..storage.provenance import versions
from ..train.start_images import read_images
from ..utils.config import Config
from .distribute import idle_processes, sample_many, saved_batches, sharing

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..plan.config import SamplingOptions

__all__ = ["SampleRequest", "sample_to_files"]


@dataclass(frozen=True)
class SampleRequest(Config):
    """Which images to sample, and how to write them.

    Args:
        n: number of images, at least 1.
        label: of the images, see `Model.labels`; of a model that takes prompts, a prompt or a list of them.
        seed: of image 0; image k uses `seed + k`.
        batch_size: images in the network at once.
        images: a folder, zip, array or image file, or a tensor (n, C, H, W), that an initialisation begins from.
        mask: for inpainting: an image, or as many as are sampled, whose white pixels are filled in.
        separate_files: write one PNG file an image, named by its seed, rather than a grid.
        columns: images in a row of the grid; None: one of each class where all classes take turns, else a square.
    """

    n: int = 16
    label: Label = None
    seed: int = 0
    batch_size: int = 64
    images: Any = None
    mask: str | Path | None = None
    separate_files: bool = False
    columns: int | None = None

    def __post_init__(self) -> None:
        check_int("n", self.n, 1)
        check_int("batch_size", self.batch_size, 1)


def sample_to_files(
    model: Model,
    out: str | Path,
    request: SampleRequest | None = None,
    config: SamplingConfig | None = None,
    *,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
    warn: Callable[[str], None] = ignore_messages,
    command: Callable[[dict[str, Any]], str] | None = None,
    **options: Unpack[SamplingOptions],
) -> dict[str, Any]:
    """Sample images into a PNG grid, or into one file each, that say inside how they were made.

    The same arguments give the same bytes. A run on several processes that is stopped is resumed by the same call.

    Args:
        out: the PNG file, or with `separate_files` the folder.
        request: which images; None: 16 of all classes in turn.
        config: how to sample; None: as the model recommends. options: fields of it.
        ranks: the processes of the run, `Ranks.start()`; None: this one alone.
        progress: called with (done, in all). warn: called with a line for what the user should know.
        command: gives, for the settings, the command line that the files hold; None: a Python call.

    Returns:
        A dict: files, model, sha256, the sampling settings, n, seeds, labels, seconds, images_per_second. Empty in
        other processes than the main one.

    Raises:
        BadInput: before anything is sampled, for what cannot be.
    """
    request = SampleRequest() if request is None else request
    ranks = Ranks(model.device) if ranks is None else ranks
    config = SamplingConfig.of(config, options)
    lock = request.separate_files and is_writing_process()
    with locked(out) if lock else contextlib.nullcontext():
        return _sample_to_files(
            model, Path(out), request, config, ranks, progress, warn, command or (lambda settings: "")
        )


def _sample_to_files(
    model: Model,
    out: Path,
    request: SampleRequest,
    config: SamplingConfig,
    ranks: Ranks,
    progress: Progress | None,
    warn: Callable[[str], None],
    command: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    n, seed, batch_size = request.n, request.seed, request.batch_size
    check_output(out, request.separate_files, request.images)
    if model.codec == "raw":
        raise BadInput(
            f"{model.name} makes samples of shape {model.shape}, which are no images: "
            "draw them in Python, hasten.load(folder).sample(n)"
        )
    labels = model.labels(n, request.label)
    precision = ranks.on_main_process(lambda: model.precision_for(config.precision or "fp32", min(n, batch_size)))
    resolved = model.resolve(config, precision=precision)
    shared = sharing(config.accelerators, ranks) is not None
    if ranks.world == 1 and sharing(config.accelerators, replace(ranks, world=2)) is not None:
        warn("what shares an image among processes does nothing in one: start several with torchrun")
    if not shared and (line := idle_processes(ranks, n, batch_size)):
        warn(line)
    source = starting_images(model, request, config)
    folder = (
        out if request.separate_files else out.parent
    ) / f".{'images' if request.separate_files else out.name}.kept"
    fields = {"n": n, "label": request.label, "seed": seed, "batch_size": batch_size, "images": source}
    saved = saved_batches(folder, ranks, model, resolved, fields)
    began = time.perf_counter()
    try:
        x = sample_many(
            model, n, request.label, seed, batch_size, ranks=ranks, config=resolved, keep=saved, progress=progress,
            images=source,
        )  # fmt: skip
    except NonFinite as e:
        if request.separate_files or e.images is None or e.images.ndim != 4 or not ranks.is_main_process:
            raise
        crossed = pictures.make_image_grid(pictures.mark_non_finite(e.images), request.columns)
        write_file(out, pictures.encode_png(crossed, {"failed": str(e)}))
        raise NonFinite(f"{e} ({out} has a cross in their place)") from e
    seconds = time.perf_counter() - began
    files: list[Path] = []
    if x is not None:
        text = {
            "command": command(resolved.settings()),
            "model": f"{model.name} {model.sha256}",
            "versions": versions(),
        }
        text |= {"processes": str(ranks.world)} if shared else {}  # which may differ in the last digits, or by more
        files = write_images(x, out, model, request, None if labels is None else labels.tolist(), text)
    ranks.barrier()
    if saved is not None:
        saved.clear()
    if x is None:  # the main process has them all
        return {}
    return {
        "files": [str(f) for f in files],
        "model": model.name,
        "sha256": model.sha256,
        **resolved.settings(),
        "n": n,
        "seeds": [seed, seed + n - 1],
        "labels": None if labels is None else labels.tolist(),
        "seconds": seconds,
        "images_per_second": n / seconds,
        **({"processes": ranks.world} if ranks.world > 1 else {}),
    }


def check_output(out: Path, separate_files: bool, images: Any = None) -> None:
    """Refuse, before any work, an output that could not be written, or that lies in what is read."""
    if out.suffix.lower() != ".png" and not separate_files:
        raise BadInput(
            f"the grid is a PNG file: --out must end in .png, got {str(out)!r} (or --separate-files and a folder)"
        )
    if isinstance(images, (str, Path)):
        refuse_inside(out, images, "--out")
    check_writable(out / "0.png" if separate_files else out)


def starting_images(model: Model, request: SampleRequest, config: SamplingConfig) -> Tensor | None:
    """The images (n, C, h, w) that an initialisation begins from; what is to be filled in is NaN."""
    if request.mask is not None and request.images is None:
        raise BadInput("a mask belongs to --images, of which it says what to fill in")
    if not isinstance(request.images, (str, Path)):
        return request.images  # type: ignore[no-any-return]
    start = config.start
    start = pick("starts", start) if isinstance(start, str) else start
    unknown = getattr(start, "task", None) == "inpainting"
    if request.mask is not None and not unknown:
        raise BadInput("a mask is for inpainting: --start ccdf:task=inpainting,time=0.5")
    mask = None if request.mask is None else Path(request.mask)
    return read_images(Path(request.images), request.n, model.shape[0], unknown, mask)


def write_images(
    x: Tensor, out: Path, model: Model, request: SampleRequest, labels: Sequence[int] | None, text: dict[str, str]
) -> list[Path]:
    """Write images (n, C, H, W) as a grid or one by one, and return the files.

    text: what all files say inside; nothing of when and where, so that the same arguments give the same bytes.
    """
    n, seed, columns = request.n, request.seed, request.columns

    def metadata(first: int, last: int) -> dict[str, str]:
        seeds = f"{seed + first}" if first == last else f"{seed + first}-{seed + last}"
        own = [] if labels is None else labels[first : last + 1]
        return {**text, "seeds": seeds, "labels": ",".join(map(str, own))}

    if request.separate_files:
        contents = ((seed + k, pictures.encode_png(pictures.to_pil(x[k]), metadata(k, k))) for k in range(n))
        return [write_file(out / f"{number:06d}.png", data) for number, data in contents]
    if columns is None and request.label is None and model.classes is not None and n > len(model.classes):
        columns = len(model.classes)
    return [write_file(out, pictures.encode_png(pictures.make_image_grid(x, columns), metadata(0, n - 1)))]
