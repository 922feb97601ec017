"""The device to run on, and its name."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import torch

from ..errors import BadInput

__all__ = ["device_for", "processor"]


def device_for(text: str) -> torch.device:
    """The device of a name.

    Args:
        text: "cpu", "cuda", "cuda:1"; "auto" is the GPU where there is one.

    Raises:
        BadInput: for a device that is not available.
    """
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise BadInput(f"no device {text!r} here: {str(e).splitlines()[0]} (cpu always works)") from e
    return device


def processor(device: torch.device) -> str:
    """The model name of the GPU, or that of the CPU and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"
