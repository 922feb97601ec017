"""Verbs on several processes: what each does of it, and that one of them speaks."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..utils.environment import launched

Verb = TypeVar("Verb", bound=Callable[..., Any])
FAILED, STOPPED = 1, 130  # the exit codes of `cli`


def launched_with_others() -> bool:
    """Whether torchrun started this process and others."""
    return launched() > 1


def on_all_processes(verb: Verb) -> Verb:
    """A verb that shares its work among the processes."""

    @functools.wraps(verb)
    def run(*arguments: Any, **options: Any) -> Any:
        if not launched_with_others():
            return verb(*arguments, **options)
        with one_reporter():
            return verb(*arguments, **options)

    return run  # type: ignore[return-value]


def on_main_process(verb: Verb) -> Verb:
    """A verb that gains nothing from more processes: the first does it, the others end at once."""

    @functools.wraps(verb)
    def run(*arguments: Any, **options: Any) -> Any:
        if not launched_with_others():
            return verb(*arguments, **options)
        if os.environ.pop("RANK") != "0":  # without it, nothing below looks for others
            return None
        return verb(*arguments, **options)

    return run  # type: ignore[return-value]


@contextlib.contextmanager
def one_reporter() -> Iterator[None]:
    """All processes but the first are silent; why a run ended early, one of them says, and all exit with its code."""
    from ..distributed.ranks import ProcessLost, Ranks

    with contextlib.ExitStack() as stack:
        stack.enter_context(end_on_signal())
        if os.environ["RANK"] != "0":
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        ranks = None
        try:
            ranks = Ranks.connect()
            yield
        except (Exception, KeyboardInterrupt) as error:
            ignore_signals()
            stopped = isinstance(error, KeyboardInterrupt)
            own = not stopped and not isinstance(error, ProcessLost)
            if ranks is None or ranks.should_report(own):  # a process that reached no others reports by itself
                raise
            raise SystemExit(STOPPED if stopped else FAILED) from None


@contextlib.contextmanager
def end_on_signal() -> Iterator[None]:
    """SIGTERM, which torchrun sends to those that are left when one has died, ends a process as Ctrl-C does."""
    from ..distributed.ranks import Ranks

    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        ignore_signals()
        Ranks.connect().check_peers()
        raise KeyboardInterrupt("stopped" if number == signal.SIGINT else "stopped (SIGTERM)")

    before = {each: signal.signal(each, end) for each in (signal.SIGINT, signal.SIGTERM)}
    yield
    for each, handler in before.items():  # not after a failure, whose message nothing may interrupt
        signal.signal(each, handler)


def ignore_signals() -> None:
    """Hear no more signals: the process is about to end."""
    if threading.current_thread() is threading.main_thread():
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
