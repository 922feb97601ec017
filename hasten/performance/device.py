"""The device to run on: its name and its memory."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import torch

from ..errors import BadInput
from ..utils.devices import default_device_type

__all__ = ["COUNTED", "allocated_bytes", "device_for", "peak_allocated_bytes", "processor", "reset_peak"]

COUNTED = ("cuda", "xpu")  # whose allocators know their peak


def device_for(text: str) -> torch.device:
    """The device of a name.

    Args:
        text: "cpu", "cuda", "cuda:1", "mps", "xpu"; "auto" is the GPU where there is one.

    Raises:
        BadInput: for a device that is not available.
    """
    if text == "auto":
        text = default_device_type()
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise BadInput(f"no device {text!r} here: {str(e).splitlines()[0]} (cpu always works)") from e
    return device


def processor(device: torch.device) -> str:
    """The model name of the GPU, or that of the CPU and its number of cores."""
    if device.type in COUNTED:
        return str(getattr(torch, device.type).get_device_name(device))
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def reset_peak(device: torch.device | str) -> bool:
    """Forget the peak so far of a device's allocator; False where it knows none, see `allocated_bytes`."""
    device = torch.device(device)
    if device.type not in COUNTED:
        return False
    getattr(torch, device.type).reset_peak_memory_stats(device)
    return True


def peak_allocated_bytes(device: torch.device | str) -> int:
    """The peak of a device's allocator since `reset_peak`, of a device for which that is True."""
    device = torch.device(device)
    return int(getattr(torch, device.type).max_memory_allocated(device))


def allocated_bytes(device: torch.device | str) -> int | None:
    """Bytes that a device's allocator has given out now; None for the CPU."""
    device = torch.device(device)
    if device.type in COUNTED:
        return int(getattr(torch, device.type).memory_allocated(device))
    return int(torch.mps.current_allocated_memory()) if device.type == "mps" else None
