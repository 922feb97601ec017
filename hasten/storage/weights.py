"""Weights on disk: a network built from what is told of it and filled from a safetensors file that is checked first.

Which networks can be saved is decided by `refusal`, before any work is done on them:

- networks of `hasten.nets`, and those that another library runs;
- networks of diffusers that hasten has an adapter for, by their class name and config;
- one's own `nn.Module`, by the import path of its class and `net.config`, a dict of its constructor's keyword arguments
  (or no arguments, where it has no such dict). Saved are its tensors and these names, never code. It opens again where
  the class is given (`load(folder, networks=[Net])`), where this process has imported its module already, or where the
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
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from .. import nets
from ..adapters.model_like import ModelLike
from ..errors import BadInput, Notice, nearest
from ..files import sha256
from ..nets.quantized import described, scales, vacant
from ..utils.finite import not_finite

__all__ = [
    "build_network",
    "load_weights",
    "save_refusal",
    "network_from_description",
    "sha256",
    "write_weights",
    "describe_network",
]

ELSEWHERE = ("adapters.onnx", "adapters.openvino")
WRAPPERS = ("ScalarInputs", "EmbeddedInputs", "FixedGuidance", "TimeGroups")  # of hasten.nets: networks around one
TRUST = "HASTEN_TRUST_CODE"
ROOT = __package__.partition(".")[0]


def write_weights(net: nn.Module, file: Path, half: bool = False) -> None:
    """Write a network's tensors as safetensors; half: floating-point ones as float16, but for integers' scales."""
    from safetensors.torch import save

    if bad := not_finite(net):
        warnings.warn(f"{file.name}: the tensor {bad}, which is saved, holds NaN or infinity", Notice, stacklevel=2)
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in net.state_dict().items()}
    if half:
        exact = scales(net)
        weights = {key: w.half() if w.is_floating_point() and key not in exact else w for key, w in weights.items()}
    file.write_bytes(save(weights))  # save_file would make it readable by its owner only


def network_classes() -> dict[str, type[nn.Module]]:
    """The networks of `hasten.nets`, and those that another library runs, by class name."""
    found: dict[str, Any] = {}
    for part in [*(f"nets.{info.name}" for info in pkgutil.iter_modules(nets.__path__)), *ELSEWHERE]:
        module = importlib.import_module(f"{ROOT}.{part}")
        found |= {k: v for k, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__}
    return {name: kind for name, kind in found.items() if issubclass(kind, nn.Module)}


def build_network(name: str, config: dict[str, Any]) -> nn.Module:
    """A network of `hasten.nets` by class name, or one of those that another library runs."""
    if name not in (found := network_classes()):
        raise BadInput(f"unknown network {name!r}: {nearest(name, sorted(found))}")
    return found[name](**config)


def is_diffusers(net: nn.Module) -> bool:
    """Whether it is hasten's adapter around a network of diffusers."""
    return any(kind.__name__ == "SplitNetwork" and kind.__module__.startswith("hasten.") for kind in type(net).__mro__)


def is_hasten_network(net: nn.Module) -> bool:
    """Whether it is a network of `hasten.nets`, or one that another library runs."""
    return type(net).__module__.startswith(f"{ROOT}.") and not is_diffusers(net)


def save_refusal(net: nn.Module) -> str | None:
    """Why a network cannot be saved so that it opens again, and what would work; None where it can."""
    if type(net).__name__ in WRAPPERS and is_hasten_network(net):
        return save_refusal(net.net)  # type: ignore[arg-type]
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
    """`refusal` of a network whose class is the user's."""
    kind, module = type(net), type(net).__module__
    name = kind.__qualname__
    for inside in ("_orig_mod", "module"):  # torch.compile; DataParallel, DistributedDataParallel, FSDP
        if module.startswith("torch.") and isinstance(getattr(net, inside, None), nn.Module):
            return f"it is wrapped in {name}: give the network itself, net.{inside}"
    if module == "__main__":
        return (
            f"its class {name} is defined in the program itself, which no other program can import: "
            "move it to a module of its own, such as net.py, and import it from there"
        )
    if "<locals>" in name:
        return f"its class {name} is defined inside a function: move it to the top level of {module}"
    if attribute_at(sys.modules.get(module), name) is not kind:
        return f"its class is not found under its own name, {module}.{name}: give it that name at the top level"
    config = getattr(net, "config", None)
    if config is not None and not isinstance(config, Mapping):
        return f"{name}.config is a {type(config).__name__}: it must be a dict of the constructor's keyword arguments"
    for key, value in net.state_dict().items():
        if not isinstance(value, torch.Tensor):
            return f"its state_dict holds {key}, a {type(value).__name__}: only tensors can be saved"
        if isinstance(value, UninitializedTensorMixin):
            return f"its layer of {key} is lazy and has seen no sample yet: run the network once before it is used"
    try:
        config = json.loads(json.dumps(dict(config or {})))
    except (TypeError, ValueError) as e:
        return f"{name}.config cannot be written as JSON ({e}): keep numbers, texts, lists and dicts in it"
    call = f"{name}(**net.config)" if config else f"{name}()"
    try:
        again = build_without_memory(kind, config)
    except Exception as e:  # whatever its constructor raises
        said = " ".join(str(e).split())[:200]
        return (
            f"{call} fails ({type(e).__name__}: {said}): give the network an attribute config, "
            "a dict of its constructor's keyword arguments"
        )
    before, after = ({key: shape_of(w) for key, w in one.state_dict().items()} for one in (net, again))
    common = {key for key in before.keys() & after.keys() if after[key] in (before[key], "lazy")}
    different = sorted((before.keys() | after.keys()) - common)
    if different and not described(net):  # integer layers have other tensors, which `quantized` describes
        return f"{call} builds a network with other tensors, first {different[0]}: its config does not describe it"
    return None


def shape_of(value: Any) -> Any:
    """The shape of an entry of a network's state; "lazy" where it has none yet."""
    try:
        return tuple(value.shape)
    except (AttributeError, RuntimeError):
        return "lazy"


def build_without_memory(kind: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    """A network of this kind, where its constructor lets it, without memory for its weights; no draw leaves a trace."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return kind(**config)
        except Exception:  # whatever it computes at once, which has no values there
            return kind(**config)


def attribute_at(module: Any, name: str) -> Any:
    """The attribute `name`, which may have dots, of a module; None where there is none."""
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def describe_network(net: nn.Module) -> dict[str, Any]:
    """What model.json holds of a network: its class, its config, and which of its layers are made of integers.

    `quantized` is a list of {bits, act_bits, parts, groups, rank, layers}: layers of the same kind, by name.
    Of a network of diffusers there is also `library`, of one's own `module`; `net` is the network inside a wrapper.
    """
    rows: list[dict[str, Any]] = []
    for name, kind in described(net).items():
        row = next((row for row in rows if all(row[key] == value for key, value in kind.items())), None)
        if row is None:
            rows.append(row := {**kind, "layers": []})
        row["layers"].append(name)
    return identity(net) | ({"quantized": rows} if rows else {})


def identity(net: nn.Module) -> dict[str, Any]:
    """What a network is built from."""
    if is_diffusers(net):
        from ..adapters.diffusers.saved_networks import network_config

        return network_config(net)
    config = getattr(net, "config", None)
    config = dict(config) if isinstance(config, Mapping) else {}
    if is_hasten_network(net) and type(net).__name__ in WRAPPERS:
        config.pop("net", None)
        return {"class": type(net).__name__, "config": config, "net": identity(net.net)}  # type: ignore[arg-type]
    if is_hasten_network(net):
        return {"class": type(net).__name__, "config": config}
    return {"class": type(net).__qualname__, "module": type(net).__module__, "config": config}


def network_from_description(
    told: dict[str, Any], networks: Sequence[type] = (), trust_code: bool = False
) -> nn.Module:
    """The network that `told` describes, for `fill` to fill. networks, trust_code: see `load`."""
    if "net" in told:
        config, inside = dict(told["config"]), network_from_description(told["net"], networks, trust_code)
        net = build_network(told["class"], {"net": inside, **config})
    elif told.get("library") == "diffusers":
        from ..adapters.diffusers.saved_networks import network_from

        net = network_from(told)
    elif "module" in told:
        net = user_class(told["module"], told["class"], networks, trust_code)(**told["config"])
    else:
        net = build_network(told["class"], told["config"])
    rows = told.get("quantized") or []
    return vacant(net, {name: row for row in rows for name in row["layers"]}) if rows else net


def user_class(module: str, name: str, networks: Sequence[type] = (), trust_code: bool = False) -> type[nn.Module]:
    """The class of one's own network: given, imported already, or imported now, where the user allows that."""
    found = next((kind for kind in networks if (kind.__module__, kind.__qualname__) == (module, name)), None)
    found = found or next((kind for kind in networks if kind.__qualname__ == name), None)
    if found is None:
        found = attribute_at(sys.modules.get(module), name)
    if found is None and (trust_code or os.environ.get(TRUST, "") not in ("", "0")):
        try:
            found = attribute_at(importlib.import_module(module), name)
        except Exception as e:  # whatever the module raises
            said = " ".join(str(e).split())[:200]
            raise BadInput(f"cannot import {module}, which defines the network: {type(e).__name__}: {said}") from e
        if found is None:
            raise BadInput(f"{module} has no class {name}, the network that was saved")
    if found is None:
        raise BadInput(
            f"its network is the class {name} of {module}, which is not imported, and importing runs its code: "
            f"import it first, give load(folder, networks=[{name}]), or allow it by load(folder, trust_code=True) "
            f"or {TRUST}=1 in the environment"
        )
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise BadInput(f"{module}.{name} is not a class of networks (torch.nn.Module)")
    return found


def load_weights(net: nn.Module, file: Path, expected: str) -> None:
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
        if shape_of(own[key]) not in (tuple(w.shape), "lazy"):
            raise BadInput(f"{file}: {key} has shape {tuple(w.shape)}, the network wants {tuple(own[key].shape)}")
    net.load_state_dict(weights)
    if bad := not_finite(net):
        warnings.warn(f"{file}: the tensor {bad} holds NaN or infinity", Notice, stacklevel=2)


def is_half(model: ModelLike) -> bool:
    """Whether float16 holds the weights without loss: they came from such a file."""
    weights = [w for w in model.denoiser.net.state_dict().values() if w.is_floating_point()]
    return all(torch.equal(w, w.half().to(w.dtype)) for w in weights)
