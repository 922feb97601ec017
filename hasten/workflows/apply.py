"""`apply`: a choice of how to sample inside a pipeline of diffusers."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from .. import zoo
from ..accelerators import EXCHANGE, with_defaults
from ..adapters.diffusers.acceleration import accelerate_pipeline
from ..adapters.diffusers.accelerator_list import parse_accelerators
from ..adapters.diffusers.autoencoders import replace_decoder
from ..adapters.diffusers.library import is_pipeline, network_of
from ..adapters.diffusers.pipelines import load_pipeline
from ..adapters.diffusers.saving import scheduler_of
from ..adapters.diffusers.scheduler import as_scheduler
from ..errors import BadInput, Notice
from ..files import write_file
from ..loading import load
from ..plan.config import SamplingConfig
from ..storage.model_folder import DESCRIPTION
from ..utils.config import to_toml
from .choice import Choice, read_choice

__all__ = ["apply"]

BESIDE = "sampling.toml"  # in the folder of a saved pipeline


def apply(
    pipe: Any, config: SamplingConfig | Choice | str | Path, *, prompts: Any = None, calls: Any = None, seed: int = 0
) -> Any:
    """A copy of a pipeline of diffusers that samples as a config says; the original is left unchanged.

        pipe = hasten.apply(pipe, "best.toml")
        pipe("a photo of a cat")

    Sampler, times and plan become its scheduler, a LoRA is merged into a copy of the weights, a light decoder takes the
    place of the autoencoder, accelerators run inside its network (`hasten.accelerate`). Steps and guidance scale become
    the defaults of its call. `save_pretrained` writes what a pipeline can hold, and beside it `sampling.toml` for the
    rest: `hasten.apply(DiffusionPipeline.from_pretrained(folder), folder + "/sampling.toml")`.

    Args:
        pipe: the pipeline.
        config: a file that `hasten choose` wrote, or any `SamplingConfig` or its file.
        prompts: of calibration samplings of accelerators.
        calls: in their place a function that calls the pipeline.
        seed: of calibration samplings; see `hasten.accelerate` for all three.

    Returns:
        The pipeline.

    Raises:
        BadInput: for what a pipeline cannot hold: guides, an initialisation, a plan that evaluates the branches of
            guidance one by one; and for the choice of another model.
    """
    if not is_pipeline(pipe):
        raise BadInput(
            f"apply takes a pipeline of diffusers, found {type(pipe).__name__}: a Model takes the config itself, "
            "model.sample(16, config=...)"
        )
    choice = read_choice(config)
    how, source = choice.sampling, f"{config}: " if isinstance(config, (str, Path)) else ""
    check_holdable(how, choice, pipe, source)
    new = copy.copy(pipe)
    defaults: dict[str, Any] = {"num_inference_steps": how.steps, "guidance_scale": how.guidance_scale}
    if choice.lora is not None:
        new, own = with_merged_lora(new, choice.lora, how)
        defaults = {**own, **{name: value for name, value in defaults.items() if value is not None and name not in own}}
    if choice.decoder is not None:
        decoder = load_pipeline(new).decoder
        if decoder is None:
            raise BadInput(f"{source}this {type(pipe).__name__} has no image decoder to replace")
        _, new = replace_decoder(decoder, new, zoo.find_file(choice.decoder))
    if how.plan is not None or how.sampler is not None:
        method = named_plan_of(pipe, how) if how.plan is not None else how.sampler
        new.scheduler = as_scheduler(method, None if how.plan is not None else how.times, like=new)
    methods = parse_accelerators(how.accelerators)
    if methods:
        new = accelerate_pipeline(new, methods, how.steps, prompts, seed, calls)
    if how.precision not in (None, "auto", "fp32"):
        warnings.warn(
            f"precision {how.precision} is not set by apply: load the pipeline with torch_dtype=, or call it under "
            "torch.autocast",
            Notice,
            stacklevel=2,
        )
    kept = how.replace(steps=defaults["num_inference_steps"], guidance_scale=defaults["guidance_scale"])
    return saved_beside(with_call_defaults(new, defaults), kept, methods)


def check_holdable(how: SamplingConfig, choice: Choice, pipe: Any, source: str) -> None:
    """Refuse what a pipeline cannot hold. Raises BadInput."""
    for name in ("guides", "start"):
        if value := getattr(how, name):
            shown = value[0] if isinstance(value, tuple) else value
            raise BadInput(
                f"{source}a pipeline of diffusers has no {name} ({shown}): sample with hasten.load(FOLDER).sample("
                "config=...), or choose with --for-diffusers"
            )
    if choice.name is not None:
        own = Path(str(getattr(pipe, "config", {}).get("_name_or_path") or ""))
        if not own.exists() or own.resolve() != zoo.find_file(choice.name).resolve():
            raise BadInput(
                f"{source}the choice is another model, {choice.name}: apply it to that one's pipeline, "
                f"DiffusionPipeline.from_pretrained({str(zoo.find_file(choice.name))!r})"
            )


def named_plan_of(pipe: Any, how: SamplingConfig) -> Any:
    """The plan of a config: an object, a .json file, or one of the pipeline's folder by name."""
    if not isinstance(how.plan, str) or how.plan.endswith(".json"):
        return how.plan
    folder = Path(str(pipe.config.get("_name_or_path") or ""))
    plans = load(folder).plans if (folder / DESCRIPTION).is_file() else {}
    if how.plan not in plans:
        raise BadInput(f"the plan {how.plan!r} is not in the folder of this pipeline: give its .json file")
    return plans[how.plan]


def with_merged_lora(pipe: Any, lora: str, how: SamplingConfig) -> tuple[Any, dict[str, Any]]:
    """The pipeline with a LoRA merged into a copy of its network, and the arguments that a student's LoRA brings."""
    model = load_pipeline(pipe).with_lora(lora)
    slot, _ = network_of(pipe)
    new = copy.copy(model.pipeline)
    net: Any = model.denoiser.net
    setattr(new, slot, net.net)
    if "distilled" not in model.card:
        return new, {}
    new.scheduler = scheduler_of(replace(model, pipeline=new))
    # its scale is inside the network: the pipeline must add none
    return new, {"num_inference_steps": how.steps or model.steps, "guidance_scale": 1.0}


def with_call_defaults(pipe: Any, defaults: Mapping[str, Any]) -> Any:
    """The pipeline, changed in place, with other defaults of its call; arguments that it does not have are omitted."""
    kind = type(pipe)
    known = inspect.signature(kind.__call__).parameters
    own = {name: value for name, value in defaults.items() if name in known and value is not None}

    @wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(kind.__call__).bind_partial(self, *args, **kwargs).arguments
        return kind.__call__(self, *args, **{k: v for k, v in own.items() if k not in given}, **kwargs)

    attributes = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    pipe.__class__ = type(kind.__name__, (kind,), {**attributes, "__doc__": kind.__doc__})
    return pipe


def saved_beside(pipe: Any, how: SamplingConfig, methods: list[Any]) -> Any:
    """The pipeline, changed in place, whose `save_pretrained` writes `sampling.toml` too: steps, guidance and
    accelerators, which a folder of diffusers does not hold."""
    inner: Callable[..., Any] = vars(pipe).get("save_pretrained") or type(pipe).save_pretrained.__get__(pipe)
    integers = any(with_defaults(one).stage == EXCHANGE for one in methods)

    def save(folder: Any, *more: Any, **options: Any) -> Any:
        result = inner(folder, *more, **options)
        accelerators = () if integers else how.accelerators  # of a quantised pipeline open_quantized takes the others
        kept = SamplingConfig(
            steps=how.steps, guidance_scale=how.guidance_scale, accelerators=accelerators, precision=how.precision
        )
        head = f"# hasten.apply(pipe, {BESIDE!r}) sets what a folder of diffusers does not hold\n"
        write_file(Path(folder) / BESIDE, (head + to_toml({"sampling": kept.to_dict()})).encode())
        return result

    vars(pipe)["save_pretrained"] = save
    return pipe
