"""`diffusers`, both ways: pipelines as models of hasten, samplers of hasten as schedulers, accelerated pipelines."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...accelerators import EXCHANGE
from ...denoiser import Denoiser
from ...errors import BadInput
from ...pick import spell
from ...plan.table import Plan
from ...schedules.base import Schedule
from ...schedules.continuous import Flow
from ...schedules.discrete import Discrete
from ...schedules.serialize import schedule_from_dict
from ...times import Explicit
from .accelerated import Accelerated
from .arguments import count_of
from .conditions import Latents, Prompts
from .loadable import check_loadable, wants_image
from .network import loadable, uncompiled
from .optional import diffusers, without_loading_bars
from .schedules import PREDICTIONS, FlowDenoiser, alike, mu_of, reading, times_like
from .seams import Seams
from .wrap import with_seams

if TYPE_CHECKING:
    from ...model.model import Model

__all__ = [
    "accelerate",
    "accelerate_pipeline",
    "as_scheduler",
    "is_pipeline",
    "load_pipeline",
    "open_pipeline",
    "times_like",
]

INDEX = "model_index.json"
TABLE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type", "shift", "use_flow_sigmas", "flow_shift", "use_dynamic_shifting", "time_shift_type",
    "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "original_inference_steps",
)  # fmt: skip
THRESHOLDING = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")


def is_pipeline(thing: Any) -> bool:
    """Whether a thing is a pipeline of `diffusers` (which is not imported to find out)."""
    return any(kind.__name__ == "DiffusionPipeline" for kind in type(thing).__mro__)


def open_pipeline(name: str | Path) -> Any:
    """The pipeline in a folder with a model_index.json, or of a hub id. Raises BadInput in one line."""
    library = diffusers()
    from . import scheduler_class as _scheduler  # noqa: F401  diffusers names it in the pipelines that hold one, and does not import it

    try:
        with without_loading_bars():
            return library.DiffusionPipeline.from_pretrained(str(name))
    except Exception as error:  # of many kinds: the network, the files, missing packages
        said = " ".join(str(error).split()).split(". ")[0]
        where = "" if (Path(name) / INDEX).is_file() else " (if you are offline, give the folder of a pipeline)"
        raise BadInput(f"diffusers cannot load {name}: {said[:200]}{where}") from error


def load_pipeline(pipe: Any, name: str | None = None, device: str | torch.device | None = None) -> Model:
    """A pipeline, itself or by its folder or hub id, as a `Model`.

    Its network with seams, its schedule, prompts or classes, image decoder and guidance; the weights are the
    pipeline's own. Of the scheduler only the table, or the shift of a flow, is used, not its steps, nor its clipping of
    x0: `times_like(pipe.scheduler, steps)` are the times that it would visit. A model of prompts takes them where
    others take labels: `model.sample(4, "a photo of a cat")`; a guidance scale of 1 or less is none, as in pipelines.
    Image-to-image and inpainting pipelines are loaded as what they draw from noise alone. A flow whose shift depends on
    the size of the image has that of the network's own size.

    Raises BadInput for a network that has no seams (`hasten.adapters.diffusers.seams`), a pipeline that is more than a
    network with prompts or classes and a decoder (a ControlNet, an adapter, an image as a condition), one without its
    text encoders, or a scheduler whose times mean nothing to hasten.
    """
    from ...model.model import Model

    if isinstance(pipe, (str, Path)):
        pipe, device = open_pipeline(pipe), device or "cpu"
    if not is_pipeline(pipe):
        raise BadInput(f"load takes a name, a folder or a pipeline of diffusers, found {type(pipe).__name__}")
    slot, net = network_of(pipe)
    seams, config = with_seams(loadable(net)), net.config
    made = int(config.out_channels or config.in_channels)
    if made not in (config.in_channels, 2 * config.in_channels):
        raise wants_image(slot, config.in_channels, made)
    check_loadable(pipe, slot, net)
    side = config.sample_size
    if side is None:
        raise BadInput(f"the {slot} does not say its sample_size: hasten cannot tell the shape of its samples")
    height, width = (side, side) if isinstance(side, int) else side
    patch = int(config.get("patch_size") or 1)
    read = reading(pipe.scheduler, mu=mu_of(pipe.scheduler, (height // patch) * (width // patch)))
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


def network_of(pipe: Any) -> tuple[str, nn.Module]:
    """The slot of a pipeline that holds its network, and the network, the one inside of `torch.compile`'s."""
    for slot in ("unet", "transformer"):
        if isinstance(net := getattr(pipe, slot, None), nn.Module):
            return slot, uncompiled(net)
    raise BadInput(f"{type(pipe).__name__} has neither a unet nor a transformer")


def classes_of(pipe: Any, seams: Seams) -> tuple[str, ...] | None:
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


def as_scheduler(
    method: Plan | Any,
    times: Any = None,
    like: Any = None,
    prediction: str | None = None,
    clip: float | bool | None = None,
) -> Any:
    """A scheduler of `diffusers` that runs a sampler or a plan of hasten inside an unmodified pipeline.

        pipe.scheduler = hasten.as_scheduler("unipc:order=3", times="angle", like=pipe)
        pipe("a photo of a cat", num_inference_steps=8)

    It takes exactly the steps it is asked for, at fractional network times, with a generator for each sample if the
    pipeline is given a list; `save_pretrained`, `from_pretrained` and `from_config` work. A process that opens such a
    pipeline's folder must have imported hasten (`import hasten`) before it calls `from_pretrained`.

    Args:
        method: a linear sampler, as an object or a text; or a `Plan`, as an object or a .json file.
        times: a time grid, as an object, a text, or the times themselves (steps + 1, from noise to the end); by
            default "angle". A plan has its own.
        like: what the network was made for: a pipeline, a scheduler, a scheduler's config, or a `Model` or `Denoiser`.
            May be left out with a plan, given `prediction`.
        prediction: "eps", "v", "x0" or "flow", in place of what `like` says.
        clip: hold x0 to [-clip, clip], for networks of pixels; None: as `like` does, which may also have dynamic
            thresholding; False: not. The whole step is made from the held x0, as DDIMScheduler does with
            `use_clipped_model_output=True` (and not without it): where x0 is never beyond, the two agree.

    A flow whose shift depends on the size of the image (`use_dynamic_shifting`) takes it from the pipeline. What
    pipelines give to `set_timesteps` and `step` beside is taken, or refused by name.
    """
    from .scheduler_class import scheduler_class

    kind, config = scheduler_class(), described(like)
    if not isinstance(method, (str, Path, Plan)) and (isinstance(method, type) or not is_dataclass(method)):
        raise BadInput(f"as_scheduler takes a sampler, as an object or a text, or a Plan, found {method!r}")
    if isinstance(method, (str, Path)) and str(method).endswith(".json"):
        try:
            method = Plan.from_json(Path(method).read_text())
        except OSError as error:
            raise BadInput(f"cannot read {method}: {error.strerror or error}") from error
    if isinstance(method, Plan):
        if times is not None:
            raise BadInput("a plan holds its times: leave times out")
        known = schedule_from_dict(method.schedule)
        if not isinstance(known, (Discrete, Flow)):
            raise BadInput(f"a plan on {type(known).__name__}: the networks of diffusers know tables and flows")
        if like is None:
            config = scheduled(known)
        elif not (
            config.get("use_dynamic_shifting")  # whose shift is known later
            and isinstance(known, Flow)
            or alike(known, kind(**config).hasten_schedule, method.times)
        ):
            raise BadInput("the plan was made for another schedule than that of this pipeline")
        config["plan"] = method.to_json()
    else:
        config["sampler"] = method if isinstance(method, str) else spell(method)
        if times is not None and not isinstance(times, str):
            values = times.tolist() if isinstance(times, Tensor) else times
            if isinstance(values, type) or not (isinstance(values, Iterable) or is_dataclass(values)):
                raise BadInput(f"times= takes a time grid, a text, or the times themselves, found {times!r}")
            times = spell(Explicit(tuple(map(float, values))) if isinstance(values, Iterable) else times)
        config["times"] = times or "angle"
    if prediction is not None:
        names = {ours: theirs for theirs, ours in PREDICTIONS.items()}
        if prediction not in names:
            raise BadInput(f"unknown prediction {prediction!r} (choices: {', '.join(names)})")
        config["prediction_type"] = names[prediction]
    elif like is None:
        raise BadInput("as_scheduler needs like=, a pipeline or scheduler, or with a plan prediction=")
    if clip is not None:
        if not isinstance(clip, (bool, int, float)) or clip is not False and not 0 < clip < math.inf:
            raise BadInput(f"clip= takes a number above 0, True (1.0) or False, found {clip!r}")
        config = {key: value for key, value in config.items() if key not in ("clip", *THRESHOLDING)}
        config["clip"] = None if clip is False else 1.0 if clip is True else float(clip)
    return kind(**config)


def described(like: Any) -> dict[str, Any]:
    """The part of a scheduler's configuration that says what the network was made for."""
    from .scheduler_class import scheduler_class

    if like is None:
        return {}
    if isinstance(getattr(like, "denoiser", None), nn.Module):
        like = like.denoiser  # a Model
    if isinstance(like, Denoiser) or hasattr(like, "prediction") and hasattr(like, "clock"):
        theirs = {ours: theirs for theirs, ours in PREDICTIONS.items()}
        if like.clock != "index" and not isinstance(like, FlowDenoiser):
            raise BadInput(f"a scheduler of diffusers tells the network an index or sigma, this one wants {like.clock}")
        return {**scheduled(like.schedule), "prediction_type": theirs[like.prediction.name]}
    scheduler = like.scheduler if is_pipeline(like) else like
    if hasattr(scheduler, "config"):
        read, config = reading(scheduler), dict(scheduler.config)
    elif isinstance(scheduler, Mapping):
        read, config = None, dict(scheduler)
    else:
        raise BadInput(f"like= takes a pipeline, a scheduler, its config, a Model or a Denoiser, found {like!r}")
    kept = {key: config[key] for key in TABLE if key in config} | clipping(scheduler, config)
    if kept.get("trained_betas") is not None:
        kept["trained_betas"] = [float(beta) for beta in kept["trained_betas"]]
    if "FlowMatch" in str(config.get("_class_name") or type(scheduler).__name__) and not kept.get("use_flow_sigmas"):
        # which tells pipelines (Flux) that the scheduler has noise levels of its own
        kept |= {"use_flow_sigmas": True, "flow_shift": kept.get("shift") or 1.0}
    if read is None:
        return kept
    kept["prediction_type"] = {ours: theirs for theirs, ours in PREDICTIONS.items()}[read.prediction]
    try:
        same = scheduler_class()(**kept).hasten_schedule == read.schedule
    except NotImplementedError:  # betas of a kind that only that scheduler knows
        same = False
    if same:
        return kept
    more = {key: kept[key] for key in ("prediction_type", "clip", *THRESHOLDING) if key in kept}
    return {**scheduled(read.schedule), **more}


def clipping(scheduler: Any, config: dict[str, Any]) -> dict[str, Any]:
    """How a scheduler holds x0 within bounds: `clip`, or the arguments of dynamic thresholding; {} where it does not.

    Configurations carry what other schedulers wanted, so only what this scheduler itself takes counts.
    """
    if "clip" in config:
        return {key: config[key] for key in ("clip", *THRESHOLDING) if key in config}  # one of ours
    kind = (
        type(scheduler) if hasattr(scheduler, "config") else getattr(diffusers(), str(config.get("_class_name")), None)
    )
    takes = config if kind is None else inspect.signature(kind.__init__).parameters
    if config.get("thresholding") and "thresholding" in takes:
        return {key: config[key] for key in THRESHOLDING if key in config}
    if config.get("clip_sample") and "clip_sample" in takes:
        return {"clip": float(config.get("clip_sample_range") or 1.0)}
    return {}


def scheduled(schedule: Schedule) -> dict[str, Any]:
    """The configuration that only a schedule gives."""
    if isinstance(schedule, Discrete):
        return {"num_train_timesteps": len(schedule.alphas_cumprod), "plan_schedule": schedule.to_dict()}
    return {"num_train_timesteps": 1000, "plan_schedule": schedule.to_dict()}


def accelerate(what: Any, accelerators: Any, ahead: Any = None, **told: Any) -> Any:
    """A denoiser, or a pipeline of `diffusers`, under accelerators; what is given stays as it is.

    Args:
        what: a `Denoiser`, see `hasten.accelerators.accelerate`, or a pipeline, see `accelerate_pipeline`.
        accelerators: one or several, as objects or texts.
        ahead: with a denoiser: the `Ahead` of its sampling.
        told: with a pipeline: `steps`, `prompts`, `seed`, `calls`.
    """
    from ...accelerators import accelerate as accelerate_denoiser

    if is_pipeline(what):
        if ahead is not None:
            raise BadInput("a pipeline's scheduler says what is ahead: give steps= in place of ahead=")
        return accelerate_pipeline(what, accelerators, **told)
    if told or not isinstance(what, nn.Module):
        found = f"{type(what).__name__} with {', '.join(told)}=" if told else type(what).__name__
        raise BadInput(
            f"accelerate takes a Denoiser, or a pipeline of diffusers with steps= and prompts=, found {found}"
        )
    return accelerate_denoiser(what, methods(accelerators), ahead)


def methods(accelerators: Any) -> list[Any]:
    """Accelerators from one or several, as objects or texts."""
    from ...pick import pick

    if isinstance(accelerators, str) or not isinstance(accelerators, Iterable):
        accelerators = [accelerators]
    return [pick("accelerators", one) if isinstance(one, str) else one for one in accelerators]


def accelerate_pipeline(
    pipe: Any, accelerators: Any, steps: int | None = None, prompts: Any = None, seed: int = 0, calls: Any = None
) -> Any:
    """A copy of the pipeline, with the same parts, whose network runs under these accelerators.

    The pipeline that is given stays as it is. In the copy `unet` or `transformer` is a network of the same class, in
    modules of its own on the same memory: guidance, ControlNet, T2I-Adapter and IP-Adapter inputs go through it, and
    LoRA, FreeU, attention processors, hooks, offloading and `to` work on it, before and after, without touching the
    original (nor the other way round: load a LoRA into the pipeline that you draw with). Every image begins afresh:
    where the scheduler was set anew or the time goes up, what the accelerators remember is forgotten.

    What cannot be followed is refused when the network is called: weights that change after `quantize` (fuse a LoRA
    before). A pipeline that asks the network twice a step, that has another scheduler than the one it shares its parts
    with, or that leaves too few queries runs without feature reuse, with a warning; so does a network whose `forward`
    was replaced.

    Raises BadInput for a network whose parts are not known, and where an accelerator cannot do its work.

    Args:
        accelerators: one or several, as objects or texts such as "encoder_propagation:keys=uniform".
        steps: of the samplings to come; by default 50. A sampling with other steps or another start (image to image)
            makes the accelerators that look ahead anew, for the times of the scheduler then.
        prompts, seed: of the samplings that an accelerator may want to see first (calibration); without prompts those
            of the empty prompt, with a warning.
        calls: in place of prompts, `calls(pipe)` runs the pipeline as it will be used, and what its network is asked
            then is what is looked at: `calls=lambda pipe: pipe("a cat", image=sketch)`. Pipelines that `load` refuses
            (ControlNet, inpainting networks, adapters) need it.
    """
    from ...pick import pick

    if calls is not None and (prompts is not None or not callable(calls)):
        raise BadInput("give prompts=, or calls=, a function of the pipeline such as lambda pipe: pipe('a cat')")
    several = isinstance(accelerators, Iterable) and not isinstance(accelerators, str)
    chosen = [
        pick("accelerators", a) if isinstance(a, str) else a for a in (accelerators if several else [accelerators])
    ]
    for one in chosen:
        if not hasattr(one, "stage"):
            raise BadInput(
                f"accelerators are objects of hasten.accelerators or texts such as 'deep_cache', found {one!r}"
            )
    steps = 50 if steps is None else count_of("steps", steps)
    seen_in = prompts if calls is None else calls
    slot, net = network_of(pipe)
    made = Accelerated.put_into(pipe, slot, net, chosen, steps, seed, seen_in)
    other_weights = any(one.stage == EXCHANGE for one in chosen)
    for thing in (made, vars(made)[slot]) if other_weights else (made,):  # past their own __setattr__
        vars(thing)["save_pretrained"] = partial(save_accelerated, thing, chosen, other_weights)
    return made


def save_accelerated(
    thing: Any, accelerators: list[Any], other_weights: bool, folder: Any, *more: Any, **told: Any
) -> Any:
    """`save_pretrained` of an accelerated pipeline or its network: without the accelerators, and it says so.

    Raises BadInput where they have changed the weights: a folder of `diffusers` does not hold integers.
    """
    names = [spell(one) for one in accelerators]
    again = f"hasten.accelerate(pipe, {names!r}) after loading"
    if other_weights:
        raise BadInput(
            f"save_pretrained would write the weights before {' and '.join(names)}, not those that run: save the "
            f"pipeline that accelerate was given, and call {again}"
        )
    warnings.warn(f"saved without {' and '.join(names)}: call {again}", stacklevel=2)
    return type(thing).save_pretrained(thing, folder, *more, **told)
