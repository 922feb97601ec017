"""Pipelines whose network is in integers, saved and opened: `save_pretrained` and `hasten.open_quantized`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...errors import BadInput
from ...files import sha256, temporary_path
from ...nets.quantized import layers
from ...nets.time_groups import TimeGroups
from ...pick import format_spec
from ...storage.model_folder import DESCRIPTION, SCHEMA, WEIGHTS
from ...storage.weights import describe_network, load_weights, network_from_description, write_weights
from ...utils.random import preserve_rng_state
from .accelerated import Accelerated
from .accelerator_list import parse_accelerators
from .arguments import check_count
from .components import inner_network, open_components, save_components
from .library import network_of

__all__ = ["open_quantized", "save_quantized"]


def save_quantized(pipe: Any, folder: str | Path) -> None:
    """Write a pipeline with its network in integers, and the other components as diffusers writes them.

    Args:
        pipe: of `hasten.accelerate(pipe, "quantize", ...)`.
        folder: to write; a new or an empty one.

    Raises:
        BadInput: for a network with other tensors than its config describes (LoRA layers, an IP-Adapter), and for a
            folder with files.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder} exists: save the quantised pipeline in a new folder")
    slot, net = network_of(pipe)
    forward = vars(net)["accelerated_forward"]
    holder = forward.source.net
    with forward.layers.exchanged():
        if next(layers(holder), None) is None:
            found = " and ".join(map(format_spec, forward.swapping)) or "no accelerator"
            raise BadInput(f"only integer layers of quantize can be saved, found those of {found}")
        description = describe_network(holder)
        with torch.device("meta"):
            plain = network_from_description({k: v for k, v in description.items() if k != "quantized"})
        integers = tuple(f"{at}." for at, _ in layers(holder))
        names = [{key for key in net.state_dict() if not key.startswith(integers)} for net in (holder, plain)]
        if different := sorted(names[0] ^ names[1]):
            raise BadInput(
                f"this {type(net).__name__} has other tensors than its config describes, first {different[0]}: fuse "
                "LoRAs (pipe.fuse_lora(), pipe.unload_lora_weights()) before it is quantised; an IP-Adapter cannot be "
                "saved with it"
            )
        scratch = temporary_path(folder)
        try:
            scratch.mkdir(parents=True)
            write_weights(holder, scratch / WEIGHTS)
            entry = save_components(pipe, slot, scratch)
            record = {
                "schema": SCHEMA,
                "name": folder.resolve().name,
                "net": description,
                "pipeline": entry,
                "weights": {"file": WEIGHTS, "sha256": sha256(scratch / WEIGHTS)},
                "card": {"quantized": {"method": " and ".join(map(format_spec, forward.swapping))}},
                "hasten": __version__,
            }
            (scratch / DESCRIPTION).write_text(json.dumps(record, indent=2) + "\n")
            if folder.exists():
                folder.rmdir()
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@preserve_rng_state()  # the initialisation of an empty network draws random numbers
def open_quantized(folder: str | Path, accelerators: Any = (), steps: int | None = None) -> Any:
    """The pipeline of a folder that `hasten quantize` or `save_pretrained` of a quantised pipeline wrote.

    Args:
        folder: of the pipeline.
        accelerators: further ones, such as "deep_cache:every=3", see `hasten.accelerate`.
        steps: of the samplings to come, for them. Default: 50.

    Returns:
        A pipeline of diffusers, as `hasten.accelerate` returns it.

    Raises:
        BadInput: where the folder holds no quantised pipeline, or a file is missing or damaged.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        description, entry, weights = record["net"], record["pipeline"], record["weights"]
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {folder / DESCRIPTION}: {error}") from error
    except (KeyError, TypeError) as error:
        raise BadInput(f"{folder} holds no quantised pipeline: its {DESCRIPTION} lacks {error}") from error
    holder = network_from_description(description)
    if next(layers(holder), None) is None:
        raise BadInput(f"{folder} holds no quantised pipeline: its network has no integer layers")
    load_weights(holder, folder / weights["file"], str(weights["sha256"]))
    holder.eval().requires_grad_(False)
    net = inner_network(holder)
    pipe = open_components(folder, entry, net)
    bounds = holder.bounds if isinstance(holder, TimeGroups) else None
    methods, count = parse_accelerators(accelerators), 50 if steps is None else check_count("steps", steps)
    return Accelerated.wrap_pipeline(pipe, entry["slot"], net, methods, count, 0, None, bounds)
