"""Monitoring of a training run: log entries, the progress bar, TensorBoard event files, and signals that stop it."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import HastenError
from ..predictions import precise
from ..utils.devices import has_float64
from ..utils.environment import is_terminal

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Meter:
    """Mean losses and gradient norms since the last log entry, on the device so that no step synchronises with it.

    Args:
        names: of the trained modules.
        step: the first step.
        device: of the losses.
    """

    def __init__(self, names: Iterable[str], step: int, device: torch.device) -> None:
        dtype = torch.float64 if has_float64(device) else torch.float32
        self.sums = {name: torch.zeros(2, dtype=dtype, device=device) for name in names}
        self.counts = dict.fromkeys(self.sums, 0)
        self.nonfinite_step = {name: torch.full((), -1, device=device) for name in self.sums}
        self.latest = torch.zeros(())
        self.since, self.logged = time.monotonic(), step

    @property
    def last(self) -> float:
        """The latest loss."""
        return float(self.latest)

    def add(self, step: int, name: str, loss: Tensor, norm: Tensor) -> None:
        """Add the loss and gradient norm of one step of the trained module `name`."""
        self.latest = loss
        pair = torch.stack([precise(loss), precise(norm)])
        self.sums[name] += pair
        self.counts[name] += 1
        first = self.nonfinite_step[name]
        self.nonfinite_step[name] = torch.where((first < 0) & ~pair.isfinite().all(), step, first)

    def raise_if_not_finite(self, checkpoint: Path) -> None:
        """Raise HastenError if a loss or a gradient was not finite since the start."""
        for name, step in self.nonfinite_step.items():
            if int(step) >= 0:
                saved = f"{checkpoint} was saved before" if checkpoint.exists() else "no checkpoint was written yet"
                raise HastenError(
                    f"{name}: the loss or its gradient is not finite at step {int(step)}; {saved}. Try a lower lr, "
                    "a longer warmup, or fp32"
                )

    def line(self, step: int, seconds: float, lr_factor: float) -> dict[str, Any]:
        """The next log entry; the means start anew after it."""
        now, steps = time.monotonic(), step - self.logged
        line: dict[str, Any] = {"step": step, "seconds": round(seconds, 1)}
        line["steps_per_second"] = round(steps / max(now - self.since, 1e-9), 3)
        for name, sums in self.sums.items():
            if self.counts[name]:
                loss, norm = (sums / self.counts[name]).tolist()
                line |= {name: loss, f"{name}_gradient": norm}
            self.counts[name] = 0
            sums.zero_()
        self.since, self.logged = now, step
        return line | {"lr_factor": lr_factor}


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list to which SIGINT and SIGTERM are appended; a second signal raises KeyboardInterrupt.

    Outside the main thread no signals are handled.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt("stopped at once; the last checkpoint is kept")
        received.append(number)

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextlib.contextmanager
def progress_bar(show: bool, title: str) -> Iterator[Callable[[float, int, float], None]]:
    """Yield `(progress, step, loss) -> None`, which updates a progress bar on stderr if that is a terminal."""
    if not show or not is_terminal(sys.stderr):
        yield lambda done, step, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    fields = ("step {task.fields[step]}", "{task.fields[rate]:.2f}/s", "loss {task.fields[loss]:.4f}")
    columns = (BarColumn(), *(TextColumn(field) for field in fields), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}", markup=False), *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=1.0, step=0, rate=0.0, loss=math.nan)
        recent: deque[tuple[float, int]] = deque(maxlen=100)

        def update(done: float, step: int, loss: float) -> None:
            recent.append((time.monotonic(), step))
            (then, first), (now, last) = recent[0], recent[-1]
            bar.update(task, completed=done, step=step, loss=loss, rate=(last - first) / max(now - then, 1e-9))

        yield update


@contextlib.contextmanager
def event_files(out: Path, step: int, enabled: bool) -> Iterator[SummaryWriter | None]:
    """Yield a TensorBoard writer in `out/tensorboard`; None if not `enabled` or not installed.

    Events of an earlier run after `step` are marked as superseded.
    """
    try:
        if not enabled:
            raise ImportError
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield None
        return
    with SummaryWriter(str(out / "tensorboard"), purge_step=step) as writer:
        yield writer
