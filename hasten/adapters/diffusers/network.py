"""The network of a pipeline as hasten takes it: a copy of its modules on the same memory, without outer hooks."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BadInput
from ...nets.copies import copy_modules, own_parameters

__all__ = [
    "OriginalNetwork",
    "ExchangedLayers",
    "copy_offload_hook",
    "sample_parameters",
    "diffusers_hooks",
    "separate_unhooked",
    "replaced_forward",
    "separate",
    "structure",
    "uncompiled",
]

AROUND = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_compiled_call_impl")  # of the network itself
PROBES = 8  # entries of each tensor that are looked at


def uncompiled(net: nn.Module) -> nn.Module:
    """The network that `torch.compile` was given, or the network itself."""
    inner = getattr(net, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) and type(net).__name__ == "OptimizedModule" else net


def without_hooks(net: nn.Module) -> Any:
    """The same network, with the same children, without what was put around its `forward`."""
    new = object.__new__(type(net))
    vars(new).update({key: value for key, value in vars(net).items() if key not in AROUND})
    config = vars(net).get("_internal_dict")
    if config is not None:  # an IP-Adapter writes into it
        own = type(config)(config)
        vars(own).update(vars(config))
        vars(new)["_internal_dict"] = own
    return new


def separate(net: nn.Module) -> Any:
    """The network in modules of its own, on the memory of the old ones: what moves, casts, freezes, lays out anew or
    extends (LoRA) one does not touch the other.

    Modules inside that have hooks on their `forward` are shared, and so are all where a hook of diffusers on the
    network itself moves their weights.

    Raises BadInput where the weights are not there (sequential offloading).
    """
    if any(p.device.type == "meta" for p in net.parameters()):
        raise BadInput(
            f"the weights of {type(net).__name__} are not in memory (sequential CPU offload): give hasten the pipeline "
            "before pipe.enable_sequential_cpu_offload(), or use pipe.enable_model_cpu_offload()"
        )
    return (
        without_hooks(net)
        if diffusers_hooks(net) or replaced_forward(net)
        else copy_modules(without_hooks(net), own_parameters(net))
    )


def separate_unhooked(net: nn.Module) -> nn.Module:
    """`separate`, for a model of hasten, which calls the parts of a network and not the network.

    Raises BadInput for hooks and patches on the network itself, which would not be run.
    """
    with_hooks = [name for name in ("_forward_pre_hooks", "_forward_hooks") if vars(net)[name]]
    patch = replaced_forward(net)
    if with_hooks or patch is not None or diffusers_hooks(net):
        what = "its forward was replaced" if patch is not None else "it has forward hooks"
        raise BadInput(
            f"hasten.load calls the parts of this {type(net).__name__}, and {what} (tomesd, DeepCache, group offload, "
            "...): take that off first, or use the pipeline with hasten.accelerate or hasten.as_scheduler"
        )
    return separate(net)


def replaced_forward(net: nn.Module) -> Callable[..., Any] | None:
    """A `forward` that was put on the network object in place of that of its class; None where there is none, or where
    only hooks are around it (see `hooks_of` and `attach`)."""
    return None if _innermost(net) is None else vars(net)["forward"]


def diffusers_hooks(net: nn.Module) -> list[Any]:
    """The hooks of diffusers around the `forward` of the network itself, the outermost first (group offloading)."""
    registry = vars(net).get("_diffusers_hook")
    if "forward" not in vars(net) or registry is None or "_hf_hook" in vars(net):
        return []
    return [registry.hooks[name] for name in reversed(registry._hook_order)]


def _innermost(net: nn.Module) -> Any:
    """What the hooks around the network's `forward` call in the end, None where it is the `forward` of its class."""
    held = vars(net)
    forward = held.get("forward")
    while forward is not None:
        registry = held.get("_diffusers_hook")
        if isinstance(forward, types.MethodType) and forward.__func__ is type(net).forward:
            return None
        if "_hf_hook" in held and _wraps(forward, held.get("_old_forward")):
            forward, held = held["_old_forward"], {}
        elif (
            registry is not None
            and registry._fn_refs
            and all(ref.original_forward is None for ref in registry._fn_refs)
        ):
            forward, held = registry._fn_refs[0].forward, {}
        else:
            return forward
    return None


def _wraps(forward: Any, old: Any) -> bool:
    """Whether this is what accelerate puts around a `forward`."""
    return old is not None and getattr(forward, "__wrapped__", None) in (old, getattr(old, "__wrapped__", old))


def copy_offload_hook(net: nn.Module, original: nn.Module) -> None:
    """Put the hook that accelerate has on the original (offloading) on the copy."""
    hook = vars(original).get("_hf_hook")
    if hook is not None and replaced_forward(original) is None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(net, hook)


def structure(net: nn.Module) -> tuple[Any, ...]:
    """What a copy of the layers depends on beside the numbers: the modules, their parameters, their settings."""
    return tuple(
        (id(module), type(module), *(id(p) for p in vars(module)["_parameters"].values()), *_settings(module))
        for module in net.modules()
    )


def _settings(module: nn.Module) -> Iterator[Any]:
    for key, value in vars(module).items():
        if not key.startswith("_") and key != "training":
            yield key, value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def sample_parameters(modules: Iterator[nn.Module] | list[nn.Module]) -> tuple[tuple[Any, ...], Tensor]:
    """A few numbers of every parameter that the modules hold themselves, by which a change of them is seen: what cannot
    be seen otherwise, since `weight.data += ...` leaves no trace."""
    kinds: list[Any] = []
    found: list[Tensor] = []
    for module in modules:
        for p in vars(module)["_parameters"].values():
            if p is None or not p.numel():
                continue
            kinds.append((tuple(p.shape), p.dtype))
            flat = p.detach()
            if p.is_floating_point():
                step = max(p.numel() // PROBES, 1)
                found.append(flat.as_strided((min(PROBES, p.numel()),), (step,), flat.storage_offset()).float())
    return tuple(kinds), torch.cat(found).cpu() if found else torch.zeros(0)


def changed(before: tuple[tuple[Any, ...], Tensor], now: tuple[tuple[Any, ...], Tensor]) -> bool:
    """Whether two fingerprints differ."""
    return before[0] != now[0] or not torch.equal(before[1], now[1])


class OriginalNetwork:
    """The network that was given to be accelerated: whether its layers or its parameters are others than then."""

    def __init__(self, net: nn.Module) -> None:
        self.net = weakref.ref(net)
        self.state = _layout(net)

    def left(self, net: nn.Module) -> bool:
        """Whether it has changed since, and `net`, made from it, does not have the same layers and numbers."""
        given = self.net()
        if given is None or _layout(given) == self.state:
            return False
        return changed(sample_parameters(list(given.modules())), sample_parameters(list(net.modules())))


def _layout(net: nn.Module) -> list[Any]:
    return [(id(module), *(id(p) for p in vars(module)["_parameters"].values())) for module in net.modules()]


class ExchangedLayers:
    """Layers that stand in for others of a network while it runs, whatever is put around these later (LoRA).

    net: the network, which keeps its own layers. other: a copy of it in which some layers were exchanged.
    """

    def __init__(self, net: nn.Module, other: nn.Module | None = None) -> None:
        self.net = net
        self.pairs: dict[int, tuple[nn.Module, nn.Module]] = {}
        if other is not None:
            self._compare(net, other)
        self.renew()

    def __bool__(self) -> bool:
        return bool(self.pairs)

    @property
    def others(self) -> list[nn.Module]:
        """The layers that stand in."""
        return [other for _, other in self.pairs.values()]

    def _compare(self, own: nn.Module, other: nn.Module) -> None:
        for name, child in vars(own)["_modules"].items():
            new = vars(other)["_modules"].get(name)
            if child is None or new is None or new is child:
                continue
            held = [vars(each)[kind] for kind in ("_parameters", "_buffers") for each in (child, new)]
            same = all(a.get(key) is b.get(key) for a, b in (held[:2], held[2:]) for key in {**a, **b})
            if type(child) is type(new) and same:
                self._compare(child, new)
            else:
                self.pairs[id(child)] = child, new

    def renew(self) -> None:
        """Take the network's present numbers for those that the layers were made from."""
        self.print = sample_parameters([layer for own, _ in self.pairs.values() for layer in own.modules()])
        self.slots: list[tuple[dict[str, Any], str, nn.Module, nn.Module]] = []

    def outdated(self) -> bool:
        """Whether the network's own layers have changed since."""
        return bool(self) and changed(
            self.print, sample_parameters([layer for own, _ in self.pairs.values() for layer in own.modules()])
        )

    def find(self) -> None:
        """Find where the layers are now."""
        self.slots = [
            (vars(module)["_modules"], name, *self.pairs[id(child)])
            for module in self.net.modules()
            for name, child in vars(module)["_modules"].items()
            if id(child) in self.pairs
        ]

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Within it the network has the other layers."""
        if not self.slots and self.pairs:
            self.find()
        for held, name, _, other in self.slots:
            held[name] = other
        try:
            yield
        finally:
            for held, name, own, _ in self.slots:
                held[name] = own

    def copied(self, net: nn.Module, copy: Callable[[Any], Any]) -> ExchangedLayers:
        """The same for a copy of the network, whose modules have the same names."""
        made = ExchangedLayers(net)
        for name, module in self.net.named_modules():
            if id(module) in self.pairs:
                own = net.get_submodule(name)
                made.pairs[id(own)] = own, copy(self.pairs[id(module)][1])
        made.renew()
        return made
