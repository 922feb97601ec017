"""What several verbs need."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from ..distributed.ranks import Ranks
    from ..model.model import Model


def open_model(name: str, device: str) -> Model:
    """`load`, on the device that was asked for."""
    from ..loading import load
    from ..performance.device import device_for
    from ..utils.finite import check_weights

    loaded = load(name, device_for(device))
    check_weights(loaded.denoiser, name)
    return loaded


def processes(device: str) -> Ranks:
    """This process alone on the device that was asked for, or among those that torchrun started."""
    from ..distributed.ranks import Ranks, launched
    from ..performance.device import device_for

    if launched() > 1:
        return Ranks.start(None if device == "auto" else device)
    return Ranks(device_for(device))


def open_shared(name: str, ranks: Ranks, sound: bool = True) -> Model:
    """`load` on every process's own device; what must be fetched, one process of a machine fetches.

    sound: refuse weights that are not finite (else a warning has named one).
    """
    from ..loading import load
    from ..utils.finite import check_weights

    with ranks.main_process_first():
        loaded = load(name, ranks.device)
    if sound:
        check_weights(loaded.denoiser, name)
    return loaded


def hint(ranks: Ranks, n: int, batch_size: int) -> None:
    """Say so where some processes will have nothing to do."""
    batches = -(-n // batch_size)
    if ranks.is_main_process and batches < ranks.world:
        each = max(n // ranks.world, 1)
        warn(
            f"{n} images are {batches} batch{'es' if batches > 1 else ''} of {batch_size}, for {ranks.world} "
            f"processes: --batch-size {each} would give work to all"
        )


@contextlib.contextmanager
def ends_as_stopped() -> Iterator[None]:
    """SIGTERM within the block ends it as Ctrl-C does, so that what is finished is kept and reported."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the report is written undisturbed
        raise KeyboardInterrupt("told to stop (SIGTERM)")

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def warn(line: str) -> None:
    """A line on stderr beside the work."""
    print(f"hasten: {line}", file=sys.stderr)


def cached(folder: str) -> Path:
    """A folder of hasten's own, in the user's cache."""
    from ..utils.environment import cache_folder

    return cache_folder() / folder


def given_images(path: Path, n: int, channels: int, start: str | None = None, mask: Path | None = None) -> Tensor:
    """The first `n` images of a folder, a zip, an array or a single image file, (n, C, h, w) in [-1, 1].

    start: for inpainting, what is unknown becomes NaN: where the images are transparent, or `mask` is white.
    """
    from ..pick import pick
    from ..train.start_images import read_images

    unknown = start is not None and getattr(pick("starts", start), "task", None) == "inpainting"
    if mask is not None and not unknown:
        raise BadInput("a mask is for inpainting: --start ccdf:task=inpainting,time=0.5")
    return read_images(path, n, channels, unknown, mask)


def label_list(model: Model, label: str | None) -> str | list[str] | None:
    """What `Model.labels` takes, of a label as it is typed: names or indices separated by commas; a prompt as it is."""
    from ..train.names import split_labels

    if label is None or model.conditioning is not None:
        return label
    return split_labels(str(label), model.classes)
