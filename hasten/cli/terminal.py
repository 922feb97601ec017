"""What the commands say: results as text or JSON, commands as they are typed, progress on stderr."""

from __future__ import annotations

import json as jsonlib
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from ..utils.environment import is_terminal


def spell(verb: str, argument: str, options: Mapping[str, object]) -> str:
    """The command line that does this again; options that are None or False are left out, lists repeated."""
    words = ["hasten", verb, argument]
    for key, value in options.items():
        if value is None or value is False:
            continue
        for each in value if isinstance(value, (list, tuple)) else [value]:
            words.append(f"--{key.replace('_', '-')}")
            if each is not True:
                words.append(str(int(each) if isinstance(each, float) and each.is_integer() else each))
    return shlex.join(words)


def versions() -> str:
    """The versions that a result depends on."""
    import torch

    from .. import __version__

    return f"hasten {__version__}, torch {torch.__version__}"


def tell(result: object, text: str, json: bool) -> None:
    """The result on stdout: JSON for machines, or the text for people."""
    print(jsonlib.dumps(finite(result), indent=2, allow_nan=False) if json else text, flush=True)


def finite(value: object) -> object:
    """The same for JSON, which has no NaN and no infinity: null in their place."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def plain(value: object) -> str:
    """A JSON value on one line, strings without their quotes, long ones cut."""
    text = value if isinstance(value, str) else jsonlib.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."


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
