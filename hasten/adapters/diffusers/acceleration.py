"""`accelerate`: accelerators for pipelines of `diffusers`, their networks, and denoisers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from ...accelerators import EXCHANGE
from ...errors import BadInput
from ...pick import format_spec
from .accelerated import Accelerated
from .arguments import check_count
from .library import is_pipeline, network_of


def accelerate(what: Any, accelerators: Any, ahead: Any = None, **told: Any) -> Any:
    """A denoiser, or a pipeline of `diffusers`, under accelerators; what is given stays as it is.

    Args:
        what: a `Denoiser`, see `hasten.accelerators.accelerate`, or a pipeline, see `accelerate_pipeline`.
        accelerators: one or several, as objects or texts.
        ahead: with a denoiser: the `SamplingContext` of its sampling.
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
    return accelerate_denoiser(what, parse_accelerators(accelerators), ahead)


def parse_accelerators(accelerators: Any) -> list[Any]:
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
    steps = 50 if steps is None else check_count("steps", steps)
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
    names = [format_spec(one) for one in accelerators]
    again = f"hasten.accelerate(pipe, {names!r}) after loading"
    if other_weights:
        raise BadInput(
            f"save_pretrained would write the weights before {' and '.join(names)}, not those that run: save the "
            f"pipeline that accelerate was given, and call {again}"
        )
    warnings.warn(f"saved without {' and '.join(names)}: call {again}", stacklevel=2)
    return type(thing).save_pretrained(thing, folder, *more, **told)
