"""What devices differ in: waiting for them, float64, copies that do not wait, generators."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "as_float64",
    "default_device_type",
    "float64_device",
    "has_float64",
    "has_pinned_memory",
    "rng_states",
    "seed_generators",
    "set_rng_states",
    "synchronize",
    "upload",
]

KINDS = ("cuda", "xpu", "mps")  # GPUs, in the order in which they are chosen


def default_device_type() -> str:
    """The type of the GPU where there is one, else "cpu"."""
    return next((kind for kind in KINDS if backend_of(kind) is not None), "cpu")


def backend_of(kind: str) -> Any:
    """torch's module for a type of GPU, such as `torch.cuda`; None where there is no such GPU."""
    backend: Any = getattr(torch, kind, None)
    available: Any = torch.backends.mps if kind == "mps" else backend
    return backend if backend is not None and available.is_available() else None


def synchronize(device: torch.device | str) -> None:
    """Wait until a device has finished its work, before a clock is read; a CPU has nothing to wait for."""
    device = torch.device(device)
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


# ---- float64 ----


def has_float64(device: torch.device | str) -> bool:
    """Whether a device has float64; MPS has none, nor have some GPUs of Intel."""
    device = torch.device(device)
    if device.type == "xpu":
        return xpu_has_float64(device.index)
    return device.type != "mps"


def float64_device(device: torch.device | str) -> torch.device:
    """The device itself, or the CPU for a device without float64."""
    return torch.device(device) if has_float64(device) else torch.device("cpu")


def as_float64(value: Tensor) -> Tensor:
    """The values in float64, on their own device or, where that has no float64, on the CPU."""
    return value.double() if has_float64(value.device) else value.cpu().double()  # in this order: MPS cannot do both


@functools.cache
def xpu_has_float64(index: int | None) -> bool:
    """Whether a GPU of Intel has float64."""
    properties = torch.xpu.get_device_properties(torch.xpu.current_device() if index is None else index)
    return bool(getattr(properties, "has_fp64", True))


# ---- copies ----


def has_pinned_memory(device: torch.device | str) -> bool:
    """Whether copies to a device from pinned memory run beside the CPU's work."""
    return torch.device(device).type in ("cuda", "xpu")


def upload(value: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, in this dtype; from the CPU by way of pinned memory, where the device has that.

    The work that follows on the device sees the copy complete. Later changes of `value` do not reach it.
    """
    value = value if dtype is None else value.to(dtype)
    if value.device.type != "cpu" or not has_pinned_memory(device):
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)  # torch keeps the memory until the copy is done


# ---- generators ----


def seed_generators(seed: int) -> None:
    """`torch.manual_seed`, which without a GPU spends a millisecond on a note of who seeds the GPUs that may come."""
    if default_device_type() == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def rng_states() -> dict[str, Tensor]:
    """The states of torch's global generators: the CPU's, and that of the current GPU where there is one."""
    gpus = {kind: backend for kind in KINDS if (backend := backend_of(kind)) is not None}
    return {"cpu": torch.get_rng_state(), **{kind: backend.get_rng_state() for kind, backend in gpus.items()}}


def set_rng_states(states: dict[str, Tensor]) -> None:
    """Restore what `rng_states` returned."""
    for kind, state in states.items():
        backend: Any = torch if kind == "cpu" else backend_of(kind)
        backend.set_rng_state(state)
