"""The caches that `diffusers` has for transformers (`enable_cache`), in a copy of a pipeline."""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...accelerators import ordered
from ...accelerators._diffusers_cache import DiffusersCache
from ...errors import BadInput
from ...pick import format_spec
from .accelerated import Accelerated
from .library import diffusers
from .network import copy_offload_hook, diffusers_hooks, replaced_forward, separate, uncompiled

__all__ = ["cached_pipeline", "check_no_cache", "enabled_cache"]

CACHE_HOOKS = (
    "fbc_",
    "mag_cache",
    "sea_cache",
    "taylorseer_cache",
    "faster_cache",
    "pyramid_attention_broadcast",
    "text_kv_cache",
)  # what the names of the hooks of diffusers' caches begin with
SLOTS = ("transformer", "transformer_2")


def enabled_cache(net: nn.Module) -> str | None:
    """The name of the cache of `diffusers` that is enabled on a network, None without one.

    By `enable_cache` or by the functions `apply_*_cache`.
    """
    config = getattr(net, "_cache_config", None)
    if config is not None:
        return type(config).__name__.removesuffix("Config")
    for module in net.modules():
        registry = vars(module).get("_diffusers_hook")
        for name in getattr(registry, "hooks", ()):
            if name.lstrip("_").startswith(CACHE_HOOKS):
                return name
    return None


def check_no_cache(slot: str, net: nn.Module) -> None:
    """Refuse a network with a cache of `diffusers`, which must not be stacked on another in silence.

    Raises:
        BadInput: where one is enabled.
    """
    if (name := enabled_cache(net)) is not None:
        raise BadInput(
            f"the {slot} has a cache of diffusers already ({name}): call pipe.{slot}.disable_cache() first, and pass "
            "hasten.accelerate one cache"
        )


def cached_pipeline(
    pipe: Any, methods: list[Any], steps: int, seed: int, prompts: Any, calls: Callable[[Any], Any] | None
) -> Any:
    """A copy of a pipeline whose transformer has a cache of `diffusers` enabled; the original is left unchanged.

    Args:
        pipe: the pipeline.
        methods: accelerators, of which one is a `DiffusersCache`.
        steps: of the samplings to come.
        seed: of a calibration.
        prompts: of a calibration.
        calls: of a calibration, see `accelerate_pipeline`.

    Raises:
        BadInput: for several accelerators, and for a network or pipeline that the cache does not work for.
    """
    method: DiffusersCache = next(one for one in ordered(methods) if isinstance(one, DiffusersCache))
    name = format_spec(method)
    if len(methods) > 1:
        others = ", ".join(format_spec(one) for one in methods if one is not method)
        raise BadInput(f"{name} runs in the transformer's own forward and combines with no other accelerator: {others}")
    slots = {slot: net for slot in SLOTS if isinstance(net := getattr(pipe, slot, None), nn.Module)}
    check_pipeline(pipe, method, slots)
    new = copy.copy(pipe)
    for slot, net in slots.items():
        if uncompiled(net) is not net:
            warnings.warn(
                f"the {slot} was compiled by torch.compile: {name} is enabled on the network inside it, which runs "
                f"uncompiled: call torch.compile on the {slot} of what this returns",
                stacklevel=4,
            )
        vars(new)[slot] = own = without_registries(separate(uncompiled(net)))
        copy_offload_hook(own, uncompiled(net))
    config = method.options(steps)
    if config.get("calibrate"):
        config |= {"calibrate": False, "mag_ratios": measured_ratios(new, slots, config, seed, prompts, calls)}
    for slot in slots:
        enable(vars(new)[slot], method, config, new)
    if getattr(new, "_all_hooks", None):
        new.maybe_free_model_hooks()  # installs the original's offloading hooks
    return new


def check_pipeline(pipe: Any, method: DiffusersCache, slots: dict[str, nn.Module]) -> None:
    """Refuse pipelines that a cache does not work for.

    Raises:
        BadInput: with the reason.
    """
    who, kind = format_spec(method), type(pipe).__name__
    if not slots:
        raise BadInput(f"{who} is for transformers, and {kind} has none: use deep_cache or encoder_propagation")
    for slot, net in slots.items():
        inner = uncompiled(net)
        if isinstance(net, Accelerated):
            raise BadInput("this pipeline is accelerated already: pass the original pipeline")
        check_no_cache(slot, inner)
        if not hasattr(inner, "enable_cache"):
            raise BadInput(
                f"{who}: the {type(inner).__name__} of diffusers {diffusers().__version__} has no enable_cache: use "
                "encoder_propagation, where it has split points"
            )
        if method.transformers and type(inner).__name__ not in method.transformers:
            raise BadInput(f"{who} is for {' and '.join(method.transformers)}, found {type(inner).__name__}")
        own = replaced_forward(inner) is not None or bool(diffusers_hooks(inner))
        if own or any("forward" in vars(module) for module in inner.modules() if module is not inner):
            raise BadInput(
                f"{who}: the {slot} has hooks or a replaced forward (offloading by groups, a patch): accelerate the "
                "pipeline first, and enable offloading on what this returns"
            )
    if not hasattr(diffusers().hooks, method.config_name):
        raise BadInput(
            f"{who}: diffusers {diffusers().__version__} has no {method.config_name}: pip install -U diffusers"
        )
    if method.needs_timestep and not hasattr(type(pipe), "current_timestep"):
        raise BadInput(f"{who}: {kind} does not tell its current_timestep: use first_block_cache or taylor_seer_cache")
    if not method.needs_timestep and "cache_context" not in source_of(type(pipe).__call__):
        raise BadInput(f"{who}: {kind} has no cache_context, without which the cache would mix its evaluations")


def source_of(function: Any) -> str:
    """The source of a function; where it is not at hand, what a pipeline of diffusers with a cache contains."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return "cache_context"


def without_registries(net: nn.Module) -> nn.Module:
    """The network, a copy, without the registries of hooks that its modules share with the original; they are empty."""
    for module in net.modules():
        if "forward" not in vars(module):
            vars(module).pop("_diffusers_hook", None)
    return net


def enable(net: Any, method: DiffusersCache, config: dict[str, Any], pipe: Any) -> None:
    """`enable_cache` with the configuration of an accelerator.

    Raises:
        BadInput: where diffusers refuses it.
    """
    more: dict[str, Any] = {}
    if method.needs_timestep:
        owner = weakref.ref(pipe)
        more["current_timestep_callback"] = lambda: owner().current_timestep  # type: ignore[union-attr]
    try:
        net.enable_cache(getattr(diffusers().hooks, method.config_name)(**config, **more))
    except (ValueError, TypeError, NotImplementedError, IndexError) as error:
        message = " ".join(str(error).split())[:200]
        raise BadInput(
            f"{format_spec(method)}: diffusers cannot enable it on {type(net).__name__}: {message}"
        ) from error
    if enabled_hooks(net) == 0:
        raise BadInput(f"{format_spec(method)}: diffusers finds nothing to cache in {type(net).__name__}")


def enabled_hooks(net: nn.Module) -> int:
    """The number of modules with hooks of a cache."""
    registries = [vars(module).get("_diffusers_hook") for module in net.modules()]
    return sum(
        any(name.lstrip("_").startswith(CACHE_HOOKS) for name in registry.hooks)
        for registry in registries
        if registry is not None
    )


def measured_ratios(
    pipe: Any, slots: dict[str, nn.Module], config: dict[str, Any], seed: int, prompts: Any, calls: Any
) -> list[float]:
    """MagCache's ratios of the residual's magnitudes, measured in a call of the pipeline without skipped blocks.

    Raises:
        BadInput: without a call.
    """
    if calls is None:
        if prompts is None:
            raise BadInput(
                "mag_cache measures its ratios in a call of the pipeline: give calls=lambda pipe: pipe(...), prompts, "
                "or mag_ratios of this model (those of FLUX are in diffusers.hooks.mag_cache)"
            )
        steps = config["num_inference_steps"]
        calls = lambda pipe: pipe(prompt=prompts, num_inference_steps=steps, output_type="latent")  # noqa: E731
    mag_cache: Any = diffusers().hooks.mag_cache
    found: dict[int, list[float]] = {}
    for slot in slots:
        net: Any = vars(pipe)[slot]
        net.enable_cache(mag_cache.MagCacheConfig(calibrate=True, num_inference_steps=10**9))
        for module in net.modules():
            for hook in getattr(vars(module).get("_diffusers_hook"), "hooks", {}).values():
                if hasattr(hook, "_perform_calibration_step"):
                    hook._perform_calibration_step = recorder(hook._perform_calibration_step, found)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            calls(pipe)
    finally:
        for slot in slots:
            vars(pipe)[slot].disable_cache()
    if not found:
        raise BadInput("calls= must call the pipeline that it is passed, as calls=lambda pipe: pipe('a cat')")
    return next(iter(found.values()))  # of the first branch, that of the prompt


def recorder(measure: Any, found: dict[int, list[float]]) -> Any:
    """MagCache's measurement of one ratio, which is kept in `found` for each branch of guidance."""

    def measured(state: Any, residual: Any) -> None:
        measure(state, residual)
        found.setdefault(id(state), []).append(float(state.calibration_ratios[-1]))

    return measured
