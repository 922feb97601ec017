"""Pipelines of `diffusers` as models of hasten."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import BadInput
from .conditions import Latents, Prompts
from .library import INDEX, diffusers, is_pipeline, network_of, without_loading_bars
from .loadable import check_loadable, wants_image
from .network import separate_unhooked
from .schedules import mu_of, read_scheduler
from .split_network import SplitNetwork
from .wrap import split_network

if TYPE_CHECKING:
    from ...model.model import Model

__all__ = ["load_pipeline", "open_pipeline", "open_saved"]


def load_pipeline(pipe: Any, name: str | None = None, device: str | torch.device | None = None) -> Model:
    """A pipeline, itself or by its folder or hub id, as a `Model`.

    Its network with seams, its schedule, prompts or classes, image decoder and guidance; the weights are the
    pipeline's own. Of the scheduler only the table, or the shift of a flow, is used, not its steps, nor its clipping of
    x0: `times_like(pipe.scheduler, steps)` are the times that it would visit. A model of prompts takes them where
    others take labels: `model.sample(4, "a photo of a cat")`; a guidance scale of 1 or less is none, as in pipelines.
    Image-to-image and inpainting pipelines are loaded as what they draw from noise alone. A flow whose shift depends on
    the size of the image has that of the network's own size.

    Raises BadInput for a network that has no seams (`hasten.adapters.diffusers.split_network`), a pipeline that is more than a
    network with prompts or classes and a decoder (a ControlNet, an adapter, an image as a condition), one without its
    text encoders, or a scheduler whose times mean nothing to hasten.
    """
    from ...model.model import Model

    if isinstance(pipe, (str, Path)):
        pipe, device = open_pipeline(pipe), device or "cpu"
    if not is_pipeline(pipe):
        raise BadInput(f"load takes a name, a folder or a pipeline of diffusers, found {type(pipe).__name__}")
    slot, net = network_of(pipe)
    seams, config = split_network(separate_unhooked(net)), net.config
    made = int(config.out_channels or config.in_channels)
    if made not in (config.in_channels, 2 * config.in_channels):
        raise wants_image(slot, config.in_channels, made)
    check_loadable(pipe, slot, net)
    side = config.sample_size
    if side is None:
        raise BadInput(f"the {slot} does not say its sample_size: hasten cannot tell the shape of its samples")
    height, width = (side, side) if isinstance(side, int) else side
    patch = int(config.get("patch_size") or 1)
    read = read_scheduler(pipe.scheduler, mu=mu_of(pipe.scheduler, (height // patch) * (width // patch)))
    vae = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    factor = 1 if vae is None else getattr(pipe, "vae_scale_factor", 2 ** (len(vae.config.block_out_channels) - 1))
    prompts = Prompts(pipe, (height * factor, width * factor)) if hasattr(pipe, "encode_prompt") else None
    denoiser = read.denoiser(seams).eval()
    classes = None if prompts is not None else classes_of(pipe, seams)
    guidable = prompts is not None or denoiser.null_label is not None
    default = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    card = {
        "pipeline": type(pipe).__name__, "network": type(net).__name__, "scheduler": type(pipe.scheduler).__name__,
        "parameters": sum(p.numel() for p in net.parameters()),
    }  # fmt: skip
    model = Model(
        denoiser,
        name or Path(str(pipe.config.get("_name_or_path") or type(pipe).__name__)).name,
        (int(config.in_channels), int(height), int(width)),
        classes=classes,
        codec="image" if vae is None else "latent",
        steps=20,
        guidance_scale=float(default.default) if default is not None and guidable else 1.0,
        card=card,
        conditioning=prompts,
        decoder=None if vae is None else Latents(vae),
        pipeline=pipe,
    )
    return model if device is None else model.to(device)


def classes_of(pipe: Any, seams: SplitNetwork) -> tuple[str, ...] | None:
    """Names of the classes that the network is told, the first name of each, where the pipeline has names."""
    config = seams.config
    count = config.get("num_class_embeds") or getattr(seams, "null_label", None)
    if not count or config.get("class_embed_type"):
        return None
    names = pipe.config.get("id2label") or {}
    for name, k in (getattr(pipe, "labels", None) or {}).items():  # all names of a class, sorted by name
        names = names if k in names or str(k) in names else {**names, k: name}
    given = [str(names.get(k, names.get(str(k), k))).split(",")[0].strip() for k in range(count)]
    return tuple(name if given.count(name) == 1 else f"{name} ({k})" for k, name in enumerate(given))


def open_saved(folder: Path) -> Model:
    """The model of a pipeline folder, without what model.json adds to it."""
    from .pipelines import load_pipeline, open_pipeline

    return load_pipeline(open_pipeline(folder), name=folder.name)


def open_pipeline(name: str | Path) -> Any:
    """The pipeline in a folder with a model_index.json, or of a hub id. Raises BadInput in one line."""
    library = diffusers()
    from . import scheduler_class  # noqa: F401  diffusers looks it up in the pipelines that hold one

    try:
        with without_loading_bars():
            return library.DiffusionPipeline.from_pretrained(str(name))
    except Exception as error:  # of many kinds: the network, the files, missing packages
        said = " ".join(str(error).split()).split(". ")[0]
        where = "" if (Path(name) / INDEX).is_file() else " (if you are offline, give the folder of a pipeline)"
        raise BadInput(f"diffusers cannot load {name}: {said[:200]}{where}") from error
