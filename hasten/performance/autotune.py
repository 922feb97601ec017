"""The runtime of a network on this device: parsed from a text, or measured once and cached."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput, nearest
from ..files import write_atomic
from ..utils.environment import cache_folder
from .device import processor
from .runtime import Runtime, probe

__all__ = ["FORMATS", "autotune", "autotune_cache", "format_runtime", "parse_runtime"]

FORMATS = {"fp32": "float32", "bf16": "bfloat16"}
EXTRAS: dict[str, dict[str, Any]] = {
    "medium": {"matmul": "medium"},
    "high": {"matmul": "high"},
    "channels_last": {"channels_last": True},
}


def parse_runtime(text: str, device: str = "cpu") -> Runtime:
    """The runtime of a text.

    Args:
        text: `fp32` or `bf16` (autocast), with `+medium` or `+high` (matrix products) and `+channels_last`.
        device: type of the device: "cpu", "cuda", "mps", "xpu".

    Raises:
        BadInput: for an unknown name, naming the nearest choice.
    """
    first, *rest = text.split("+") if isinstance(text, str) else [str(text)]
    if first not in FORMATS:
        raise BadInput(f"unknown precision {text!r}: {nearest(first, ['auto', *FORMATS])}")
    settings: dict[str, Any] = {}
    for word in rest:
        if word not in EXTRAS:
            raise BadInput(f"unknown part {word!r} of precision {text!r}: {nearest(word, EXTRAS)}")
        settings |= EXTRAS[word]
    return Runtime(dtype=FORMATS[first], device=device, **settings)


def format_runtime(runtime: Runtime) -> str:
    """The text that `parse_runtime` parses: number format, matrix products and layout, without measurements."""
    first = next(name for name, dtype in FORMATS.items() if dtype == runtime.dtype)
    matmul = [] if runtime.matmul == "highest" else [runtime.matmul]
    return "+".join([first, *matmul, *(["channels_last"] if runtime.channels_last else [])])


def autotune(denoiser: nn.Module, x: Tensor, identity: str, budget: float = 2.0, **cond: Any) -> Runtime:
    """The runtime that `probe` selects, from the autotune cache if it is there.

    The cache makes a repeated command select the same runtime, so that it gives the same images, without a probe. Its
    key is the hardware, torch's version, the number of threads, the network and the batch's shape.

    Args:
        denoiser: the network to run.
        x: (B, *S), a batch of the size that will be used.
        identity: of the network, such as the hash of its weights.
        budget: seconds of the probe.
        cond: conditions of the denoiser.
    """
    device = x.device.type
    chip = [platform.machine(), processor(x.device), torch.backends.cpu.get_cpu_capability()]
    description = [identity, list(x.shape), device, *chip, torch.__version__, torch.get_num_threads()]
    key = hashlib.sha256(json.dumps(description).encode()).hexdigest()[:16]
    file = autotune_cache()
    try:
        cache = json.loads(file.read_text())
    except (OSError, ValueError):
        cache = {}
    try:
        return parse_runtime(cache[key], device)
    except (KeyError, TypeError, AttributeError, BadInput):
        runtime = dataclasses.replace(probe(denoiser, x, budget=budget, **cond), threads=0)
    write_cache(file, {**(cache if isinstance(cache, dict) else {}), key: format_runtime(runtime)})
    return runtime


def autotune_cache() -> Path:
    """The file of the cache: in $HASTEN_CACHE, or in hasten's folder of the user's cache (see `cache_folder`)."""
    return cache_folder() / "runtime.json"


def write_cache(file: Path, cache: dict[str, str]) -> None:
    """Write the cache; where that is not possible every command probes again.

    Args:
        file: to write.
        cache: runtimes as texts, by key.
    """
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(cache, indent=1))
