"""`Accelerated`: a pipeline's network under accelerators."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import nn

from ...accelerators import WRAP, Call, ordered, with_defaults
from ...errors import BadInput
from ...nets.time_groups import TimeGroups
from ...pick import format_spec
from ...times import Explicit
from .accelerated_forward import AcceleratedForward
from .calibration import record_model_calls, record_pipeline_calls
from .calls import argument_reader
from .controlnets import reuse_controlnet
from .hooks import check_hooks
from .network import OriginalNetwork, copy_offload_hook, diffusers_hooks, replaced_forward, separate, warn_of_compiled
from .split_network import SideInputs
from .wrap import split_network

__all__ = ["Accelerated"]


class Accelerated:
    """Mixin for the class of a network of `diffusers` that runs under accelerators: see `accelerated`.

    The network stays an instance of its class with its own modules: LoRA layers, attention processors, FreeU,
    IP-Adapters, hooks, `state_dict` and `to` work as ever, and take effect at the next evaluation.
    """

    accelerated_forward: AcceleratedForward

    @property
    def _run(self) -> Any:
        """The accelerated denoiser that was evaluated last."""
        return self.accelerated_forward.denoiser

    @staticmethod
    def wrap_pipeline(
        pipe: Any,
        slot: str,
        net: nn.Module,
        accelerators: Sequence[Any],
        steps: int,
        seed: int,
        prompts: Any,
        bounds: Sequence[float] | None = None,
    ) -> Any:
        """A copy of the pipeline with the accelerated network in `slot`.

        Args:
            bounds: of a network in integers: those of its time groups.
        """
        component = vars(pipe).get(slot)
        if isinstance(component, Accelerated):
            raise BadInput(
                "this pipeline is accelerated already: pass all accelerators together, with the original pipeline"
            )
        if isinstance(component, nn.Module):
            warn_of_compiled(component, slot, 4)
        module, new = accelerated(net, accelerators, pipe.scheduler), copy.copy(pipe)
        vars(new)[slot] = module  # not by setattr, which would change the pipeline's config: it is saved as before
        forward: AcceleratedForward = vars(module)["accelerated_forward"]
        forward.owner = weakref.ref(new)
        if bounds is not None:
            forward.source = forward.spec.denoiser(TimeGroups(forward.network, bounds)).eval()
        forward.calls = lambda times, all_times: pipeline_calls(
            pipe, times, all_times, prompts, seed, forward.side_inputs
        )
        forward.prepare(steps)
        reuse_controlnet(new, forward)
        if getattr(new, "_all_hooks", None):
            new.maybe_free_model_hooks()  # installs the original's offloading hooks
        return new

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        forward = vars(self).get("accelerated_forward")
        if forward is None:
            return super()._apply(fn, recurse)  # type: ignore[misc]
        outdated = forward.layers.outdated()
        super()._apply(fn, recurse)  # type: ignore[misc]
        forward.moved(fn, outdated)
        return self

    def __copy__(self) -> Any:
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise BadInput(
            f"a {type(self).__name__} under accelerators cannot be pickled: pickle or save the original "
            "pipeline, and call hasten.accelerate(pipe, ...) again after loading"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        forward: AcceleratedForward = vars(self)["accelerated_forward"]
        inner = copy.deepcopy(forward.plain_copy(), memo)
        return forward.copied(inner, memo)


def accelerated(net: nn.Module, accelerators: Sequence[Any], scheduler: Any) -> nn.Module:
    """A copy of a network of `diffusers`, sharing its weights, that runs under accelerators.

    Accelerators see it as a denoiser, whose raw output the pipeline gets; without any this equals the network's output
    bit for bit.

    Args:
        net: the network.
        accelerators: to apply.
        scheduler: of its pipeline.

    Raises:
        BadInput: for a network without split points, and for a replaced `forward` that an accelerator would bypass.
    """
    split_network(net)  # first: refuses unknown networks
    check_text_conditioning(net)
    accelerators, patch = ordered(accelerators), replaced_forward(net)
    check_hooks(net, accelerators, warn=True)
    for one in accelerators:
        if with_defaults(one).inject:
            raise BadInput(
                f"{format_spec(one)}: a pipeline's scheduler injects no noise: remove inject, or load a Model"
            )
        if patch is not None and with_defaults(one).stage < WRAP:
            raise BadInput(
                f"the forward of this {type(net).__name__} was replaced ({_name(patch)}), and {format_spec(one)} "
                "would not run it: remove the patch first"
            )
    if patch is not None:
        warnings.warn(
            f"the forward of this {type(net).__name__} was replaced ({_name(patch)}): it runs unchanged, without "
            f"{', '.join(map(format_spec, accelerators))}; remove the patch to accelerate the network",
            stacklevel=5,
        )
    own = separate(net)
    module: Any = _as_accelerated(own)
    forward = AcceleratedForward(module, accelerators, scheduler)
    forward.patch, forward.hooks = patch, diffusers_hooks(net)
    forward.original = net if patch or forward.hooks else None
    if not forward.hooks and patch is None:  # else both have the same layers
        forward.original_network = OriginalNetwork(net)
    copy_offload_hook(module, net)
    return module


def check_text_conditioning(net: nn.Module) -> None:
    """Refuse a network that attends to an image instead of a text, which has no split points.

    Raises:
        BadInput: for such a network.
    """
    config: Any = getattr(net, "config", {})
    if config.get("encoder_hid_dim_type") == "image_proj" or str(config.get("addition_embed_type")).startswith("image"):
        raise BadInput(
            f"this {type(net).__name__} is conditioned on an image embedding instead of a text (Kandinsky 2.2), which "
            "accelerators do not support: use hasten.as_scheduler in its pipeline"
        )


def _as_accelerated(net: nn.Module) -> nn.Module:
    """An instance of the accelerated class that shares all attributes with `net`."""
    kind: Any = type(net)
    module: Any = object.__new__(accelerated_class(kind))
    module.__dict__ = vars(net)
    return module


def _name(forward: Any) -> str:
    """The qualified name of a function."""
    return f"{getattr(forward, '__module__', '?')}.{getattr(forward, '__qualname__', type(forward).__name__)}"


@cache
def accelerated_class(kind: Any) -> type[Accelerated]:
    """A subclass of a network class, of the same name, whose `forward` of the same signature is accelerated."""

    @torch.compiler.disable
    def outside_graphs(inner: AcceleratedForward, args: Any, kwargs: Any, compiling: bool) -> Any:
        if compiling and "torch.compile" not in inner.warned:
            inner.warned.add("torch.compile")
            warnings.warn(
                f"a {kind.__name__} under accelerators is not compiled by torch.compile and runs uncompiled: "
                'pass the accelerator "compile" to hasten.accelerate',
                stacklevel=2,
            )
        return inner.forward(args, kwargs)

    @wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return outside_graphs(self.accelerated_forward, args, kwargs, torch.compiler.is_compiling())

    attributes = {
        "forward": forward,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (Accelerated, kind), attributes)


def pipeline_calls(
    pipe: Any,
    times: tuple[float, ...],
    all_times: tuple[float, ...],
    prompts: Any,
    seed: int,
    side_inputs: SideInputs | None = None,
) -> Callable[[int, int], list[Call]] | None:
    """`SamplingContext.calls` for a pipeline: the inputs of its network when DDIM samples.

    Args:
        pipe: the pipeline.
        times: at which the inputs are wanted.
        all_times: of the sampling.
        prompts: of the images, or a function that calls the pipeline.
        seed: of the first image.
        side_inputs: of the split network, see `record_pipeline_calls`.

    Returns:
        None where the network has conditions that hasten cannot provide (an image to inpaint).
    """
    from .library import network_of
    from .pipelines import model_of_pipeline

    if callable(prompts):
        net = network_of(pipe)[1]
        return record_pipeline_calls(pipe, prompts, net, argument_reader(type(net)), seed, side_inputs)
    try:
        model = model_of_pipeline(pipe)
    except BadInput:
        return None

    def calls(n: int, first: int) -> list[Call]:
        grid = torch.unique(torch.tensor([*all_times, 0.0], dtype=torch.float64)).flip(0)
        config: Any = {"sampler": "ddim", "times": format_spec(Explicit(tuple(grid.tolist()))), "steps": len(grid) - 1}
        return record_model_calls(model, n, prompts, seed + first, times, config)

    return calls
