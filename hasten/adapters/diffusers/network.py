"""Copies of a pipeline's network that share its weights, without the hooks around its `forward`."""

from __future__ import annotations

import types
import warnings
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
    "check_offloading",
    "compiled_parts",
    "copy_offload_hook",
    "sample_parameters",
    "diffusers_hooks",
    "separate_unhooked",
    "replaced_forward",
    "separate",
    "structure",
    "uncompiled",
    "warn_of_compiled",
]

AROUND = (
    "forward",
    "_old_forward",
    "_hf_hook",
    "_diffusers_hook",
    "_compiled_call_impl",
)  # attributes around the network's own forward
PROBES = 8  # entries of each parameter that are compared


def compiled_parts(net: nn.Module) -> list[str]:
    """The parts of a network that torch compiles: the network by `torch.compile` or its own `compile`, or blocks inside
    (`compile_repeated_blocks`); "" is the network."""
    inner = uncompiled(net)
    own = [name for name, module in inner.named_modules() if vars(module).get("_compiled_call_impl") is not None]
    return [""] if inner is not net and "" not in own else own


def warn_of_compiled(component: nn.Module, slot: str, stacklevel: int) -> None:
    """Warn where torch compiles a pipeline's network or parts of it: hasten's copies run uncompiled.

    Args:
        component: of the pipeline.
        slot: its name.
        stacklevel: of the warning, counted from the caller.
    """
    if not (parts := compiled_parts(component)):
        return
    what = f"the {slot} was" if parts[0] == "" else f"{len(parts)} blocks of the {slot} were"
    warnings.warn(
        f"{what} compiled by torch.compile: hasten takes the {type(uncompiled(component)).__name__} inside it, "
        'which runs uncompiled; add the accelerator "compile" for a compiled one',
        stacklevel=stacklevel + 1,
    )


def check_offloading(net: nn.Module, kind: str) -> None:
    """Refuse a network that runs elsewhere than where its weights are kept (`enable_model_cpu_offload`).

    Args:
        net: the network.
        kind: class of its pipeline.

    Raises:
        BadInput: with what would work.
    """
    target = getattr(vars(net).get("_hf_hook"), "execution_device", None)
    here = next((p.device.type for p in net.parameters()), "meta")
    if target is None or here == "meta" or (there := torch.device(target)).type == here:
        return
    raise BadInput(
        f"this {kind} keeps its weights on the {here.upper()} and moves them to {there} (enable_model_cpu_offload), "
        f"which a Model does not: hasten.load(pipe, device={str(there)!r}) keeps the network there, "
        "hasten.as_scheduler and hasten.accelerate leave the offloading as it is"
    )


def uncompiled(net: nn.Module) -> nn.Module:
    """The network inside `torch.compile`'s wrapper, or the network itself."""
    inner = getattr(net, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) and type(net).__name__ == "OptimizedModule" else net


def without_hooks(net: nn.Module) -> Any:
    """A copy of the network object with the same children, without hooks around its `forward`."""
    new = object.__new__(type(net))
    vars(new).update({key: value for key, value in vars(net).items() if key not in AROUND})
    config = vars(net).get("_internal_dict")
    if config is not None:  # which an IP-Adapter modifies
        own = type(config)(config)
        vars(own).update(vars(config))
        vars(new)["_internal_dict"] = own
    return new


def separate(net: nn.Module) -> Any:
    """A copy of the network's modules that shares the memory of its weights.

    Moving, casting, freezing, changing the memory format of, or extending (LoRA) one does not affect the other. Modules
    inside with hooks on their `forward` are shared, and so are all where a hook of diffusers on the network itself
    moves their weights.

    Raises:
        BadInput: where the weights are not in memory (sequential offloading).
    """
    if any(p.device.type == "meta" for p in net.parameters()):
        raise BadInput(
            f"the weights of {type(net).__name__} are not in memory (sequential CPU offload): pass hasten the pipeline "
            "before pipe.enable_sequential_cpu_offload(), or use pipe.enable_model_cpu_offload()"
        )
    return (
        without_hooks(net)
        if diffusers_hooks(net) or replaced_forward(net)
        else copy_modules(without_hooks(net), own_parameters(net))
    )


def separate_unhooked(net: nn.Module) -> nn.Module:
    """`separate` for a `Model`, which calls the parts of a network and not its `forward`.

    Raises:
        BadInput: for hooks and patches on the network itself, which would not run.
    """
    with_hooks = [name for name in ("_forward_pre_hooks", "_forward_hooks") if vars(net)[name]]
    patch = replaced_forward(net)
    if with_hooks or patch is not None or diffusers_hooks(net):
        what = "its forward was replaced" if patch is not None else "it has forward hooks"
        raise BadInput(
            f"hasten.load calls the parts of this {type(net).__name__}, and {what} (tomesd, DeepCache, group offload, "
            "...): remove that first, or use the pipeline with hasten.accelerate or hasten.as_scheduler"
        )
    return separate(net)


def replaced_forward(net: nn.Module) -> Callable[..., Any] | None:
    """A `forward` that was set on the network object; None where there is none, or only hooks around the class's.

    See `diffusers_hooks` and `copy_offload_hook`.
    """
    return None if _innermost(net) is None else vars(net)["forward"]


def diffusers_hooks(net: nn.Module) -> list[Any]:
    """The hooks of diffusers around the network's own `forward`, the outermost first (group offloading)."""
    registry = vars(net).get("_diffusers_hook")
    if "forward" not in vars(net) or registry is None or "_hf_hook" in vars(net):
        return []
    return [registry.hooks[name] for name in reversed(registry._hook_order)]


def _innermost(net: nn.Module) -> Any:
    """The function that the hooks around the network's `forward` call last, None where that is its class's."""
    attributes = vars(net)
    forward = attributes.get("forward")
    while forward is not None:
        registry = attributes.get("_diffusers_hook")
        if isinstance(forward, types.MethodType) and forward.__func__ is type(net).forward:
            return None
        if "_hf_hook" in attributes and _wraps(forward, attributes.get("_old_forward")):
            forward, attributes = attributes["_old_forward"], {}
        elif (
            registry is not None
            and registry._fn_refs
            and all(ref.original_forward is None for ref in registry._fn_refs)
        ):
            forward, attributes = registry._fn_refs[0].forward, {}
        else:
            return forward
    return None


def _wraps(forward: Any, old: Any) -> bool:
    """Whether `forward` is accelerate's wrapper of `old`."""
    return old is not None and getattr(forward, "__wrapped__", None) in (old, getattr(old, "__wrapped__", old))


def copy_offload_hook(net: nn.Module, original: nn.Module) -> None:
    """Add the hook that accelerate has on the original (offloading) to the copy."""
    hook = vars(original).get("_hf_hook")
    if hook is not None and replaced_forward(original) is None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(net, hook)


def structure(net: nn.Module) -> tuple[Any, ...]:
    """All that a copy of the layers depends on beside the weights: modules, parameter objects, settings."""
    return tuple(
        (id(module), type(module), *(id(p) for p in vars(module)["_parameters"].values()), *_settings(module))
        for module in net.modules()
    )


def _settings(module: nn.Module) -> Iterator[Any]:
    """The public attributes of a module."""
    for key, value in vars(module).items():
        if not key.startswith("_") and key != "training":
            yield key, value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def sample_parameters(modules: Iterator[nn.Module] | list[nn.Module]) -> tuple[tuple[Any, ...], Tensor]:
    """A few entries of every parameter, to detect changes: `weight.data += ...` leaves no other trace.

    Args:
        modules: whose own parameters are sampled.

    Returns:
        Shapes and dtypes, and the entries, float32 on the CPU.
    """
    kinds: list[Any] = []
    samples: list[Tensor] = []
    for module in modules:
        for p in vars(module)["_parameters"].values():
            if p is None or not p.numel():
                continue
            kinds.append((tuple(p.shape), p.dtype))
            flat = p.detach()
            if p.is_floating_point() and not hasattr(p, "__tensor_flatten__"):
                step = max(p.numel() // PROBES, 1)
                samples.append(flat.as_strided((min(PROBES, p.numel()),), (step,), flat.storage_offset()).float())
    return tuple(kinds), torch.cat(samples).cpu() if samples else torch.zeros(0)


def changed(before: tuple[tuple[Any, ...], Tensor], now: tuple[tuple[Any, ...], Tensor]) -> bool:
    """Whether two results of `sample_parameters` differ."""
    return before[0] != now[0] or not torch.equal(before[1], now[1])


class OriginalNetwork:
    """The network passed to `accelerate`, weakly referenced, to detect that it changed since."""

    def __init__(self, net: nn.Module) -> None:
        self.net = weakref.ref(net)
        self.state = _layout(net)

    def diverged(self, net: nn.Module) -> bool:
        """Whether it has changed since, and `net`, its copy, does not have the same layers and weights."""
        original = self.net()
        if original is None or _layout(original) == self.state:
            return False
        return changed(sample_parameters(list(original.modules())), sample_parameters(list(net.modules())))


def _layout(net: nn.Module) -> list[Any]:
    """The modules and parameter objects of a network."""
    return [(id(module), *(id(p) for p in vars(module)["_parameters"].values())) for module in net.modules()]


class ExchangedLayers:
    """Layers that replace others of a network while it is evaluated, whatever wraps these later (LoRA).

    Args:
        net: the network, whose own layers stay.
        other: a copy of it in which some layers were replaced.
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
    def replacements(self) -> list[nn.Module]:
        """The layers that replace those of the network."""
        return [other for _, other in self.pairs.values()]

    def _compare(self, own: nn.Module, other: nn.Module) -> None:
        """Record the layers that differ between two networks."""
        for name, child in vars(own)["_modules"].items():
            new = vars(other)["_modules"].get(name)
            if child is None or new is None or new is child:
                continue
            tensors = [vars(each)[kind] for kind in ("_parameters", "_buffers") for each in (child, new)]
            same = all(a.get(key) is b.get(key) for a, b in (tensors[:2], tensors[2:]) for key in {**a, **b})
            if type(child) is type(new) and same:
                self._compare(child, new)
            else:
                self.pairs[id(child)] = child, new

    def renew(self) -> None:
        """Take the network's present weights for those that the layers were made from."""
        self.samples = sample_parameters([layer for own, _ in self.pairs.values() for layer in own.modules()])
        self.slots: list[tuple[dict[str, Any], str, nn.Module, nn.Module]] = []

    def outdated(self) -> bool:
        """Whether the network's own layers have changed since."""
        return bool(self) and changed(
            self.samples, sample_parameters([layer for own, _ in self.pairs.values() for layer in own.modules()])
        )

    def locate(self) -> None:
        """Locate the layers in the network."""
        self.slots = [
            (vars(module)["_modules"], name, *self.pairs[id(child)])
            for module in self.net.modules()
            for name, child in vars(module)["_modules"].items()
            if id(child) in self.pairs
        ]

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Within the block the network has the replaced layers."""
        if not self.slots and self.pairs:
            self.locate()
        for children, name, _, other in self.slots:
            children[name] = other
        try:
            yield
        finally:
            for children, name, own, _ in self.slots:
                children[name] = own

    def copied(self, net: nn.Module, copy: Callable[[Any], Any]) -> ExchangedLayers:
        """The same for a copy of the network, whose modules have the same names."""
        layers = ExchangedLayers(net)
        for name, module in self.net.named_modules():
            if id(module) in self.pairs:
                own = net.get_submodule(name)
                layers.pairs[id(own)] = own, copy(self.pairs[id(module)][1])
        layers.renew()
        return layers
