"""An extension of griffe: `mean, variance: of the data.` under `Args:` documents two arguments."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^( *)(Args|Attributes):\n((?:\1 +.*\n?|[ ]*\n)+)", re.M)


class JoinedArguments(griffe.Extension):
    """Splits arguments that share a description, so that the reference lists each of them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite a docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub(_split, obj.docstring.value)


def _split(section: re.Match[str]) -> str:
    indent = re.match(r" *", section[3])[0]  # type: ignore[index]
    entry = re.compile(
        rf"^{indent}((?:\*{{0,2}}\w+, )+\*{{0,2}}\w+)(:.*\n?(?:{indent} +.*\n?| *\n(?={indent} ))*)", re.M
    )

    def each(match: re.Match[str]) -> str:
        described = match[2] if match[2].endswith("\n") else f"{match[2]}\n"
        return "".join(f"{indent}{name}{described}" for name in match[1].split(", "))

    return f"{section[1]}{section[2]}:\n{entry.sub(each, section[3])}"
