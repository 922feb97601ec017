"""What a reader of data prints on stderr: each line once in a process, and by the first of several processes alone."""

from __future__ import annotations

import os
import sys

_printed: set[str] = set()


def note(line: str) -> None:
    """Print `hasten: line` on stderr, unless this process has printed it before or is not the first of several."""
    line = " ".join(line.split())
    if line in _printed or os.environ.get("RANK", "0") != "0":
        return
    _printed.add(line)
    print(f"hasten: {line}", file=sys.stderr, flush=True)


def listed(names: object, most: int = 8) -> str:
    """Names separated by commas; of many, the first few and how many more there are."""
    every = [str(name) for name in names]  # type: ignore[attr-defined]
    rest = len(every) - most
    return ", ".join(every) if rest <= 0 else f"{', '.join(every[:most])} and {rest:,} more"


def counted(n: int, what: str) -> str:
    """`1 file`, `2,000 files`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"
