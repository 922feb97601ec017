"""The packages that the adapters need and hasten does not."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import BadInput

OLDEST = (0, 30)


def diffusers() -> Any:
    """The package `diffusers`. Raises BadInput where it is missing or too old."""
    try:
        library = importlib.import_module("diffusers")
    except ImportError as error:
        raise BadInput(f"this needs diffusers: pip install 'hasten[diffusers]' ({error})") from error
    version = str(getattr(library, "__version__", "0"))
    parts = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if parts < OLDEST:
        raise BadInput(
            f"this needs diffusers {OLDEST[0]}.{OLDEST[1]} or newer, found {version}: pip install -U diffusers"
        )
    return library
