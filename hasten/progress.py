"""Progress of long work on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import BadInput
from .utils.environment import is_terminal


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr while that is a terminal; yields what to call with (done, of how many), or None."""
    if not is_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def ignore_messages(line: str) -> None:
    """For functions that are called with a line of text now and then."""


EVERY = 30.0  # seconds between lines of progress


class ProgressReporter:
    """A bar with the time left on stderr, counted in images through the network; where stderr is no terminal, a line
    every `EVERY` seconds."""

    def __init__(self, total: float, show: bool = True) -> None:
        from rich import progress
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False, quiet=not show)
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False), progress.BarColumn(),
            progress.TaskProgressColumn(), progress.TextColumn("left"), progress.TimeRemainingColumn(),
            console=self.console, transient=True, disable=not (show and self.console.is_terminal),
            speed_estimate_period=60,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=total)
        self.lines = show and not self.console.is_terminal
        self.total, self.done, self.what = total, 0.0, ""
        self.began = self.last = time.monotonic()

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.console.print(line, markup=False, soft_wrap=True)

    def describe(self, what: str) -> None:
        """What is being done from here on."""
        self.what = what
        self.bar.update(self.task, description=what)

    def advance(self, count: float) -> None:
        """So many more images have been through the network."""
        self.done += count
        self.bar.advance(self.task, count)
        now = time.monotonic()
        if self.lines and now - self.last >= EVERY and self.total:
            self.last = now
            share = min(self.done / self.total, 1.0)
            left = (now - self.began) * (1 - share) / max(share, 1e-9)
            self.say(f"{self.what}: {share:.0%} of the network evaluations, about {left:.0f} s left")


ProgressFn = Callable[[str, int, int, float], None]


def no_progress(what: str, done: int, total: int, value: float) -> None:
    """Report no progress."""


@contextlib.contextmanager
def steps_progress(show: bool, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress with the time left on stderr, while that is a terminal."""
    if not show or not is_terminal(sys.stderr):
        yield lambda done: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False), progress.BarColumn(), progress.MofNCompleteColumn(),
        progress.TextColumn("left"), progress.TimeRemainingColumn(),
    )  # fmt: skip
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        shown = bar.add_task(what, total=total)
        yield lambda done: bar.update(shown, completed=done)


def fraction_of(
    progress: Callable[[int, int], None] | None, start: int, n: int, batch_size: int
) -> Callable[[int, int], None] | None:
    """`progress` of the batch that begins at image `start`, as a share of all `n` images."""
    if progress is None:
        return None
    if not callable(progress):
        raise BadInput(f"progress must be a function or None, found {progress!r}")
    before, batches = start // batch_size, -(-n // batch_size)
    return lambda done, total: progress(before * total + done, batches * total)
