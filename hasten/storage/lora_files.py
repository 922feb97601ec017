"""LoRA files: safetensors in the layout of diffusers and peft, or with kohya's names, read and written.

`B A alpha / rank` is what a file adds to the weights. The layout of diffusers has alpha and rank in the metadata
`lora_adapter_metadata`; without them alpha = rank. kohya's files have `.alpha` beside the factors. What hasten knows of
a student (steps, sampler, times, the guidance scale that is built in, the hash of the weights it was made for) is JSON
in the metadata `hasten`; other programs ignore it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_choice
from ..files import check_writable, write_file
from ..nets.lora import LowRank, innermost
from .lora_names import OUTSIDE, dotted, kohya_key, split_kohya

FORMATS = ("diffusers", "kohya")
FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
ADAPTER, OWN = "lora_adapter_metadata", "hasten"  # keys of the metadata
# endings of the factors: A and B of peft; of older diffusers; of kohya
ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
# of adapters that are no LoRA of this form: what they are, by a part of the key
OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "a Tucker decomposition",
    "oft_": "OFT",
    "lora_B.bias": "biases",
    ".diff": "full differences of weights",
    "glora": "GLoRA",
    "ia3": "IA3",
}


@dataclass
class LoRAFile:
    """The contents of a LoRA file.

    Args:
        components: factors by name of the layer, by component: `unet`, `transformer`, `text_encoder`, ...
        info: JSON about a student: base, base_sha256, distilled (see `Model.card`), sampler, times, steps.
        names: `diffusers`: layers have the names of modules; `kohya`: guesses, from names with `_` for dots, which
            `hasten.model.lora` compares without dots.
    """

    components: dict[str, dict[str, LowRank]]
    info: dict[str, Any] = field(default_factory=dict)
    names: str = "diffusers"

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur, ascending."""
        return sorted({one.rank for layers in self.components.values() for one in layers.values()})


def base_hash(net: nn.Module, layers: Iterable[str]) -> str:
    """sha256 of the weights of layers, by name, rounded to float16: a model and its float16 copy have the same.

    Args:
        net: the network without the LoRA.
        layers: names that it has.
    """
    modules, digest = dict(innermost(net).named_modules()), hashlib.sha256()
    for name in sorted(layers):
        weight: Tensor = modules[name].get_parameter("weight")
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(
            weight.detach().cpu().to(torch.float16).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def write_lora(lora: LoRAFile, path: str | Path, layout: str = "diffusers", half: bool = False) -> Path:
    """Write a LoRA file.

    The scale is multiplied into B, so that alpha = rank, which programs that know no alpha assume.

    Args:
        lora: what to write.
        path: the file; a folder gets a file of the name that diffusers looks for.
        layout: `diffusers` or `kohya`.
        half: factors as float16.

    Returns:
        The file.

    Raises:
        BadInput: for an unknown layout, and where it cannot be written.
    """
    from safetensors.torch import save

    check_choice("LoRA format", layout, FORMATS)
    path = Path(path)
    path = path / FILE if path.is_dir() or not path.suffix else path
    if path.suffix != ".safetensors":
        raise BadInput(f"a LoRA is a .safetensors file, got {path}")
    dtype = torch.float16 if half else torch.float32
    tensors: dict[str, Tensor] = {}
    for component, layers in lora.components.items():
        if layout == "kohya" and component not in ("unet", "text_encoder", "text_encoder_2"):
            raise BadInput(f"kohya's names are those of U-Nets and their text encoders: {component} has none")
        for name, one in layers.items():
            down, up = one.down, one.scale * one.up.float()
            if layout == "kohya":
                key = kohya_key(component, name, "text_encoder_2" in lora.components)
                tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
                tensors[f"{key}.alpha"] = torch.tensor(float(one.rank))
            else:
                key = f"{component}.{name}"
                tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    metadata = {"format": "pt"}
    if layout == "diffusers":
        adapter = {
            f"{component}.{key}": value
            for component, layers in lora.components.items()
            for key, value in adapter_config(layers).items()
        }
        metadata[ADAPTER] = json.dumps(adapter, indent=2, sort_keys=True)
    if lora.info:
        metadata[OWN] = json.dumps(lora.info, sort_keys=True)
    contents = {key: value.detach().cpu().to(dtype).contiguous() for key, value in tensors.items()}
    return write_file(check_writable(path), save(contents, metadata))


def adapter_config(layers: Mapping[str, LowRank]) -> dict[str, Any]:
    """The arguments of peft's `LoraConfig` for layers whose scale is 1."""
    ranks = [one.rank for one in layers.values()]
    rank = max(set(ranks), key=ranks.count)
    others = {f"^{name}": one.rank for name, one in layers.items() if one.rank != rank}
    patterns = {"rank_pattern": others, "alpha_pattern": others} if others else {}
    return {"r": rank, "lora_alpha": rank, "target_modules": list(layers), **patterns}


def read_lora(path: str | Path) -> LoRAFile:
    """Read a LoRA file of either layout; a folder has one of the name that diffusers gives it.

    Raises:
        BadInput: in one line, for what is no such file, or holds keys that would be left out.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise BadInput(f"no LoRA file {path}")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        adapter = json.loads(metadata.get(ADAPTER) or "{}")
        info = json.loads(metadata.get(OWN) or "{}")
    except (SafetensorError, OSError) as e:
        raise BadInput(f"{path} is no safetensors file ({' '.join(str(e).split())[:120]})") from e
    except ValueError as e:
        raise BadInput(f"the metadata of {path} are no JSON: {e}") from e
    if not isinstance(info, dict) or not isinstance(adapter, dict):
        raise BadInput(f"the metadata of {path} are no JSON objects")
    return parse_lora(tensors, adapter, info, str(path))


def parse_lora(tensors: Mapping[str, Tensor], adapter: dict[str, Any], info: dict[str, Any], path: str) -> LoRAFile:
    """The contents of a LoRA file, from its tensors and metadata; see `read_lora`."""
    refuse_others(tensors, path)
    kohya = {key for key in tensors if split_kohya(key.partition(".")[0]) is not None}
    if kohya and (rest := sorted(tensors.keys() - kohya)):
        raise BadInput(
            f"{path} mixes two formats: {min(kohya)} is a name of kohya, {rest[0]} is not; which would win is not clear"
        )
    entries: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in tensors.items():
        component, name, part = split_key(key, path)
        known = entries.setdefault((component, name), {})
        if part in known:
            raise BadInput(f"{path} has two tensors {part} of the layer {name} of the {component}")
        known[part] = value
    if not entries:
        raise BadInput(f"{path} holds no tensors")
    components: dict[str, dict[str, LowRank]] = {}
    for (component, name), parts in entries.items():
        alpha = adapter_alpha(adapter, component, name)
        components.setdefault(component, {})[name] = low_rank(parts, alpha, f"{component}.{name}", path)
    return LoRAFile(components, info, "kohya" if kohya else "diffusers")


def refuse_others(keys: Iterable[str], path: str) -> None:
    """Refuse adapters that change weights in another way, by name."""
    for key in keys:
        for part, what in OTHERS.items():
            if part in key:
                raise BadInput(f"{path} holds {what} ({key}), which hasten does not read: it reads LoRA factors alone")


def split_key(key: str, path: str) -> tuple[str, str, str]:
    """The component, the layer and which tensor of it (`down`, `up`, `alpha`) a key names."""
    ending = next((ending for ending in ENDINGS if key.endswith(ending)), None)
    stem = key.removesuffix(ending or "")
    if ending is not None and (found := split_kohya(stem)) is not None:
        return found[0], dotted(OUTSIDE.get(found[1], found[1])), ENDINGS[ending]
    component, _, name = stem.partition(".")
    for part in ("to_q", "to_k", "to_v", "to_out"):  # of older diffusers: attn1.processor.to_q_lora.down.weight
        for direction in ("down", "up"):
            if key.endswith(f".processor.{part}_lora.{direction}.weight"):
                layer = key.partition(".")[2].partition(".processor.")[0]
                return component, f"{layer}.{part}" + (".0" if part == "to_out" else ""), direction
    if ending is None or component not in COMPONENTS or not name:
        raise BadInput(
            f"{path} has the key {key}, which is of no LoRA format that hasten reads: diffusers "
            "(unet.NAME.lora_A.weight) or kohya (lora_unet_NAME.lora_down.weight)"
        )
    return component, name, ENDINGS[ending]


def low_rank(parts: Mapping[str, Tensor], alpha: float | None, layer: str, path: str) -> LowRank:
    """The factors of a layer, checked."""
    if missing := [part for part in ("down", "up") if part not in parts]:
        raise BadInput(f"{path} lacks the factor {'A' if missing[0] == 'down' else 'B'} ({missing[0]}) of {layer}")
    down, up = parts["down"], parts["up"]
    fits = down.ndim == up.ndim and down.ndim in (2, 4) and up.shape[1] == down.shape[0] and up.shape[2:].numel() == 1
    if not fits:
        raise BadInput(
            f"{path}: the factors of {layer} are {tuple(down.shape)} and {tuple(up.shape)}: no matrix product"
        )
    if down.shape[0] == 0:
        raise BadInput(f"{path}: the factors of {layer} have rank 0")
    if not (down.is_floating_point() and up.is_floating_point()):
        raise BadInput(f"{path}: the factors of {layer} are {down.dtype} and {up.dtype}, which are no real numbers")
    if not (bool(down.isfinite().all()) and bool(up.isfinite().all())):
        raise BadInput(f"{path}: the factors of {layer} hold NaN or infinity")
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise BadInput(f"{path}: alpha of {layer} has shape {tuple(parts['alpha'].shape)}, it must be one number")
        alpha = float(parts["alpha"])
    alpha = float(down.shape[0]) if alpha is None else alpha
    if not math.isfinite(alpha):
        raise BadInput(f"{path}: alpha of {layer} is {alpha}")
    return LowRank(down.float(), up.float(), alpha)


def adapter_alpha(adapter: Mapping[str, Any], component: str, layer: str) -> float | None:
    """Alpha of a layer in the metadata of diffusers; None where they do not say."""
    settings = {key.partition(".")[2]: value for key, value in adapter.items() if key.startswith(f"{component}.")}
    if settings.get("use_dora"):
        raise BadInput("the LoRA file is a DoRA by its metadata, which hasten does not read")

    def value(name: str, patterns: str) -> Any:
        for pattern, number in (settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return number
        return settings.get(name)

    alpha, rank = value("lora_alpha", "alpha_pattern"), value("r", "rank_pattern")
    if alpha is None:
        return None
    return float(alpha) * (math.sqrt(rank) if settings.get("use_rslora") and rank else 1.0)
