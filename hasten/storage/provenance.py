"""Provenance of a file or record: hashes of models and tensors, versions, date, command line."""

from __future__ import annotations

import datetime
import hashlib
import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..adapters.model_like import ModelLike


def model_hash(model: ModelLike) -> str:
    """sha256 of a model's weights, parts and statistics as they are now, and of its schedule, prediction and config."""
    import torch

    from ..nets.prequantized import plain_tensors

    digest = hashlib.sha256()
    tensors: dict[str, Any] = {**model.denoiser.state_dict(), **model.statistics}
    for part, net in sorted(model.parts.items()):
        tensors |= {f"{part}.{name}": value for name, value in net.state_dict().items()}
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):  # a module's extra state
            digest.update(f"{name} {value!r}".encode())
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        for inner in plain_tensors(value):
            digest.update(inner.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for part in ("schedule", "prediction", "clock", "null_label", "guidance_range"):
        digest.update(repr(getattr(model.denoiser, part, None)).encode())
    network = getattr(model.denoiser, "net", None)
    digest.update(f"{type(network).__name__} {model.classes} {model.codec}".encode())
    config = getattr(network, "config", None)  # of hasten's networks; those of diffusers hold paths and versions
    digest.update(json.dumps(config, sort_keys=True, default=str).encode() if type(config) is dict else b"")
    return digest.hexdigest()


def tensor_hash(*tensors: torch.Tensor) -> str:
    """16 hexadecimal digits of the sha256 of tensors."""
    import torch

    digest = hashlib.sha256()
    for value in tensors:
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def utc_now() -> str:
    """Date and time, UTC, to the minute."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def command_line(verb: str, argument: str, options: Mapping[str, object]) -> str:
    """The command line that reproduces a run.

    Args:
        verb: the subcommand.
        argument: its positional argument.
        options: by Python name; those that are None or False are omitted, lists are repeated.
    """
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
    """The versions of hasten and torch."""
    import torch

    from .. import __version__

    return f"hasten {__version__}, torch {torch.__version__}"
