"""The weights of what is trained: float32, and with gradient checkpointing where that is wanted."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import BadInput


def to_float32(module: nn.Module) -> nn.Module:
    """Make parameters and buffers of fewer than 32 bits float32, in place, and return the module.

    Training steps are smaller than the resolution of half precision: the weights would not move, or drift.

    Raises:
        BadInput: for 8-bit weights, which the network's hooks would cast back at every call.
    """
    for name, p in module.named_parameters():
        if p.is_floating_point() and p.itemsize < 2:
            raise BadInput(
                f"the weights {name} are {str(p.dtype).removeprefix('torch.')} (layer-wise casting), which cannot be "
                "trained: load the network in float32, bfloat16 or float16"
            )
    return module._apply(lambda value: value.float() if value.is_floating_point() and value.itemsize < 4 else value)


def checkpoint_gradients(net: nn.Module, enable: bool = True) -> None:
    """Switch gradient checkpointing of a network of diffusers on or off. BadInput for one without it."""
    inner: Any = net
    while isinstance(getattr(inner, "net", None), nn.Module) and not hasattr(inner, "enable_gradient_checkpointing"):
        inner = inner.net
    if not getattr(inner, "_supports_gradient_checkpointing", False):
        raise BadInput(
            f"{type(inner).__name__} has no gradient checkpointing (networks of diffusers have it): leave it out, or "
            "use grad_accumulation to need less memory"
        )
    inner.enable_gradient_checkpointing() if enable else inner.disable_gradient_checkpointing()
