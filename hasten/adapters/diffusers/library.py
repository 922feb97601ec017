"""The packages that the adapters need and hasten does not."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...errors import BadInput
from .network import uncompiled

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


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Within it diffusers and transformers draw no progress bars of their own, which would run through the lines of who
    loads; those of downloads stay."""
    logs = []
    for name in ("diffusers.utils.logging", "transformers.utils.logging"):
        try:
            logs.append(importlib.import_module(name))
        except ImportError:
            continue
    shown = [log for log in logs if log.is_progress_bar_enabled()]
    hub = importlib.import_module("huggingface_hub.utils")  # diffusers needs it; transformers switches its bars too
    downloads = not hub.are_progress_bars_disabled()
    for log in shown:
        log.disable_progress_bar()
    if downloads:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()
        if not downloads:
            hub.disable_progress_bars()


INDEX = "model_index.json"


def is_pipeline(thing: Any) -> bool:
    """Whether a thing is a pipeline of `diffusers` (which is not imported to find out)."""
    return any(kind.__name__ == "DiffusionPipeline" for kind in type(thing).__mro__)


def network_of(pipe: Any) -> tuple[str, nn.Module]:
    """The slot of a pipeline that holds its network, and the network, the one inside of `torch.compile`'s."""
    for slot in ("unet", "transformer"):
        if isinstance(net := getattr(pipe, slot, None), nn.Module):
            return slot, uncompiled(net)
    raise BadInput(f"{type(pipe).__name__} has neither a unet nor a transformer")
