"""The other components of a pipeline whose network is in integers: saved beside the network, and opened with it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import BadInput
from .conditions import Latents, Prompts
from .library import INDEX, diffusers, without_expected_messages, without_loading_bars

__all__ = ["COMPONENTS", "inner_network", "open_components", "prompts_and_decoder", "save_components"]

COMPONENTS = "pipeline"  # their folder in a model folder


@contextmanager
def without_missing_network(slot: str) -> Iterator[None]:
    """Within the block diffusers does not report that a pipeline's network is not there."""

    def other(record: logging.LogRecord) -> bool:
        return f"self.{slot}=None" not in record.getMessage()

    log = logging.getLogger("diffusers.pipelines.pipeline_utils")
    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


def save_components(pipe: Any, slot: str, folder: Path) -> dict[str, str]:
    """Write a pipeline without its network, which no folder of diffusers could hold.

    Args:
        pipe: the pipeline, left unchanged.
        slot: of the network.
        folder: of the model.

    Returns:
        The entry `pipeline` of model.json.
    """
    rest = copy.copy(pipe)
    vars(rest).pop("save_pretrained", None)
    setattr(rest, slot, None)  # in the copy's config too
    with without_loading_bars(), without_missing_network(slot):
        type(rest).save_pretrained(rest, str(folder / COMPONENTS), max_shard_size="1000GB")
    return {"folder": COMPONENTS, "slot": slot}


def open_components(folder: Path, entry: dict[str, str], net: nn.Module) -> Any:
    """The pipeline that `save_components` wrote, with a network.

    Args:
        folder: of the model.
        entry: `pipeline` of model.json.
        net: the network, of a class of diffusers.

    Raises:
        BadInput: in one line, where diffusers cannot load it.
    """
    rest = folder / str(entry["folder"])
    if ".." in Path(entry["folder"]).parts or not (rest / INDEX).is_file():
        raise BadInput(f"{rest / INDEX} is missing: model.json names it")
    try:
        with without_loading_bars(), without_expected_messages():
            return diffusers().DiffusionPipeline.from_pretrained(str(rest), **{entry["slot"]: net})
    except Exception as error:  # of many kinds: files, missing packages
        message = " ".join(str(error).split()).split(". ")[0]
        raise BadInput(f"diffusers cannot load {rest}: {message[:200]}") from error


def prompts_and_decoder(pipe: Any, height: int, width: int) -> tuple[Prompts | None, Latents | None]:
    """The text conditions and the image autoencoder of a pipeline, None where it has none.

    Args:
        pipe: the pipeline.
        height: of a sample of its network.
        width: of the same.
    """
    vae = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    factor = 1 if vae is None else getattr(pipe, "vae_scale_factor", 2 ** (len(vae.config.block_out_channels) - 1))
    prompts = Prompts(pipe, (height * factor, width * factor)) if hasattr(pipe, "encode_prompt") else None
    return prompts, None if vae is None else Latents(vae)


def inner_network(net: Any) -> Any:
    """The network of diffusers inside hasten's wrappers (time groups, split points)."""
    while isinstance(getattr(net, "net", None), nn.Module):
        net = net.net
    return net
