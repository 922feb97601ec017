"""Progress bars on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from .errors import BadInput
from .utils.environment import is_terminal


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr while that is a terminal.

    Args:
        what: the description.

    Yields:
        a function to call with (done, total), or None without a terminal.
    """
    if not is_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def ignore_messages(line: str) -> None:
    """Discard a line of text."""


INTERVAL = 30.0  # seconds between lines of progress


class ProgressReporter:
    """A bar with the remaining time on stderr, counted in images through the network.

    Where stderr is not a terminal, a line every `INTERVAL` seconds.

    Args:
        total: images through the network.
        show: whether to print anything.
    """

    def __init__(self, total: float, show: bool = True) -> None:
        from rich import progress
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False, quiet=not show)
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not (show and self.console.is_terminal),
            speed_estimate_period=60,
        )
        self.task = self.bar.add_task("", total=total)
        self.prints_lines = show and not self.console.is_terminal
        self.total, self.done, self.what = total, 0.0, ""
        self.started = self.last = time.monotonic()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, markup=False, soft_wrap=True)

    def describe(self, what: str) -> None:
        """Set the description of the current work."""
        self.what = what
        self.bar.update(self.task, description=what)

    def expect(self, left: float) -> None:
        """Set the number of images that are left."""
        self.total = self.done + left
        self.bar.update(self.task, total=self.total)

    def advance(self, count: float) -> None:
        """Advance by this number of images."""
        self.done += count
        self.bar.advance(self.task, count)
        now = time.monotonic()
        if self.prints_lines and now - self.last >= INTERVAL and self.total:
            self.last = now
            fraction = min(self.done / self.total, 1.0)
            left = (now - self.started) * (1 - fraction) / max(fraction, 1e-9)
            self.say(f"{self.what}: {fraction:.0%} of the network evaluations, about {left:.0f} s left")


ProgressFn = Callable[[str, int, int, float], None]


def no_progress(what: str, done: int, total: int, value: float) -> None:
    """Ignore the progress of a run."""


@contextlib.contextmanager
def steps_progress(show: bool, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with the remaining time on stderr, while that is a terminal.

    Args:
        show: whether to print anything.
        what: the description.
        total: number of steps.

    Yields:
        a function to call with the number of steps done.
    """
    if not show or not is_terminal(sys.stderr):
        yield lambda done: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def fraction_of(
    progress: Callable[[int, int], None] | None, start: int, n: int, batch_size: int
) -> Callable[[int, int], None] | None:
    """`progress` for the batch that begins at image `start`, as a fraction of all `n` images.

    Args:
        progress: called as `progress(done, total)`, or None.
        start, n, batch_size: of the images.

    Raises:
        BadInput: for a `progress` that cannot be called.
    """
    if progress is None:
        return None
    if not callable(progress):
        raise BadInput(f"progress must be a function or None, found {progress!r}")
    before, batches = start // batch_size, -(-n // batch_size)
    return lambda done, total: progress(before * total + done, batches * total)
