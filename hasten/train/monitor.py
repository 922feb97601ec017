"""What a person sees of a training run, and how they stop it: log lines, a bar, event files, signals."""

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
from typing import Any

import torch
from torch import Tensor

from ..errors import HastenError
from ..utils.environment import is_terminal


class Meter:
    """Losses and gradient norms between two log lines, kept on the device so that no step waits for it."""

    def __init__(self, names: Iterable[str], step: int, device: torch.device) -> None:
        self.sums = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in names}
        self.counts = dict.fromkeys(self.sums, 0)
        self.bad = {name: torch.full((), -1, device=device) for name in self.sums}
        self.latest = torch.zeros(())
        self.since, self.logged = time.monotonic(), step

    @property
    def last(self) -> float:
        """The latest loss."""
        return float(self.latest)

    def add(self, step: int, name: str, loss: Tensor, norm: Tensor) -> None:
        """Take in one step of one player."""
        self.latest = loss
        pair = torch.stack([loss.double(), norm.double()])
        self.sums[name] += pair
        self.counts[name] += 1
        self.bad[name] = torch.where((self.bad[name] < 0) & ~pair.isfinite().all(), step, self.bad[name])

    def refuse(self, checkpoint: Path) -> None:
        """Raise where a loss or a gradient was not finite."""
        for name, step in self.bad.items():
            if int(step) >= 0:
                kept = (
                    f"{checkpoint}, written before, is kept" if checkpoint.exists() else "no checkpoint was written yet"
                )
                raise HastenError(
                    f"{name}: the loss or its gradient is not finite at step {int(step)}; {kept}. Try a lower lr, "
                    "a longer warmup, or fp32"
                )

    def line(self, step: int, seconds: float, lr_factor: float) -> dict[str, Any]:
        """The next line of the log, and a new start for the means."""
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
    """A list that SIGINT and SIGTERM add to. A second one interrupts at once. Only the main thread may listen."""
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def on_signal(number: int, frame: object) -> None:
        if told:
            raise KeyboardInterrupt("stopped at once; the last checkpoint is kept")
        told.append(number)

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextlib.contextmanager
def progress_bar(show: bool, title: str) -> Iterator[Callable[[float, int, float], None]]:
    """A bar on stderr with steps a second, time to go and loss; nothing where stderr is no terminal."""
    if not show or not is_terminal(sys.stderr):
        yield lambda done, step, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    fields = ("step {task.fields[step]}", "{task.fields[rate]:.2f}/s", "loss {task.fields[loss]:.4f}")
    columns = (BarColumn(), *(TextColumn(field) for field in fields), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}", markup=False), *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=1.0, step=0, rate=0.0, loss=math.nan)
        seen: deque[tuple[float, int]] = deque(maxlen=100)

        def update(done: float, step: int, loss: float) -> None:
            seen.append((time.monotonic(), step))
            (then, first), (now, last) = seen[0], seen[-1]
            bar.update(task, completed=done, step=step, loss=loss, rate=(last - first) / max(now - then, 1e-9))

        yield update


@contextlib.contextmanager
def event_files(out: Path, step: int, wanted: bool) -> Iterator[Any]:
    """TensorBoard's writer, or None. What it wrote after `step` is marked as superseded."""
    try:
        if not wanted:
            raise ImportError
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield None
        return
    with SummaryWriter(str(out / "tensorboard"), purge_step=step) as writer:
        yield writer
