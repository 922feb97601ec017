"""What a comparison shows on its way, counted in images through the network."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..denoiser import Denoiser
from ..model.model import Model
from .variants import Variant

EVERY = 30.0  # seconds between lines of progress


class Progress:
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


@contextlib.contextmanager
def counting(model: Model, progress: Progress | None = None) -> Iterator[list[int]]:
    """A list whose one entry counts images through the network: a guided evaluation of an image counts 2."""
    count = [0]

    def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        count[0] += len(arguments[0])
        if progress is not None:
            progress.advance(len(arguments[0]))

    denoiser = model.denoiser
    net: nn.Module = denoiser.net if isinstance(denoiser, Denoiser) else denoiser
    handle = net.register_forward_pre_hook(hook)
    features = getattr(denoiser, "features", None)
    if features is not None:  # the seam by which some guides ask the network, past its forward

        def counted(x_t: Tensor, *arguments: Any, **cond: Any) -> Any:
            hook(net, (x_t,))
            return features(x_t, *arguments, **cond)

        denoiser.features = counted  # type: ignore[method-assign]
    try:
        yield count
    finally:
        handle.remove()
        if features is not None:
            del denoiser.features


def extra(model: Model, v: Variant) -> float:
    """Evaluations an image of what is not the model's own network: those of the start."""
    return 0 if v.start is None else model.bound("starts", v.start).nfe
