"""Weights on disk: a network built from its name and filled from a safetensors file that is checked first."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from torch import nn

from . import nets
from .errors import BadInput, nearest
from .metrics.references import sha256

__all__ = ["build", "fill", "sha256", "store"]


def store(net: nn.Module, file: Path, half: bool = False) -> None:
    """Write a network's tensors as safetensors; half: floating-point ones as float16."""
    from safetensors.torch import save

    weights = {key: value.detach().cpu().contiguous().clone() for key, value in net.state_dict().items()}
    if half:
        weights = {key: w.half() if w.is_floating_point() else w for key, w in weights.items()}
    file.write_bytes(save(weights))  # save_file would make it readable by its owner only


def build(name: str, config: dict[str, Any]) -> nn.Module:
    """A network of `hasten.nets` by class name."""
    found: dict[str, type[nn.Module]] = {}
    for info in pkgutil.iter_modules(nets.__path__):
        module = importlib.import_module(f"{nets.__name__}.{info.name}")
        found |= {k: v for k, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__}
    if name not in found or not issubclass(found[name], nn.Module):
        raise BadInput(f"unknown network {name!r}: {nearest(name, sorted(found))}")
    return found[name](**config)


def fill(net: nn.Module, file: Path, expected: str) -> None:
    """Load a safetensors file into a network, in the network's own precision, after its hash and shapes are checked."""
    from safetensors.torch import load_file

    if not file.is_file():
        raise BadInput(f"{file} is missing: model.json names it")
    if (found := sha256(file)) != expected:
        raise BadInput(f"{file} is not the file that model.json names: sha256 {found[:12]}, expected {expected[:12]}")
    weights, own = load_file(file), net.state_dict()
    if missing := sorted(own.keys() - weights.keys()):
        raise BadInput(f"{file} lacks {len(missing)} of the network's tensors, first {missing[0]}")
    if extra := sorted(weights.keys() - own.keys()):
        raise BadInput(f"{file} has {len(extra)} tensors that the network does not, first {extra[0]}")
    for key, w in weights.items():
        if w.shape != own[key].shape:
            raise BadInput(f"{file}: {key} has shape {tuple(w.shape)}, the network wants {tuple(own[key].shape)}")
    net.load_state_dict(weights)
