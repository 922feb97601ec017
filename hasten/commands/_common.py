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

    from ..model import Model
    from ..ranks import Ranks


def open_model(name: str, device: str) -> Model:
    """`load`, on the device that was asked for."""
    from ..finite import check_weights
    from ..machine import device_for
    from ..model import load

    loaded = load(name, device_for(device))
    check_weights(loaded.denoiser, name)
    return loaded


def processes(device: str) -> Ranks:
    """This process alone on the device that was asked for, or among those that torchrun started."""
    from ..machine import device_for
    from ..ranks import Ranks, launched

    if launched() > 1:
        return Ranks.start(None if device == "auto" else device)
    return Ranks(device_for(device))


def open_shared(name: str, ranks: Ranks, sound: bool = True) -> Model:
    """`load` on every process's own device; what must be fetched, one process of a machine fetches.

    sound: refuse weights that are not finite (else a warning has named one).
    """
    from ..finite import check_weights
    from ..model import load

    with ranks.leading():
        loaded = load(name, ranks.device)
    if sound:
        check_weights(loaded.denoiser, name)
    return loaded


def hint(ranks: Ranks, n: int, batch_size: int) -> None:
    """Say so where some processes will have nothing to do."""
    batches = -(-n // batch_size)
    if ranks.first and batches < ranks.world:
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
    from ..machine import notebook

    return notebook().parent / folder


def given_images(path: Path, n: int, channels: int) -> Tensor:
    """The first `n` images of a folder, a zip, an array or a single image file, (n, C, h, w) in [-1, 1]."""
    from ..train import open_data
    from ..train.data import to_float
    from ..train.folders import SUFFIXES

    if path.name.lower().endswith(SUFFIXES):
        import numpy as np
        import torch
        from PIL import Image

        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        except OSError as e:
            raise BadInput(f"cannot read {path}: {e.strerror or e}") from e
        one = torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
        return to_float(one[None]).expand(n, -1, -1, -1)
    data = open_data(path, split=None, channels=channels)
    if len(data) < n:
        raise BadInput(f"{path} holds {len(data)} images, asked for {n} (--n {len(data)} takes all)")
    return to_float(data.images(range(n)))
