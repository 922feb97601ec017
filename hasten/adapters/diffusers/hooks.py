"""Hooks of `diffusers` inside a network: its caches, layer-wise casting and group offloading, beside accelerators."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ...accelerators import EXCHANGE, WRAP, with_defaults
from ...errors import BadInput
from ...pick import format_spec

__all__ = ["check_hooks"]

# beginnings of the names of the hooks of each cache
CACHES = {
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
    "faster_cache": "FasterCache",
    "fbc_": "FirstBlockCache",
    "taylorseer_cache": "TaylorSeerCache",
    "mag_cache": "MagCache",
    "sea_cache": "SeaCache",
    "text_kv_cache": "TextKVCache",
}
CASTING = "layerwise_casting"
OFFLOADING = ("group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker")


def check_hooks(net: nn.Module, accelerators: Sequence[Any], warn: bool = False) -> None:
    """Refuse accelerators that do not work beside the hooks of `diffusers` inside a network.

    Args:
        net: the network.
        accelerators: to apply.
        warn: of a cache that works beside them.

    Raises:
        BadInput: for two methods that reuse features, for quantisation of weights that are stored in another format,
            and for reuse where offloading moves several blocks together.
    """
    found = list(_hooks(net))
    reusing = [one for one in accelerators if _reuses(one)]
    exchanging = [one for one in accelerators if with_defaults(one).stage == EXCHANGE]
    name = type(net).__name__
    cache = next((_cache_name(hook) for _, hook, _ in found if _cache_name(hook)), None)
    if cache is not None and reusing:
        raise BadInput(
            f"this {name} has the {cache} of diffusers, and {format_spec(reusing[0])} would reuse features of it once "
            "more: call disable_cache() on it first, or leave one of them out"
        )
    if cache is not None and warn and accelerators:
        warnings.warn(
            f"this {name} has the {cache} of diffusers, which stays in use beside "
            f"{', '.join(map(format_spec, accelerators))}",
            stacklevel=5,
        )
    if exchanging and any(hook == CASTING for _, hook, _ in found):
        raise BadInput(
            f"this {name} stores its weights in another format than it computes in (layer-wise casting), which "
            f"{format_spec(exchanging[0])} does not read: leave enable_layerwise_casting() out"
        )
    if reusing and any(
        _moves_several(hook) for module, name_, hook in found if name_ in OFFLOADING and module is not net
    ):
        raise BadInput(
            f"the group offloading of this {name} moves several blocks together or in advance, some of which "
            f"{format_spec(reusing[0])} skips: use num_blocks_per_group=1 and use_stream=False"
        )


def _hooks(net: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """The modules with hooks of diffusers, with each hook's name and the hook."""
    for module in net.modules():
        registry = vars(module).get("_diffusers_hook")
        for name in getattr(registry, "_hook_order", ()):
            yield module, name, registry.hooks[name]


def _cache_name(hook: str) -> str | None:
    """The cache that a hook belongs to."""
    known = next((name for begin, name in CACHES.items() if hook.startswith(begin)), None)
    return known or (f"cache {hook!r}" if "cache" in hook else None)


def _reuses(accelerator: Any) -> bool:
    """Whether an accelerator of hasten reuses features between evaluations."""
    method = with_defaults(accelerator)
    return method.stage == WRAP and "features" in method.claims


def _moves_several(hook: Any) -> bool:
    """Whether a hook moves the weights of more than one block, or those of the next in advance."""
    group = getattr(hook, "group", None)
    return group is None or group.stream is not None or len(group.modules) > 1
