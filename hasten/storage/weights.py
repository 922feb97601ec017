"""Weights on disk: networks built from their description and filled from a safetensors file after its hash is checked.

`save_refusal` decides which networks can be saved, before any work is done on them:

- networks of `hasten.nets`, and exported ones that another library runs;
- networks of diffusers that hasten has an adapter for, by class name and config;
- a user's own `nn.Module`, by the import path of its class and `net.config`, a dict of its constructor's keyword
  arguments (no arguments where it has none). Its tensors and these names are saved, never code. It loads where the
  class is passed (`load(folder, networks=[Net])`), where this process has imported its module already, or where the
  user allows the import (`load(folder, trust_code=True)`, or HASTEN_TRUST_CODE=1 in the environment).
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .. import nets
from ..adapters.model_like import ModelLike
from ..errors import BadInput, Notice, check_choice
from ..files import sha256
from ..nets.quantized import empty_quantized, quantization_config, scale_names
from ..utils.finite import not_finite

__all__ = [
    "build_network",
    "describe_network",
    "load_weights",
    "network_from_description",
    "save_refusal",
    "sha256",
    "write_weights",
]

EXPORTED = ("adapters.onnx", "adapters.openvino")  # modules with networks that another library runs
WRAPPERS = ("ScalarInputs", "EmbeddedInputs", "FixedGuidance", "TimeGroups")  # of hasten.nets: networks around one
TRUST = "HASTEN_TRUST_CODE"
ROOT = __package__.partition(".")[0]


def write_weights(net: nn.Module, file: Path, half: bool = False) -> None:
    """Write a network's tensors as safetensors.

    Args:
        net: the network.
        file: to write.
        half: floating-point tensors as float16, except the scales of integer layers.
    """
    from safetensors.torch import save

    if bad := not_finite(net):
        warnings.warn(f"{file.name}: the tensor {bad}, which is saved, holds NaN or infinity", Notice, stacklevel=2)
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in net.state_dict().items()}
    if half:
        exact = scale_names(net)
        weights = {key: w.half() if w.is_floating_point() and key not in exact else w for key, w in weights.items()}
    file.write_bytes(save(weights))  # save_file would make it readable by its owner only


def network_classes() -> dict[str, type[nn.Module]]:
    """The networks of `hasten.nets` and the exported ones, by class name."""
    classes: dict[str, Any] = {}
    for name in [*(f"nets.{info.name}" for info in pkgutil.iter_modules(nets.__path__)), *EXPORTED]:
        module = importlib.import_module(f"{ROOT}.{name}")
        classes |= {k: v for k, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__}
    return {name: kind for name, kind in classes.items() if issubclass(kind, nn.Module)}


def build_network(name: str, config: dict[str, Any]) -> nn.Module:
    """A network of `hasten.nets`, or an exported one, by class name.

    Args:
        name: of the class.
        config: its constructor's keyword arguments.

    Raises:
        BadInput: for an unknown class.
    """
    classes = network_classes()
    return classes[check_choice("network", name, sorted(classes))](**config)


def is_diffusers(net: nn.Module) -> bool:
    """Whether it is hasten's adapter around a network of diffusers."""
    return any(kind.__name__ == "SplitNetwork" and kind.__module__.startswith("hasten.") for kind in type(net).__mro__)


def is_hasten_network(net: nn.Module) -> bool:
    """Whether it is a network of `hasten.nets`, or an exported one."""
    return type(net).__module__.startswith(f"{ROOT}.") and not is_diffusers(net)


def wrapped_network(net: nn.Module) -> nn.Module | None:
    """The network inside one of hasten's wrappers; None where it is no wrapper."""
    inner = getattr(net, "net", None)
    wraps = type(net).__name__ in WRAPPERS and is_hasten_network(net) and isinstance(inner, nn.Module)
    return inner if wraps else None


def save_refusal(net: nn.Module) -> str | None:
    """Why a network cannot be saved so that it loads again, and what would work; None where it can."""
    if (inner := wrapped_network(net)) is not None:
        return save_refusal(inner)
    if is_hasten_network(net):
        return (
            None
            if network_classes().get(type(net).__name__) is type(net)
            else f"{type(net).__name__} only wraps a network"
        )
    if is_diffusers(net):
        from ..adapters.diffusers.saved_networks import network_refusal

        return network_refusal(net)
    return user_refusal(net)


def user_refusal(net: nn.Module) -> str | None:
    """`save_refusal` of a network of a user's class."""
    kind, module = type(net), type(net).__module__
    name = kind.__qualname__
    for inner in ("_orig_mod", "module"):  # torch.compile; DataParallel, DistributedDataParallel, FSDP
        if module.startswith("torch.") and isinstance(getattr(net, inner, None), nn.Module):
            return f"it is wrapped in {name}: give the network itself, net.{inner}"
    if module == "__main__":
        return (
            f"its class {name} is defined in the program itself, which no other program can import: "
            "move it to a module of its own, such as net.py, and import it from there"
        )
    if "<locals>" in name:
        return f"its class {name} is defined inside a function: move it to the top level of {module}"
    if attribute_at(sys.modules.get(module), name) is not kind:
        return f"its class cannot be imported as {module}.{name}: define it under that name at the top level"
    config = getattr(net, "config", None)
    if config is not None and not isinstance(config, Mapping):
        return f"{name}.config is a {type(config).__name__}: it must be a dict of the constructor's keyword arguments"
    for key, value in net.state_dict().items():
        if not isinstance(value, torch.Tensor):
            return f"its state_dict holds {key}, a {type(value).__name__}: only tensors can be saved"
        if is_lazy(value):
            return f"its layer of {key} is lazy and has seen no sample yet: run the network once before it is used"
    try:
        config = json.loads(json.dumps(dict(config or {})))
    except (TypeError, ValueError) as e:
        return f"{name}.config cannot be written as JSON ({e}): use numbers, texts, lists and dicts only"
    call = f"{name}(**net.config)" if config else f"{name}()"
    try:
        again = build_without_memory(kind, config)
    except Exception as e:  # whatever its constructor raises
        message = " ".join(str(e).split())[:200]
        return (
            f"{call} fails ({type(e).__name__}: {message}): give the network an attribute config, "
            "a dict of its constructor's keyword arguments"
        )
    before, after = ({key: shape_of(w) for key, w in one.state_dict().items()} for one in (net, again))
    common = {key for key in before.keys() & after.keys() if after[key] in (before[key], "lazy")}
    different = sorted((before.keys() | after.keys()) - common)
    if different and not quantization_config(net):  # the tensors of integer layers are in the entry `quantized`
        return f"{call} builds a network with other tensors, first {different[0]}: its config does not describe it"
    return None


def shape_of(value: Any) -> Any:
    """The shape of an entry of a network's state; "lazy" where it has none yet."""
    try:
        return tuple(value.shape)
    except (AttributeError, RuntimeError):
        return "lazy"


def build_without_memory(kind: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    """A network of this class, on the meta device where its constructor allows that; the RNG state is restored."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return kind(**config)
        except Exception:  # it reads values of tensors, which the meta device does not have
            return kind(**config)


def attribute_at(module: Any, name: str) -> Any:
    """The attribute `name`, which may have dots, of a module; None where there is none."""
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def describe_network(net: nn.Module) -> dict[str, Any]:
    """The description of a network in model.json: its class, its config, and its integer layers.

    Returns:
        `class`, `config`, for a network of diffusers also `library`, for a user's `module`, for a wrapper `net`.
        `quantized` is a list of {bits, act_bits, parts, groups, rank, layers}, each for layers of one kind, by name.
    """
    rows: list[dict[str, Any]] = []
    for name, kind in quantization_config(net).items():
        row = next((row for row in rows if all(row[key] == value for key, value in kind.items())), None)
        if row is None:
            rows.append(row := {**kind, "layers": []})
        row["layers"].append(name)
    return network_identity(net) | ({"quantized": rows} if rows else {})


def network_identity(net: nn.Module) -> dict[str, Any]:
    """What a network is built from: `describe_network` without its integer layers."""
    if is_diffusers(net):
        from ..adapters.diffusers.saved_networks import network_config

        return network_config(net)
    config = getattr(net, "config", None)
    config = dict(config) if isinstance(config, Mapping) else {}
    if (inner := wrapped_network(net)) is not None:
        config.pop("net", None)
        return {"class": type(net).__name__, "config": config, "net": network_identity(inner)}
    if is_hasten_network(net):
        return {"class": type(net).__name__, "config": config}
    return {"class": type(net).__qualname__, "module": type(net).__module__, "config": config}


def network_from_description(
    description: dict[str, Any], networks: Sequence[type] = (), trust_code: bool = False
) -> nn.Module:
    """The network with a description of `describe_network`, for `load_weights` to fill.

    Args:
        description: see `describe_network`.
        networks: classes of user networks, see `hasten.load`.
        trust_code: see `hasten.load`.

    Raises:
        BadInput: where its class is unknown.
    """
    if "net" in description:
        inner = network_from_description(description["net"], networks, trust_code)
        net = build_network(description["class"], {"net": inner, **description["config"]})
    elif description.get("library") == "diffusers":
        from ..adapters.diffusers.saved_networks import network_from

        net = network_from(description)
    elif "module" in description:
        net = user_class(description["module"], description["class"], networks, trust_code)(**description["config"])
    else:
        net = build_network(description["class"], description["config"])
    rows = description.get("quantized") or []
    return empty_quantized(net, {name: row for row in rows for name in row["layers"]}) if rows else net


def user_class(module: str, name: str, networks: Sequence[type] = (), trust_code: bool = False) -> type[nn.Module]:
    """The class of a user's network: passed, imported already, or imported now where the user allows that.

    Raises:
        BadInput: where it cannot be imported, must not be, or is no `nn.Module`.
    """
    kind = next((kind for kind in networks if (kind.__module__, kind.__qualname__) == (module, name)), None)
    kind = kind or next((kind for kind in networks if kind.__qualname__ == name), None)
    if kind is None:
        kind = attribute_at(sys.modules.get(module), name)
    if kind is None and (trust_code or os.environ.get(TRUST, "") not in ("", "0")):
        try:
            kind = attribute_at(importlib.import_module(module), name)
        except Exception as e:  # whatever the module raises
            message = " ".join(str(e).split())[:200]
            raise BadInput(f"cannot import {module}, which defines the network: {type(e).__name__}: {message}") from e
        if kind is None:
            raise BadInput(f"{module} has no class {name}, the network that was saved")
    if kind is None:
        raise BadInput(
            f"its network is the class {name} of {module}, which is not imported, and importing runs its code: "
            f"import it first, give load(folder, networks=[{name}]), or allow it by load(folder, trust_code=True) "
            f"or {TRUST}=1 in the environment"
        )
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise BadInput(f"{module}.{name} is not a class of networks (torch.nn.Module)")
    return kind


def load_weights(net: nn.Module, file: Path, expected: str) -> None:
    """Load a safetensors file into a network, in the network's own precision.

    Args:
        net: the network.
        file: the safetensors file.
        expected: its sha256.

    Raises:
        BadInput: where the file is missing or of another hash, and where names or shapes differ from the network's.
    """
    from safetensors.torch import load_file

    if not file.is_file():
        raise BadInput(f"{file} is missing: model.json names it")
    if (digest := sha256(file)) != expected:
        raise BadInput(f"{file} is not the file that model.json names: sha256 {digest[:12]}, expected {expected[:12]}")
    weights, own = load_file(file), net.state_dict()
    if missing := sorted(own.keys() - weights.keys()):
        raise BadInput(f"{file} lacks {len(missing)} of the network's tensors, first {missing[0]}")
    if extra := sorted(weights.keys() - own.keys()):
        raise BadInput(f"{file} has {len(extra)} tensors that the network does not, first {extra[0]}")
    for key, w in weights.items():
        if shape_of(own[key]) not in (tuple(w.shape), "lazy"):
            raise BadInput(f"{file}: {key} has shape {tuple(w.shape)}, the network needs {tuple(own[key].shape)}")
    net.load_state_dict(weights)
    if bad := not_finite(net):
        warnings.warn(f"{file}: the tensor {bad} holds NaN or infinity", Notice, stacklevel=2)


def is_half(model: ModelLike) -> bool:
    """Whether float16 represents all weights exactly, as after loading a float16 file."""
    weights = [w for w in model.denoiser.net.state_dict().values() if w.is_floating_point()]
    return all(torch.equal(w, w.half().to(w.dtype)) for w in weights)
