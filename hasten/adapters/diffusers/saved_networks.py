"""Descriptions of networks of `diffusers` in model.json."""

from __future__ import annotations

import json
from typing import Any

import torch

from ...errors import BadInput
from ...nets.quantized import layers
from .library import diffusers
from .split_network import SplitNetwork
from .text_unet_class import text_unet_class
from .wrap import split_network


def network_refusal(net: Any) -> str | None:
    """Why the network of a `SplitNetwork` cannot be built again from its config; None where it can."""
    name = type(net.net).__name__
    if network_class(name) is not type(net.net):
        return f"its network is a {name} that diffusers {diffusers().__version__} does not have under that name"
    try:
        config = network_config(net)["config"]
    except (TypeError, ValueError) as e:
        return f"the config of its {name} cannot be written as JSON ({e})"
    with torch.device("meta"):
        before, after = net.net.state_dict(), type(net.net).from_config(config).state_dict()
    different = sorted(set(before) ^ set(after)) or [k for k, w in before.items() if w.shape != after[k].shape]
    if different and next(layers(net), None) is None:
        return (
            f"its {name} has other tensors than its config describes, first {different[0]}: merge or unload adapters "
            "(pipe.fuse_lora(), pipe.unload_lora_weights()) and undo fused projections first"
        )
    return None


def network_class(name: str) -> Any:
    """The class of this name of diffusers, or hasten's class of networks for its pipelines; None: there is none."""
    library = diffusers()
    return text_unet_class() if name == "MobileUNet2DConditionModel" else getattr(library, name, None)


def network_config(net: Any) -> dict[str, Any]:
    """The description of a network of diffusers in model.json."""
    config = {key: value for key, value in json.loads(net.net.to_json_string()).items() if not key.startswith("_")}
    description = {"class": type(net.net).__name__, "library": "diffusers", "config": config}
    return description | ({"whole": True} if net.with_variance else {})


def network_from(description: dict[str, Any]) -> SplitNetwork:
    """The network of a description by `network_config`, with random weights.

    Raises:
        BadInput: for a class without split points.
    """
    from . import transformers as _transformers
    from . import unets as _unets

    name, known = description["class"], {**_unets.KINDS, **_transformers.KINDS}
    kind = network_class(str(name))
    if name not in known or kind is None:
        raise BadInput(f"unknown network {name!r} of diffusers: known are {', '.join(known)}")
    return split_network(kind.from_config(description["config"]), bool(description.get("whole", False)))
