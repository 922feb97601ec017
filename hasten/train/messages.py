"""Messages of the data readers: each line is printed on stderr once in a process, and only by the main process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

__all__ = ["join_names", "pluralize", "print_once"]

_printed: set[str] = set()


def print_once(line: str) -> None:
    """Print `hasten: line` on stderr, unless this process printed it before or is not the main one."""
    line = " ".join(line.split())
    if line in _printed or os.environ.get("RANK", "0") != "0":
        return
    _printed.add(line)
    print(f"hasten: {line}", file=sys.stderr, flush=True)


def join_names(names: Iterable[object], maximum: int = 8) -> str:
    """Names separated by commas; of more than `maximum`, the first ones and the number of the rest."""
    texts = [str(name) for name in names]
    rest = len(texts) - maximum
    return ", ".join(texts) if rest <= 0 else f"{', '.join(texts[:maximum])} and {rest:,} more"


def pluralize(n: int, noun: str) -> str:
    """`1 file`, `2,000 files`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
