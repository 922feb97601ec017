"""Weights on disk: a network built from what is told of it and filled from a safetensors file that is checked first."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from . import nets
from .errors import BadInput, Notice, nearest
from .finite import not_finite
from .metrics.references import sha256
from .nets.quantized import described, scales, vacant

__all__ = ["build", "fill", "restored", "sha256", "store", "told"]

ELSEWHERE = ("adapters.onnx", "adapters.openvino")


def store(net: nn.Module, file: Path, half: bool = False) -> None:
    """Write a network's tensors as safetensors; half: floating-point ones as float16, but for integers' scales."""
    from safetensors.torch import save

    if bad := not_finite(net):
        warnings.warn(f"{file.name}: the tensor {bad}, which is saved, holds NaN or infinity", Notice, stacklevel=2)
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in net.state_dict().items()}
    if half:
        exact = scales(net)
        weights = {key: w.half() if w.is_floating_point() and key not in exact else w for key, w in weights.items()}
    file.write_bytes(save(weights))  # save_file would make it readable by its owner only


def build(name: str, config: dict[str, Any]) -> nn.Module:
    """A network of `hasten.nets` by class name, or one of those that another library runs."""
    found: dict[str, type[nn.Module]] = {}
    for part in [*(f"nets.{info.name}" for info in pkgutil.iter_modules(nets.__path__)), *ELSEWHERE]:
        module = importlib.import_module(f"{__package__}.{part}")
        found |= {k: v for k, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__}
    if name not in found or not issubclass(found[name], nn.Module):
        raise BadInput(f"unknown network {name!r}: {nearest(name, sorted(found))}")
    return found[name](**config)


def told(net: nn.Module) -> dict[str, Any]:
    """What model.json holds of a network: its class, its config, and which of its layers are made of integers.

    `quantized` is a list of {bits, act_bits, parts, groups, rank, layers}: layers of the same kind, by name.
    """
    rows: list[dict[str, Any]] = []
    for name, kind in described(net).items():
        row = next((row for row in rows if all(row[key] == value for key, value in kind.items())), None)
        if row is None:
            rows.append(row := {**kind, "layers": []})
        row["layers"].append(name)
    base = {"class": type(net).__name__, "config": net.config}
    return base | {"quantized": rows} if rows else base


def restored(told: dict[str, Any]) -> nn.Module:
    """The network that `told` told, for `fill` to fill."""
    net = build(told["class"], told["config"])
    rows = told.get("quantized") or []
    return vacant(net, {name: row for row in rows for name in row["layers"]}) if rows else net


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
    if bad := not_finite(net):
        warnings.warn(f"{file}: the tensor {bad} holds NaN or infinity", Notice, stacklevel=2)
