"""The command line: every public function of `commands` is a verb, its signature and docstring are the help."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import HastenError, Notice
from ..utils.environment import is_out_of_memory, launched, open_standard_streams, without_launcher

if TYPE_CHECKING:
    from cyclopts import App

# Flags by verb that had other names: old name, present one. Under "" those of all verbs.
OLD_FLAGS = {
    "": {"--runtime": "--precision"},
    "sample": {"--single": "--separate-files"},
    "train": {"--accumulate": "--grad-accumulation", "--shard": "--fsdp"},
    "distill": {"--accumulate": "--grad-accumulation", "--shard": "--fsdp", "--evaluations": "--nfe-budget"},
    "choose": {"--without": "--exclude"},
    "quantize": {
        "--weights": "--weight-bits",
        "--acts": "--act-bits",
        "--learn-steps": "--learn-step-sizes",
        "--groups": "--time-groups",
        "--ranges": "--calibration",
        "--keep": "--exclude",
        "--eight": "--int8-fraction",
        "--spread": "--calibration-steps",
    },
}
# Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted by Ctrl-C, 141 stdout was closed.
FAILED, USAGE, STOPPED, UNREAD = 1, 2, 130, 141


def app() -> App:
    """The command line as an object: built from `commands.VERBS`."""
    from cyclopts import App, Parameter

    from .. import __version__
    from . import verbs as commands
    from ._numbers import with_checked_numbers

    verbs = App(
        name="hasten",
        help="Make diffusion models fast, and measure what each method costs and what quality is left.",
        version=__version__,
        default_parameter=Parameter(negative=()),
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
    )
    for verb in commands.VERBS:
        verbs.command(with_checked_numbers(verb))
    return verbs


def print_line(message: object) -> None:
    """One line on stderr, whatever line breaks the message had; nothing where nobody can read it."""
    with contextlib.suppress(OSError, ValueError):
        words = (word if len(word) <= 500 else f"{word[:200]}...{word[-50:]}" for word in str(message).split())
        print(f"hasten: {' '.join(words)}", file=sys.stderr, flush=True)


def notices() -> None:
    """Warnings of hasten itself are a line on stderr, without the line of source that warns."""
    known = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *others: Any, **more: Any) -> None:
        if issubclass(category, Notice):
            print_line(message)
        else:
            known(message, category, *others, **more)

    warnings.showwarning = show


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors are one line on stderr; HASTEN_DEBUG=1 shows the traceback."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    open_standard_streams()
    try:
        with warnings.catch_warnings():
            notices()
            return run_command(arguments)
    except KeyboardInterrupt as stop:
        print_line(stop if str(stop) else "stopped; nothing was written")
        return STOPPED
    except BrokenPipeError:
        drop_output()
        return UNREAD
    except Exception as error:
        if os.environ.get("HASTEN_DEBUG", "0") not in ("", "0"):
            raise
        print_line(error_line(error))
        try:
            sys.stdout.flush()
        except (OSError, ValueError):  # such as a full disk, which has just been reported
            drop_output()
        return FAILED


def drop_output() -> None:
    """Nobody reads stdout any more, or it cannot be written: the flush at exit must not complain as well."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def present_flags(arguments: list[str], quiet: bool = False) -> list[str]:
    """The arguments with the present names of flags in place of old ones, which a line on stderr tells."""
    verb = next((word for word in arguments if not word.startswith("-")), "")
    renamed = {**OLD_FLAGS.get("", {}), **OLD_FLAGS.get(verb, {})}
    result: list[str] = []
    for number, word in enumerate(arguments):
        flag, equals, value = word.partition("=")
        new = renamed.get(flag)
        if word == "--":
            return result + arguments[number:]
        if new is not None and not quiet:
            print_line(f"{flag} is now called {new}")
        result.append(word if new is None else f"{new}{equals}{value}")
    return result


def run_command(arguments: list[str]) -> int:
    """Parse and call; usage errors are reported here, because only the parser raises them."""
    from cyclopts import CycloptsError

    first = launched() == 1 or os.environ["RANK"] == "0"  # torchrun starts this several times: one says it
    if line := without_launcher():
        print_line(line)
    if "--help" in arguments and not first:
        return 0
    arguments = present_flags(arguments, quiet=not first)
    try:
        app()(arguments)
    except CycloptsError as error:
        if first:
            print_line(f"{error} (hasten --help shows the usage)")
        return USAGE
    sys.stdout.flush()
    return 0


def error_line(error: Exception) -> str:
    """An error as one line for the person who typed the command."""
    if isinstance(error, HastenError):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory; a smaller --batch-size needs less (in training --accumulate too)"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, (OverflowError, FloatingPointError)):
        return f"a number is too large or too small: {error} (set HASTEN_DEBUG=1 to see where)"
    return f"unexpected {type(error).__name__}: {error} (set HASTEN_DEBUG=1 to see where)"
