"""`as_scheduler`: samplers and plans of hasten as schedulers of `diffusers`."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...denoiser import Denoiser
from ...errors import BadInput, check_choice
from ...pick import format_spec
from ...plan.config import SamplingConfig
from ...plan.table import Plan
from ...schedules.base import Schedule
from ...schedules.continuous import Flow
from ...schedules.discrete import Discrete
from ...schedules.serialize import schedule_from_dict
from ...times import Explicit
from .given_times import original_config
from .library import diffusers, is_pipeline
from .schedules import PREDICTIONS, FlowDenoiser, read_scheduler, schedules_agree

# Entries of a scheduler's config that say what the network was trained for.
TABLE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type", "shift", "use_flow_sigmas", "flow_shift", "use_dynamic_shifting", "time_shift_type",
    "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "original_inference_steps",
    "stochastic_sampling", "invert_sigmas",
)  # fmt: skip

# Schedulers that have the arguments of clipping, and do not clip.
UNCLIPPED = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "TCDScheduler")
THRESHOLDING = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")


def from_config(config: SamplingConfig, times: Any) -> tuple[Any, Any]:
    """The sampler or plan of a config and its times.

    Raises:
        BadInput: for what a scheduler cannot do: guides, an initialisation, accelerators, a plan of a model by name.
    """
    for name in ("guides", "start", "accelerators"):
        if getattr(config, name):
            raise BadInput(
                f"a scheduler of diffusers has no {name}: use hasten.load and Model.sample, or leave {name} out"
            )
    if times is not None:
        raise BadInput("the config has its own times: remove times=")
    passed = [f"num_inference_steps={config.steps}"] if config.steps is not None else []
    passed += [f"guidance_scale={config.guidance_scale:g}"] if config.guidance_scale is not None else []
    if passed:
        warnings.warn(f"steps and guidance are arguments of the pipeline: pipe(..., {', '.join(passed)})", stacklevel=3)
    if config.plan is not None:
        if not isinstance(config.plan, Plan) and not str(config.plan).endswith(".json"):
            raise BadInput(f"give the plan {config.plan!r} itself, model.plans[{config.plan!r}], or its .json file")
        return config.plan, None
    if config.sampler is None:
        raise BadInput("the config names no sampler: a scheduler needs one")
    return config.sampler, config.times


def as_scheduler(
    method: Plan | Any,
    times: Any = None,
    like: Any = None,
    prediction: str | None = None,
    clip: float | bool | None = None,
    override_sigmas: bool = False,
) -> Any:
    """A scheduler of `diffusers` that runs a sampler or a plan of hasten inside an unmodified pipeline.

        pipe.scheduler = hasten.as_scheduler("unipc:order=3", times="angle", like=pipe)
        pipe("a photo of a cat", num_inference_steps=8)

    It takes exactly `num_inference_steps` steps, at fractional timesteps, with one generator per sample if the pipeline
    gets a list; `save_pretrained`, `from_pretrained` and `from_config` work. A process that loads such a pipeline's
    folder must have imported hasten (`import hasten`) before it calls `from_pretrained`.

    Args:
        method: a linear sampler, as an object or a text; a `Plan`, as an object or a .json file; or a `SamplingConfig`
            with one of these, whose steps and guidance scale the call of the pipeline takes.
        times: a time grid, as an object, a text, or the times themselves (steps + 1, from noise to the end); or "like",
            the times of the scheduler that is replaced, with its spacing, shift, `shift_terminal` and Karras,
            exponential or beta sigmas. Default: "angle". A plan has its own.
        like: what the network was trained for: a pipeline, a scheduler, a scheduler's config, a `Model` or a
            `Denoiser`. Optional with a plan and `prediction`.
        prediction: "eps", "v", "x0" or "flow". Default: that of `like`.
        clip: clip x0 to [-clip, clip], for networks of pixels; False: do not. Default: as `like` does, which may also
            have dynamic thresholding. The step uses the clipped x0 throughout, as DDIMScheduler does with
            `use_clipped_model_output=True` (and not without it): where x0 is never beyond, the two agree.
        override_sigmas: of sigmas that a pipeline passes use only the number. Default: they take the place of `times`,
            with a warning, unless they are the usual default of pipelines, linspace(1, 1 / n, n).

    A flow whose shift depends on the image size (`use_dynamic_shifting`) gets it from the pipeline. Other arguments of
    `set_timesteps` and `step` are used, or refused by name.

    Returns:
        A `PlanScheduler`.

    Raises:
        BadInput: for a method that a pipeline cannot run, and where `like` and the method do not fit.
    """
    from .scheduler_class import plan_scheduler

    if isinstance(method, SamplingConfig):
        method, times = from_config(method, times)
    kind, config = plan_scheduler(), network_settings(like)
    if not isinstance(method, (str, Path, Plan)) and (isinstance(method, type) or not is_dataclass(method)):
        raise BadInput(f"as_scheduler takes a sampler, as an object or a text, or a Plan, found {method!r}")
    if isinstance(method, (str, Path)) and str(method).endswith(".json"):
        try:
            method = Plan.from_json(Path(method).read_text())
        except OSError as error:
            raise BadInput(f"cannot read {method}: {error.strerror or error}") from error
    if isinstance(method, Plan):
        if times is not None:
            raise BadInput("a plan has its own times: remove times=")
        known = schedule_from_dict(method.schedule)
        if not isinstance(known, (Discrete, Flow)):
            raise BadInput(f"a plan on {type(known).__name__}: the networks of diffusers know tables and flows")
        if like is None:
            config = schedule_settings(known)
        elif not (
            config.get("use_dynamic_shifting")  # the shift is known later
            and isinstance(known, Flow)
            or schedules_agree(known, kind(**config).hasten_schedule, method.times)
        ):
            raise BadInput("the plan was made for another schedule than that of this pipeline")
        config["plan"] = method.to_json()
    else:
        config["sampler"] = method if isinstance(method, str) else format_spec(method)
        if times is not None and not isinstance(times, str):
            values = times.tolist() if isinstance(times, Tensor) else times
            if isinstance(values, type) or not (isinstance(values, Iterable) or is_dataclass(values)):
                raise BadInput(f"times= takes a time grid, a text, or the times themselves, found {times!r}")
            times = format_spec(Explicit(tuple(map(float, values))) if isinstance(values, Iterable) else times)
        config["times"] = times or "angle"
    if prediction is not None:
        names = {ours: theirs for theirs, ours in PREDICTIONS.items()}
        config["prediction_type"] = names[check_choice("prediction", prediction, names)]
    elif like is None:
        raise BadInput("as_scheduler needs like=, a pipeline or scheduler, or with a plan prediction=")
    if clip is not None:
        if not isinstance(clip, (bool, int, float)) or clip is not False and not 0 < clip < math.inf:
            raise BadInput(f"clip= takes a number above 0, True (1.0) or False, found {clip!r}")
        config = {key: value for key, value in config.items() if key not in ("clip", *THRESHOLDING)}
        config["clip"] = None if clip is False else 1.0 if clip is True else float(clip)
    if override_sigmas:
        config["override_sigmas"] = True
    return kind(**config)


def network_settings(like: Any) -> dict[str, Any]:
    """The entries of a scheduler's config that say what the network was trained for.

    Args:
        like: see `as_scheduler`.

    Raises:
        BadInput: for other objects and unsupported networks.
    """
    from .scheduler_class import plan_scheduler

    if like is None:
        return {}
    if isinstance(getattr(like, "denoiser", None), nn.Module):
        like = like.denoiser  # a Model
    if isinstance(like, Denoiser) or hasattr(like, "prediction") and hasattr(like, "clock"):
        theirs = {ours: theirs for theirs, ours in PREDICTIONS.items()}
        if like.clock != "index" and not isinstance(like, FlowDenoiser):
            raise BadInput(
                f"the time input of networks of diffusers is an index or sigma, that of this one is {like.clock}"
            )
        return {**schedule_settings(like.schedule), "prediction_type": theirs[like.prediction.name]}
    scheduler = like.scheduler if is_pipeline(like) else like
    if hasattr(scheduler, "config"):
        spec, config = read_scheduler(scheduler), dict(scheduler.config)
    elif isinstance(scheduler, Mapping):
        spec, config = None, dict(scheduler)
    else:
        raise BadInput(f"like= takes a pipeline, a scheduler, its config, a Model or a Denoiser, found {like!r}")
    settings = {key: config[key] for key in TABLE if key in config} | clipping_settings(scheduler, config)
    if (original := config.get("original") or original_config(scheduler)) is not None:
        settings["original"] = original
    if settings.get("trained_betas") is not None:
        settings["trained_betas"] = [float(beta) for beta in settings["trained_betas"]]
    if spec is None:
        return settings
    settings["prediction_type"] = {ours: theirs for theirs, ours in PREDICTIONS.items()}[spec.prediction]
    try:
        same = plan_scheduler()(**settings).hasten_schedule == spec.schedule
    except NotImplementedError:  # a kind of betas that only that scheduler has
        same = False
    if same:
        return settings
    kept = ("prediction_type", "clip", "original", *THRESHOLDING)
    more = {key: settings[key] for key in kept if key in settings}
    return {**schedule_settings(spec.schedule), **more}


def clipping_settings(scheduler: Any, config: dict[str, Any]) -> dict[str, Any]:
    """How a scheduler clips x0: `clip`, or the arguments of dynamic thresholding; {} where it does not.

    A config may have entries of other schedulers, so only arguments of this scheduler's class count.
    """
    if "clip" in config:
        return {key: config[key] for key in ("clip", *THRESHOLDING) if key in config}  # a PlanScheduler
    kind = (
        type(scheduler) if hasattr(scheduler, "config") else getattr(diffusers(), str(config.get("_class_name")), None)
    )
    if getattr(kind, "__name__", "") in UNCLIPPED:
        return {}
    takes = config if kind is None else inspect.signature(kind.__init__).parameters
    if config.get("thresholding") and "thresholding" in takes:
        return {key: config[key] for key in THRESHOLDING if key in config}
    if config.get("clip_sample") and "clip_sample" in takes:
        return {"clip": float(config.get("clip_sample_range") or 1.0)}
    return {}


def schedule_settings(schedule: Schedule) -> dict[str, Any]:
    """The entries of a config for a schedule alone."""
    if isinstance(schedule, Discrete):
        return {"num_train_timesteps": len(schedule.alphas_cumprod), "plan_schedule": schedule.to_dict()}
    return {"num_train_timesteps": 1000, "plan_schedule": schedule.to_dict()}
