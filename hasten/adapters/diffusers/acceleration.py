"""`accelerate`: accelerators for pipelines of `diffusers`, their networks, and denoisers."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

from torch import nn

from ...accelerators import EXCHANGE, with_defaults
from ...accelerators._diffusers_cache import DiffusersCache
from ...errors import BadInput
from ...pick import format_spec
from .accelerated import Accelerated
from .accelerator_list import parse_accelerators
from .arguments import check_count
from .library import is_pipeline, network_of
from .native_caches import cached_pipeline, check_no_cache
from .quantized_pipelines import save_quantized


def accelerate(target: Any, accelerators: Any, context: Any = None, **options: Any) -> Any:
    """A denoiser, or a pipeline of `diffusers`, under accelerators; the original is left unchanged.

    Args:
        target: a `Denoiser`, see `hasten.accelerators.accelerate`, or a pipeline, see `accelerate_pipeline`.
        accelerators: one or several, as objects or texts.
        context: with a denoiser: the `SamplingContext` of its sampling.
        options: with a pipeline: `steps`, `prompts`, `seed`, `calls`. (`ahead` is the old name of `context`.)

    Returns:
        The accelerated denoiser, or a copy of the pipeline.

    Raises:
        BadInput: for other targets and options, and where an accelerator does not apply.
    """
    from ...accelerators import accelerate as accelerate_denoiser

    if "ahead" in options:
        warnings.warn("accelerate(ahead=) is now context=", DeprecationWarning, stacklevel=2)
        context = options.pop("ahead")
    if is_pipeline(target):
        if context is not None:
            raise BadInput("a pipeline takes steps= in place of context=")
        return accelerate_pipeline(target, accelerators, **options)
    if options or not isinstance(target, nn.Module):
        present = f"{type(target).__name__} with {', '.join(options)}=" if options else type(target).__name__
        raise BadInput(
            f"accelerate takes a Denoiser, or a pipeline of diffusers with steps= and prompts=, found {present}"
        )
    return accelerate_denoiser(target, parse_accelerators(accelerators), context)


def accelerate_pipeline(
    pipe: Any, accelerators: Any, steps: int | None = None, prompts: Any = None, seed: int = 0, calls: Any = None
) -> Any:
    """A copy of a pipeline, with the same components, whose network runs under accelerators.

    The original is left unchanged. In the copy `unet` or `transformer` is a network of the same class, with its own
    modules that share the weights: guidance, ControlNet, T2I-Adapter and IP-Adapter inputs go through it, and LoRA,
    FreeU, attention processors, hooks, offloading and `to` work on it, before and after, without affecting the original
    (nor the other way round: load a LoRA into the pipeline that you sample with). The accelerators' state is reset at
    the beginning of every image: where the scheduler's timesteps were set again or the time increases.

    Weights that change after `quantize` are refused when the network is called (fuse a LoRA before). A pipeline that
    evaluates the network twice per step, that has another scheduler than the one it shares its components with, or with
    too few evaluations runs without feature reuse, with a warning; so does a network whose `forward` was replaced.

    Args:
        pipe: the pipeline.
        accelerators: one or several, as objects or texts such as "encoder_propagation:keys=uniform".
        steps: of the samplings to come. Default: 50. For a sampling with other steps or another start (image to image)
            the accelerators that depend on the times are set up again.
        prompts: of calibration samplings, for accelerators that need them. Default: the empty prompt, with a warning.
        seed: of calibration samplings.
        calls: in place of prompts: `calls(pipe)` runs the pipeline as it will be used, and its network's inputs are
            recorded for calibration: `calls=lambda pipe: pipe("a cat", image=sketch)`. Pipelines that `load` refuses
            (ControlNet, inpainting networks, adapters) need it.

    Returns:
        The copy.

    Raises:
        BadInput: for a network without split points, and where an accelerator does not apply.
    """
    if calls is not None and (prompts is not None or not callable(calls)):
        raise BadInput("use prompts=, or calls=, a function of the pipeline such as lambda pipe: pipe('a cat')")
    methods = parse_accelerators(accelerators)
    steps = 50 if steps is None else check_count("steps", steps)
    if any(isinstance(one, DiffusersCache) for one in methods):
        cached = cached_pipeline(pipe, methods, steps, seed, prompts, calls)
        vars(cached)["save_pretrained"] = partial(save_accelerated, cached, methods, False)
        return cached
    slot, net = network_of(pipe)
    check_no_cache(slot, net)
    fast = Accelerated.wrap_pipeline(pipe, slot, net, methods, steps, seed, prompts if calls is None else calls)
    other_weights = any(with_defaults(one).stage == EXCHANGE for one in methods)
    for target in (fast, vars(fast)[slot]) if other_weights else (fast,):  # not by their own __setattr__
        vars(target)["save_pretrained"] = partial(save_accelerated, target, methods, other_weights)
    return fast


def save_accelerated(
    target: Any, accelerators: list[Any], other_weights: bool, folder: Any, *more: Any, **options: Any
) -> Any:
    """`save_pretrained` of an accelerated pipeline or its network: without the accelerators, with a warning.

    A quantised pipeline is written in hasten's own form, since a folder of diffusers cannot hold integer layers:
    `hasten.open_quantized` opens it.

    Raises:
        BadInput: for the quantised network alone, and where it cannot be saved, see `save_quantized`.
    """
    names = [format_spec(one) for one in accelerators]
    again = f"hasten.accelerate(pipe, {names!r}) after loading"
    if other_weights and is_pipeline(target):
        if more or options:
            raise BadInput(f"save_pretrained of a quantised pipeline takes only the folder, found {[*more, *options]}")
        save_quantized(target, folder)
        unsaved = [format_spec(one) for one in accelerators if with_defaults(one).stage != EXCHANGE]
        wrapping = f", {unsaved!r}" if unsaved else ""
        warnings.warn(f"saved for hasten.open_quantized({str(folder)!r}{wrapping}), not for diffusers", stacklevel=2)
        return None
    if other_weights:
        raise BadInput(
            f"save_pretrained would write the weights before {' and '.join(names)}, not those that run: call it on "
            f"the pipeline, or save the original and call {again}"
        )
    warnings.warn(f"saved without {' and '.join(names)}: call {again}", stacklevel=2)
    return type(target).save_pretrained(target, folder, *more, **options)
