"""Networks quantised by another library (bitsandbytes, torchao, GGUF, quanto), recognised by their classes alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput

__all__ = ["check_movable", "check_original_weights", "is_prequantized", "plain_tensors", "quantized_by"]

# beginnings of the modules of their layers and tensors, and the names that users know
LIBRARIES = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "diffusers.quantizers.gguf": "GGUF",
    "optimum.quanto": "quanto",
    "modelopt": "NVIDIA ModelOpt",
    "nunchaku": "nunchaku",
    "sdnq": "SDNQ",
}
FIXED = ("bitsandbytes",)  # whose weights stay on the device where they were quantised


def is_prequantized(layer: nn.Module) -> bool:
    """Whether a layer's own weights are in the format of another library."""
    return _library_of(layer) is not None


def quantized_by(net: nn.Module) -> str | None:
    """The library that has quantised layers of a network; None where none has."""
    return next((name for layer in net.modules() if (name := _library_of(layer)) is not None), None)


def check_original_weights(net: nn.Module, what: str, instead: str) -> None:
    """Refuse a network that another library has quantised.

    Args:
        net: the network.
        what: needs its original weights, such as "quantize".
        instead: what the user can do.

    Raises:
        BadInput: with the library.
    """
    if (library := quantized_by(net)) is not None:
        name = next((type(inner).__name__ for inner in net.modules() if hasattr(inner, "config")), type(net).__name__)
        raise BadInput(f"{what}: this {name} is quantised by {library}, and its original weights are needed: {instead}")


def check_movable(net: nn.Module, device: torch.device | str) -> None:
    """Refuse to move a network to another device where its library cannot.

    Raises:
        BadInput: with the library.
    """
    here = next((p.device for p in net.parameters()), None)
    library = quantized_by(net)
    if library in FIXED and here is not None and here.type != torch.device(device).type:
        raise BadInput(
            f"a network that {library} quantised stays on {here.type}: load the pipeline on {torch.device(device).type}"
        )


def plain_tensors(value: Tensor) -> Iterator[Tensor]:
    """The tensors of torch's own that a tensor of another class holds; an ordinary tensor itself."""
    names = getattr(value, "__tensor_flatten__", None)
    if names is None:
        yield value
        return
    for name in names()[0]:
        yield from plain_tensors(getattr(value, name))


def _library_of(layer: nn.Module) -> str | None:
    """The library of a layer's class, or of the class of one of its own tensors."""
    own: list[Any] = [layer, *(p for p in vars(layer)["_parameters"].values() if p is not None)]
    for one in own:
        for kind in type(one).__mro__:
            for begin, name in LIBRARIES.items():
                if kind.__module__ == begin or kind.__module__.startswith(f"{begin}."):
                    return name
    return None
