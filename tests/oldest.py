"""The lowest versions that pyproject.toml declares, as requirements for pip: `python tests/oldest.py > oldest.txt`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXTRAS = ("diffusers",)
TESTS = ("pytest", "pytest-timeout")


def lowest() -> list[str]:
    """`name==version` of the dependencies, of some extras, and of what the tests run with."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for name in EXTRAS for line in extras[name])]
    wanted += [line for line in extras["dev"] if re.match(r"[\w-]+", line)[0] in TESTS]  # type: ignore[index]
    return [re.sub(r">=", "==", line) for line in wanted]


if __name__ == "__main__":
    print("\n".join(lowest()))
