"""Access to the package `diffusers`, and to the network of a pipeline."""

from __future__ import annotations

import importlib
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...errors import BadInput, Notice
from .network import uncompiled

OLDEST = (0, 30)


def diffusers() -> Any:
    """The package `diffusers`.

    Raises:
        BadInput: where it is missing or too old.
    """
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
    """Disable the loading bars of diffusers and transformers within the block; those of downloads stay."""
    logs = []
    for name in ("diffusers.utils.logging", "transformers.utils.logging"):
        try:
            logs.append(importlib.import_module(name))
        except ImportError:
            continue
    enabled = [log for log in logs if log.is_progress_bar_enabled()]
    hub = importlib.import_module("huggingface_hub.utils")  # its bars are switched by transformers too
    downloads = not hub.are_progress_bars_disabled()
    for log in enabled:
        log.disable_progress_bar()
    if downloads:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        for log in enabled:
            log.enable_progress_bar()
        if not downloads:
            hub.disable_progress_bars()


class ExpectedNetwork(logging.Filter):
    """Drops the line with which diffusers reports that a `MobileUNet2DConditionModel` is no `UNet2DConditionModel`."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not (message.startswith("Expected types for unet") and "MobileUNet2DConditionModel" in message)


class SlowerProcessors(logging.Filter):
    """Drops the lines on image processors that fall back to Pillow without torchvision; they are not used here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "requires torchvision (not installed)" not in record.getMessage()


@contextmanager
def without_expected_messages() -> Iterator[None]:
    """Within the block pipelines load without the lines that `ExpectedNetwork` and `SlowerProcessors` drop."""
    filters = {
        "diffusers.pipelines.pipeline_utils": ExpectedNetwork(),
        "transformers.utils.import_utils": SlowerProcessors(),
    }
    for name, expected in filters.items():
        logging.getLogger(name).addFilter(expected)
    try:
        yield
    finally:
        for name, expected in filters.items():
            logging.getLogger(name).removeFilter(expected)


class Truncations(logging.Filter):
    """Drops the lines, as long as the prompt, that report a truncated prompt; `length` is what is read of it."""

    def __init__(self) -> None:
        super().__init__()
        self.length: int | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "part of your input was truncated" in message:
            found = re.search(r"(\d+) tokens: ", message)
            self.length = int(found[1]) if found else 0
            return False
        return not message.startswith("Token indices sequence length is longer")


@contextmanager
def short_truncation_notice(prompt: str) -> Iterator[None]:
    """Report a prompt that is truncated within the block in one line, without the text that is lost."""
    truncations = Truncations()
    handlers = [handler for name in ("diffusers", "transformers") for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(truncations)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(truncations)
    if truncations.length is not None:
        limit = f"the {truncations.length} tokens" if truncations.length else "what"
        warnings.warn(
            f"the prompt {prompt[:40]!r}... of {len(prompt):,} characters is longer than {limit} that the text encoder "
            "reads: the rest is not used",
            Notice,
            stacklevel=3,
        )


INDEX = "model_index.json"


def is_pipeline(value: Any) -> bool:
    """Whether a value is a pipeline of `diffusers`, which is not imported for the check."""
    return any(kind.__name__ == "DiffusionPipeline" for kind in type(value).__mro__)


def network_of(pipe: Any) -> tuple[str, nn.Module]:
    """The name of a pipeline's component that is its network, and the network, without `torch.compile`'s wrapper.

    Raises:
        BadInput: where it has neither a unet nor a transformer.
    """
    for slot in ("unet", "transformer"):
        if isinstance(net := getattr(pipe, slot, None), nn.Module):
            return slot, uncompiled(net)
    raise BadInput(f"{type(pipe).__name__} has neither a unet nor a transformer")
