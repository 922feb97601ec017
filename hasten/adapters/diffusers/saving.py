"""Saving models with a network of `diffusers`: as a pipeline's folder, or as a hasten folder.

A *pipeline folder* is written by `pipe.save_pretrained`, with the model's network and a scheduler that samples as the
model does, and hasten's model.json beside it: both diffusers and hasten load it. The scheduler is a class of diffusers
where one takes exactly the model's steps (`stock_scheduler`), else hasten's `PlanScheduler`, for which the process must
have imported hasten before diffusers loads the folder.

What no class of diffusers can express is saved as a *hasten folder*: a network with added inputs (guidance, steps),
integer layers, an encoder of images, a prediction that diffusers does not have. Only hasten loads it.
"""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import zoo
from ...errors import BadInput
from ...nets.quantized import layers
from ...schedules.discrete import Discrete
from ..model_like import ModelLike
from .library import diffusers, without_loading_bars
from .schedules import PREDICTIONS, FlowDenoiser
from .shared_components import ENTRY, drop_shared
from .split_network import SplitNetwork

DECODER = "decoder"


def fits_pipeline(model: ModelLike, network: bool = True) -> bool:
    """Whether the model can be saved as the folder of its pipeline.

    Args:
        model: to save.
        network: its network stays one of diffusers.
    """
    denoiser = model.denoiser
    expressible = isinstance(denoiser, FlowDenoiser) or (
        denoiser.clock == "index" and isinstance(denoiser.schedule, Discrete)
    )
    return (
        network
        and model.pipeline is not None
        and isinstance(denoiser.net, SplitNetwork)
        and next(layers(denoiser.net), None) is None
        and expressible
        and denoiser.prediction.name in PREDICTIONS.values()
        and model.card.get("distilled", {}).get("figures", {}).get("direction") != "encode"
    )


def save_pipeline(
    model: ModelLike, folder: Path, components_from: str | Path | None = None, final: Path | None = None
) -> dict[str, Any]:
    """Write the pipeline with the model's network and scheduler.

    Args:
        model: to save.
        folder: to write.
        components_from: a pipeline whose components are not written again (`drop_shared`).
        final: where the folder will be. Default: `folder`.

    Returns:
        `net` and `file` (of the weights) for model.json, and `components_from` where that is given.
    """
    from .library import network_of

    slot, _ = network_of(model.pipeline)
    net = model.denoiser.net
    pipe = copy.copy(model.pipeline)  # which shares its components; setattr on it leaves the original unchanged
    setattr(pipe, slot, net.net)
    pipe.scheduler = scheduler_of(model)
    with without_loading_bars():
        pipe.save_pretrained(str(folder), max_shard_size="1000GB")
    shared = {}
    if components_from is not None:
        shared = {ENTRY: drop_shared(folder, components_from, (slot, "scheduler"), final or folder)}
    (folder / "README.md").write_text(readme(model, pipe, shared.get(ENTRY)))
    files = sorted((folder / slot).glob("*.safetensors"))
    if len(files) != 1:
        raise BadInput(f"{type(pipe).__name__}.save_pretrained wrote {len(files)} files of weights in {slot}, not one")
    kind = {"class": type(net.net).__name__, "library": "diffusers", "slot": slot}
    return {"net": kind, "file": f"{slot}/{files[0].name}", **shared}


def save_decoder(model: ModelLike, folder: Path) -> None:
    """Write the image decoder of a latent model beside its network."""
    if model.decoder is not None:
        model.decoder.vae.save_pretrained(str(folder / DECODER))


def open_decoder(folder: Path) -> Any:
    """The image decoder that `save_decoder` wrote, None where there is none."""
    from .conditions import Latents

    if not (folder / DECODER / "config.json").is_file():
        return None
    name = json.loads((folder / DECODER / "config.json").read_text()).get("_class_name")
    kind: Any = getattr(diffusers(), str(name), None)
    if not issubclass(kind if inspect.isclass(kind) else object, diffusers().ModelMixin):
        raise BadInput(f"{folder / DECODER} holds a {name}, which diffusers does not have")
    return Latents(kind.from_pretrained(str(folder / DECODER)).eval().requires_grad_(False))


def scheduler_of(model: ModelLike) -> Any:
    """A scheduler that samples as the model does: of diffusers, of hasten, or, where neither can, the pipeline's.

    A model whose recommended method is unchanged since it was loaded has the pipeline's.
    """
    from .scheduler import as_scheduler

    changed = model.plan is not None or "distilled" in model.card
    if not changed:
        return model.pipeline.scheduler
    if (stock := stock_scheduler(model)) is not None:
        return stock
    try:
        if model.plan is not None:
            return as_scheduler(model.plan, like=model)
        return as_scheduler(model.sampler, model.times, like=model)
    except BadInput:
        if "distilled" in model.card:
            raise
        return model.pipeline.scheduler  # the network is unchanged, so its scheduler fits


def stock_scheduler(model: ModelLike) -> Any:
    """A scheduler of diffusers whose steps are exactly those of the model's plan, None where there is none.

    On the trailing grid of n steps, where n divides the table's length: DDIMScheduler for DDIM, DDPMScheduler for DDPM
    with the small variance, LCMScheduler for the multistep consistency sampler. Any plan of one step is DDIM's.
    """
    plan, denoiser, library = model.plan, model.denoiser, diffusers()
    theirs = {ours: name for name, ours in PREDICTIONS.items()}.get(denoiser.prediction.name)
    table = denoiser.schedule
    if plan is None or not isinstance(table, Discrete) or theirs not in ("epsilon", "v_prediction", "sample"):
        return None
    config: Any = denoiser.net.config
    if config.out_channels not in (None, config.in_channels) and hasattr(model.pipeline, "unet"):
        return None  # a learned variance, which only the DiT pipeline removes before the scheduler
    size, n = len(table.alphas_cumprod), plan.nfe
    trailing = torch.arange(size, 0, -size / n, dtype=torch.float64)[:n] - 1
    own = plan.basis is not None or plan.branches is not None
    if size % n or n == size or own or float(plan.times[-1]) != 0 or len(plan.times) != n + 1:
        return None
    if not torch.allclose(table.index(plan.times[:-1]), trailing, atol=1e-6):
        return None
    name = sampler_name(model)
    if name is None:
        return None
    common: dict[str, Any] = {
        **table_config(model),
        "prediction_type": theirs,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "thresholding": False,
        "steps_offset": 1,  # not used by this spacing, but some pipelines warn about 0
    }
    if name == "DDIMScheduler":
        scheduler = library.DDIMScheduler(**common, set_alpha_to_one=True)
    elif name == "LCMScheduler":
        common.pop("timestep_spacing")  # its own grid is the trailing one
        common |= {"original_inference_steps": n, "timestep_scaling": 1e8}
        scheduler = library.LCMScheduler(**common, set_alpha_to_one=True)
    else:
        scheduler = library.DDPMScheduler(**common, variance_type="fixed_small")
    same = torch.allclose(scheduler.alphas_cumprod.double(), torch.tensor(table.alphas_cumprod).double(), atol=1e-6)
    return scheduler if same else None


def sampler_name(model: ModelLike) -> str | None:
    """The class of diffusers that takes the steps of the model's plan on its times, found by comparing plans."""
    from ...pick import pick
    from ...plan.table import plan as compile_plan

    plan = model.plan
    assert plan is not None
    for spec, name in (("ddim", "DDIMScheduler"), ("consistency", "LCMScheduler"), ("ddpm", "DDPMScheduler")):
        other = compile_plan(pick("samplers", spec), model.denoiser.schedule, plan.times)
        pairs = [(getattr(plan, key), getattr(other, key)) for key in ("start", "a", "A", "B", "C")]
        if all(one.shape == two.shape and torch.allclose(one, two, atol=1e-7) for one, two in pairs):
            return name
    return None


def table_config(model: ModelLike) -> dict[str, Any]:
    """Config of a scheduler of diffusers with the table of the model's schedule: the pipeline's own, or betas."""
    table: Any = model.denoiser.schedule
    theirs = dict(model.pipeline.scheduler.config)
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    known: Any = {key: theirs[key] for key in keys if theirs.get(key) is not None}
    known |= {"rescale_betas_zero_snr": True} if theirs.get("rescale_betas_zero_snr") else {}
    expected: Tensor = torch.tensor(table.alphas_cumprod, dtype=torch.float64)
    try:
        same = torch.allclose(diffusers().DDPMScheduler(**known).alphas_cumprod.double(), expected, atol=1e-7)
    except (TypeError, ValueError, NotImplementedError):
        same = False
    if same:
        return known
    before = torch.cat([torch.ones(1, dtype=torch.float64), expected[:-1]])
    return {"num_train_timesteps": len(expected), "trained_betas": (1 - expected / before).tolist()}


def readme(model: ModelLike, pipe: Any, shared: dict[str, Any] | None = None) -> str:
    """The README.md of a pipeline folder, which may take components from another one."""
    lines = [f"# {model.name}", "", str(model.card.get("summary", f"A {type(pipe).__name__}, saved by hasten.")), ""]
    steps = model.plan.nfe if model.plan is not None else model.steps
    scheduler = type(pipe.scheduler).__name__ == "PlanScheduler"
    network = type(model.denoiser.net.net).__module__.startswith("hasten")  # MobileUNet2DConditionModel
    ours = " and ".join(["its network"] * network + ["its scheduler"] * scheduler)
    lines += ["With diffusers:", "", "```python", *([f"import hasten  # {ours}"] if ours else [])]
    half = getattr(getattr(pipe, "text_encoder", None), "dtype", torch.float32)
    dtype = "" if half == torch.float32 else f", torch_dtype={half}"  # else diffusers mixes the dtypes of its parts
    lines += ["import torch"] if dtype else []
    lines += ["from diffusers import DiffusionPipeline", ""]
    if shared is None:
        lines += [f"pipe = DiffusionPipeline.from_pretrained(FOLDER{dtype})"]
    else:
        rest = ", ".join(f"{name}=base.{name}" for name in shared["files"])
        bundled = (
            "of 'hasten models --path " + shared["model"] + "'" if shared["model"] in zoo.cards() else shared["model"]
        )
        lines += [f"base = DiffusionPipeline.from_pretrained(BASE{dtype})  # {bundled}"]
        lines += [f"pipe = DiffusionPipeline.from_pretrained(FOLDER, {rest}{dtype})"]
    alone = "guidance_scale" in inspect.signature(type(pipe).__call__).parameters and "distilled" in model.card
    low, high = model.denoiser.guidance_range or (1.0, 1.0)
    takes = low < high  # the scale is an input of the network, which the pipeline passes on
    more = f", guidance_scale={model.guidance_scale if takes else 1:g}" if alone else ""
    lines += [f"images = pipe(..., num_inference_steps={steps}{more}).images", "```", ""]
    if alone and takes:
        lines += [f"Guidance scales from {low:g} to {high:g}: its network reads them, in one evaluation a step.", ""]
    elif alone:
        lines += [
            f"Guidance with scale {low:g} is built in, so `guidance_scale=1` (no guidance) must be passed: the "
            "pipeline's default would add its own.",
            "",
        ]
    lines += ["With hasten: `hasten sample FOLDER`, or `hasten.load(FOLDER).sample(4)`.", ""]
    return "\n".join(lines)
