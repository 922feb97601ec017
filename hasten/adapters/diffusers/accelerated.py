"""`Accelerated`: the network of a pipeline, running under accelerators."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import nn

from ...accelerators import WRAP, Call, ordered
from ...errors import BadInput
from ...pick import format_spec
from ...times import Explicit
from .accelerated_forward import AcceleratedForward
from .calibration import record_model_calls, record_pipeline_calls
from .calls import ARGUMENT_READERS
from .network import OriginalNetwork, copy_offload_hook, diffusers_hooks, replaced_forward, separate, uncompiled
from .wrap import split_network

__all__ = ["Accelerated"]


class Accelerated:
    """What is added to the class of a network of `diffusers` that runs under accelerators: see `accelerated`.

    The network stays what it was, an instance of its class with its own modules: LoRA layers, attention processors,
    FreeU, IP-Adapters, hooks, `state_dict`, `to` work on it as ever, and are seen at the next query.
    """

    runner: AcceleratedForward

    @property
    def _run(self) -> Any:
        """The denoiser that answered last."""
        return self.runner.run

    @staticmethod
    def put_into(
        pipe: Any, slot: str, net: nn.Module, accelerators: Sequence[Any], steps: int, seed: int, prompts: Any
    ) -> Any:
        """A copy of the pipeline with such a network in `slot`."""
        given = vars(pipe).get(slot)
        if isinstance(given, Accelerated):
            raise BadInput("this pipeline is accelerated already: give all accelerators together, to the original one")
        if isinstance(given, nn.Module) and uncompiled(given) is not given:
            warnings.warn(
                f"the {slot} was compiled by torch.compile: hasten takes the {type(net).__name__} inside it, "
                'which runs uncompiled; add the accelerator "compile" for a compiled one',
                stacklevel=4,
            )
        module, new = accelerated(net, accelerators, pipe.scheduler), copy.copy(pipe)
        vars(new)[slot] = module  # past the pipeline's own __setattr__: its description stays, it is saved as it was
        runner: AcceleratedForward = vars(module)["runner"]
        runner.owner = weakref.ref(new)
        runner.calls = lambda times, whole: pipeline_calls(pipe, times, whole, prompts, seed)
        runner.prepare(steps)
        if getattr(new, "_all_hooks", None):
            new.maybe_free_model_hooks()  # the offloading hooks of the original, for these parts
        return new

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        runner = vars(self).get("runner")
        if runner is None:
            return super()._apply(fn, recurse)  # type: ignore[misc]
        outdated = runner.layers.outdated()
        super()._apply(fn, recurse)  # type: ignore[misc]
        runner.moved(fn, outdated)
        return self

    def __copy__(self) -> Any:
        made = object.__new__(type(self))
        vars(made).update(vars(self))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise BadInput(
            f"a {type(self).__name__} under accelerators cannot be pickled: pickle or save the pipeline that "
            "accelerate was given, and call hasten.accelerate(pipe, ...) again after loading"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        runner: AcceleratedForward = vars(self)["runner"]
        inner = copy.deepcopy(runner.plain_copy(), memo)
        return runner.copied(inner, memo)


def accelerated(net: nn.Module, accelerators: Sequence[Any], scheduler: Any) -> nn.Module:
    """A copy of a network of `diffusers`, on the same memory, that answers under accelerators.

    Accelerators see it as a denoiser, of which the pipeline is given the raw output: without any, to the bit that of
    the network.

    Raises BadInput for a network without split points, and for a `forward` that was replaced where an accelerator
    would not run it.
    """
    split_network(net)  # before anything: refuses what is not known
    check_text_conditioning(net)
    accelerators, patch = ordered(accelerators), replaced_forward(net)
    for one in accelerators:
        if getattr(one, "inject", 0):
            raise BadInput(
                f"{format_spec(one)}: a pipeline's scheduler injects nothing: leave inject out, or load a Model"
            )
        if patch is not None and one.stage < WRAP:
            raise BadInput(
                f"the forward of this {type(net).__name__} was replaced ({_name(patch)}), and {format_spec(one)} "
                "would not run it: take the patch off first"
            )
    if patch is not None:
        warnings.warn(
            f"the forward of this {type(net).__name__} was replaced ({_name(patch)}): it is run as it is, without "
            f"{', '.join(map(format_spec, accelerators))}; take the patch off to accelerate the network",
            stacklevel=5,
        )
    own = separate(net)
    module: Any = _of_kind(own)
    runner = AcceleratedForward(module, accelerators, scheduler)
    runner.patch, runner.hooks, runner.original = (
        patch,
        diffusers_hooks(net),
        net if patch or diffusers_hooks(net) else None,
    )
    if not runner.hooks and patch is None:  # else both have the same layers
        runner.given = OriginalNetwork(net)
    copy_offload_hook(module, net)
    return module


def check_text_conditioning(net: nn.Module) -> None:
    """Raises BadInput for a network that attends to an image in place of a text, which the split points do not know."""
    config: Any = getattr(net, "config", {})
    if config.get("encoder_hid_dim_type") == "image_proj" or str(config.get("addition_embed_type")).startswith("image"):
        raise BadInput(
            f"this {type(net).__name__} is given an image embedding in place of a text (Kandinsky 2.2), which "
            "accelerators do not support: use hasten.as_scheduler in its pipeline"
        )


def _of_kind(net: nn.Module) -> nn.Module:
    """The same object as an instance of the accelerated class: both share all that they hold."""
    module = object.__new__(accelerated_class(type(net)))  # type: ignore[arg-type]
    module.__dict__ = vars(net)
    return module


def _name(forward: Any) -> str:
    return f"{getattr(forward, '__module__', '?')}.{getattr(forward, '__qualname__', type(forward).__name__)}"


@cache
def accelerated_class(kind: Any) -> type[Accelerated]:
    """The class of accelerated networks of this class: a subclass of its name, its `forward` of the same signature."""

    @torch.compiler.disable
    def outside_graphs(runner: AcceleratedForward, args: Any, kwargs: Any, compiling: bool) -> Any:
        if compiling and "torch.compile" not in runner.warned:
            runner.warned.add("torch.compile")
            warnings.warn(
                f"a {kind.__name__} under accelerators is not compiled by torch.compile and runs as it is: give "
                'hasten.accelerate the accelerator "compile" too',
                stacklevel=2,
            )
        return runner.answer(args, kwargs)

    @wraps(kind.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return outside_graphs(self.runner, args, kwargs, torch.compiler.is_compiling())

    held = {
        "forward": forward,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (Accelerated, kind), held)


def pipeline_calls(
    pipe: Any, times: tuple[float, ...], whole: tuple[float, ...], prompts: Any, seed: int
) -> Callable[[int, int], list[Call]] | None:
    """`SamplingContext.calls` for a pipeline: what its network is given at `times`
    when DDIM samples on the `whole` times.

    None where the network wants more than hasten can give it by itself (an image to inpaint).
    """
    from .library import network_of
    from .pipelines import load_pipeline

    if callable(prompts):
        net = network_of(pipe)[1]
        place = ARGUMENT_READERS[next(kind.__name__ for kind in type(net).__mro__ if kind.__name__ in ARGUMENT_READERS)]
        return record_pipeline_calls(pipe, prompts, net, place, seed)
    try:
        model = load_pipeline(pipe)
    except BadInput:
        return None

    def calls(n: int, first: int) -> list[Call]:
        grid = torch.unique(torch.tensor([*whole, 0.0], dtype=torch.float64)).flip(0)
        told: Any = {"sampler": "ddim", "times": format_spec(Explicit(tuple(grid.tolist()))), "steps": len(grid) - 1}
        return record_model_calls(model, n, prompts, seed + first, times, told)

    return calls
