"""Pipelines of `diffusers` as models of hasten."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import BadInput
from .components import prompts_and_decoder
from .library import INDEX, diffusers, is_pipeline, network_of, without_expected_messages, without_loading_bars
from .loadable import check_loadable, needs_image
from .network import check_offloading, separate_unhooked, warn_of_compiled
from .schedules import mu_of, read_scheduler
from .shared_components import open_components
from .split_blocks import SplitBlocks
from .split_network import SplitNetwork
from .wrap import split_network

if TYPE_CHECKING:
    from ...model.model import Model

__all__ = ["load_pipeline", "model_of_pipeline", "open_pipeline", "open_saved"]


def load_pipeline(pipe: Any, name: str | None = None, device: str | torch.device | None = None) -> Model:
    """A pipeline of `diffusers` as a `Model`.

    The model has the pipeline's network with split points, its schedule, prompts or classes, image decoder and
    guidance; the weights are shared. Of the scheduler only the table, or the shift of a flow, is used, not its steps or
    its clipping of x0: `times_like(pipe.scheduler, steps)` are its times. A text-to-image model takes prompts:
    `model.sample(4, "a photo of a cat")`; a guidance scale of 1 or less is no guidance, as in pipelines. Image-to-image
    and inpainting pipelines sample from noise alone. A flow whose shift depends on the image size has that of the
    network's own size.

    Args:
        pipe: the pipeline, its folder or its hub id.
        name: of the model. Default: the pipeline's.
        device: Default: where the pipeline is; the CPU for one that is opened.

    Returns:
        The model.

    Raises:
        BadInput: for a network without split points (`hasten.adapters.diffusers.split_network`), a pipeline that is
            more than a network with prompts or classes and a decoder (a ControlNet, an adapter, an image as a
            condition), one without its text encoders, a scheduler whose times are not supported, or, without `device`,
            for a pipeline that moves its weights to another device to run (`enable_model_cpu_offload`).
    """
    if isinstance(pipe, (str, Path)):
        pipe, device = open_pipeline(pipe), device or "cpu"
    if not is_pipeline(pipe):
        raise BadInput(f"load takes a name, a folder or a pipeline of diffusers, found {type(pipe).__name__}")
    slot, net = network_of(pipe)
    if device is None:
        check_offloading(net, type(pipe).__name__)
    model = model_of_pipeline(pipe, name)
    warn_of_compiled(getattr(pipe, slot), slot, 3)
    return model if device is None else model.to(device)


def model_of_pipeline(pipe: Any, name: str | None = None) -> Model:
    """`load_pipeline` of a pipeline, where its weights are."""
    from ...model.model import Model

    slot, net = network_of(pipe)
    split = split_network(separate_unhooked(net))
    if isinstance(split, SplitBlocks):
        raise BadInput(
            f"load does not know what the {slot} of {type(pipe).__name__}, a {type(net).__name__}, takes: use the "
            "pipeline itself, with hasten.as_scheduler(...) or hasten.accelerate(pipe, ...)"
        )
    config: Any = net.config
    channels = int(config.out_channels or config.in_channels)
    if channels not in (config.in_channels, 2 * config.in_channels):
        raise needs_image(slot, config.in_channels, channels)
    check_loadable(pipe, slot, net)
    side = config.sample_size
    if side is None:
        raise BadInput(f"the {slot} has no sample_size: the shape of its samples is unknown")
    height, width = (side, side) if isinstance(side, int) else side
    patch = int(config.get("patch_size") or 1)
    spec = read_scheduler(pipe.scheduler, mu=mu_of(pipe.scheduler, (height // patch) * (width // patch)))
    prompts, decoder = prompts_and_decoder(pipe, height, width)
    denoiser = spec.denoiser(split).eval()
    classes = None if prompts is not None else classes_of(pipe, split)
    guidable = prompts is not None or denoiser.null_label is not None
    default = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    card = {
        "pipeline": type(pipe).__name__,
        "network": type(net).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "parameters": sum(p.numel() for p in net.parameters()),
    }
    return Model(
        denoiser,
        name or Path(str(pipe.config.get("_name_or_path") or type(pipe).__name__)).name,
        (int(config.in_channels), int(height), int(width)),
        classes=classes,
        codec="image" if decoder is None else "latent",
        steps=20,
        guidance_scale=float(default.default) if default is not None and guidable else 1.0,
        card=card,
        conditioning=prompts,
        decoder=decoder,
        pipeline=pipe,
    )


def classes_of(pipe: Any, net: SplitNetwork) -> tuple[str, ...] | None:
    """The class names of a pipeline, the first name of each class, or their numbers; None without classes."""
    config = net.config
    count = config.get("num_class_embeds") or getattr(net, "null_label", None)
    if not count or config.get("class_embed_type"):
        return None
    names = pipe.config.get("id2label") or {}
    for name, k in (getattr(pipe, "labels", None) or {}).items():  # all names of a class, sorted by name
        names = names if k in names or str(k) in names else {**names, k: name}
    first = [str(names.get(k, names.get(str(k), k))).split(",")[0].strip() for k in range(count)]
    return tuple(name if first.count(name) == 1 else f"{name} ({k})" for k, name in enumerate(first))


def open_saved(folder: Path) -> Model:
    """The model of a pipeline folder, without the additions of its model.json."""
    from .pipelines import load_pipeline, open_pipeline

    return load_pipeline(open_pipeline(folder), name=folder.name)


def open_pipeline(name: str | Path) -> Any:
    """The pipeline in a folder with a model_index.json, or of a hub id.

    Raises:
        BadInput: in one line, where diffusers cannot load it.
    """
    library = diffusers()
    from .. import _scheduler  # noqa: F401  which pipelines with a PlanScheduler may name, and must be imported

    components = open_components(Path(name))
    try:
        with without_loading_bars(), without_expected_messages():
            return library.DiffusionPipeline.from_pretrained(str(name), **components)
    except Exception as error:  # of many kinds: the network, the files, missing packages
        message = " ".join(str(error).split()).split(". ")[0]
        where = "" if (Path(name) / INDEX).is_file() else " (if you are offline, give the folder of a pipeline)"
        raise BadInput(f"diffusers cannot load {name}: {message[:200]}{where}") from error
