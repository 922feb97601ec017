"""Checks for NaN and infinity, with the location of the first one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFinite


def is_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinity, in one pass and without a copy."""
    if not (x.is_floating_point() or x.is_complex()) or not x.numel():
        return True
    x = x.detach()
    if x.dtype.itemsize < 2:  # the 8-bit formats have few operations
        x = x.float()
    total = x.sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32) if not x.is_complex() else x.sum()
    # a finite sum has finite terms; one that is not may also have overflowed
    return bool(torch.isfinite(total)) or bool(torch.isfinite(x).all())


def check_finite(what: str, value: Any) -> None:
    """Raise NonFinite for a number, a tensor, or a mapping or list of them with NaN or infinity.

    Args:
        what: begins the message.
        value: to check.
    """
    if isinstance(value, Mapping):
        for key, each in value.items():
            check_finite(f"{what}: {key}", each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            check_finite(what, each)
    elif isinstance(value, Tensor):
        if not is_finite(value):
            raise NonFinite(f"{what} holds NaN or infinity")
    elif isinstance(value, float) and not math.isfinite(value):
        raise NonFinite(f"{what} is {value}, not a finite number")


def first_non_finite(tensors: Iterable[tuple[str, Tensor]], infinity: bool = True) -> str | None:
    """The name of the first tensor with NaN or infinity; None if there is none.

    Args:
        tensors: (name, tensor).
        infinity: False: only NaN counts.
    """
    for name, value in tensors:
        if isinstance(value, Tensor) and not is_finite(value) and (infinity or bool(torch.isnan(value).any())):
            return name
    return None


def not_finite(net: nn.Module) -> str | None:
    """The name of the first parameter that is not finite, or buffer with NaN (a mask may have -inf); else None."""
    return first_non_finite(net.named_parameters()) or first_non_finite(net.named_buffers(), infinity=False)


def check_weights(net: nn.Module, where: str) -> None:
    """Raise NonFinite for a network with a weight that is not finite, naming it.

    Args:
        net: to check.
        where: begins the message.
    """
    if name := not_finite(net):
        raise NonFinite(f"{where}: the tensor {name} holds NaN or infinity: the file is damaged or training diverged")


def check_images(
    x: Tensor, seeds: Iterable[int] | None = None, where: Callable[[], str] | None = None, what: str = "images"
) -> None:
    """Raise NonFinite for images with NaN or infinity, naming them by number or by seed.

    Args:
        x: (n, ...).
        seeds: of the images.
        where: computes where it began, for the message.
        what: the images are.
    """
    if is_finite(x):
        return
    bad = (~torch.isfinite(x.detach().float()).flatten(1).all(dim=1)).nonzero().flatten().tolist()
    names = bad if seeds is None else [seed for k, seed in enumerate(seeds) if k in set(bad)]
    listed = ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
    kind = "number" if seeds is None else "seed"
    which = f"{kind}{'' if len(names) == 1 else 's'} {listed}"
    began = f": {where()}" if where is not None else ""
    raise NonFinite(f"{len(bad)} of {len(x)} {what} hold NaN or infinity ({which}){began}")
