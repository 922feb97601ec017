"""A pretended accelerator for the losses: tensors that call themselves `meta`, hold their numbers on the CPU, refuse
to be mixed with CPU tensors as a GPU does, and count what a GPU would have to wait for."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
COPIES: Counter[str] = Counter()
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
MAKERS = {"_to_copy", "copy_"}


class Remote(Tensor):
    """A tensor of the pretended device."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> Remote:
        made = Tensor._make_wrapper_subclass(cls, elem.size(), strides=elem.stride(), dtype=elem.dtype, device=DEVICE)
        made.elem = elem.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        COPIES["wait: tolist"] += 1
        return self.elem.tolist()

    def __deepcopy__(self, memo: Any) -> Tensor:
        made = Remote(self.elem.clone())
        return nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, where its tensors say."""
    name = func._schema.name.split("::")[1]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [t for t in tensors if isinstance(t, Remote)]
    asked = kwargs.get("device")
    remote = bool(here) if asked is None else torch.device(asked).type == "meta"
    apart = [t for t in tensors if not isinstance(t, Remote) and t.ndim]
    if here and name in WAITS:
        COPIES[f"wait: {name}"] += 1
    if name in MAKERS:
        source = args[-1] if name == "copy_" else args[0]
        target = isinstance(args[0], Remote) if name == "copy_" else remote
        if target and not isinstance(source, Remote):
            COPIES[f"to the device: {name} {tuple(source.shape)}"] += 1
        if isinstance(source, Remote) and not target:
            COPIES[f"wait: {name} to the CPU"] += 1
    elif here and apart:
        if name in INDEXED and isinstance(args[0], Remote):
            COPIES[f"to the device: {name} by CPU indices"] += 1
        else:
            raise RuntimeError(f"all tensors must be on one device, found cuda:0 and cpu ({name})")
    plain = tree_map(lambda leaf: leaf.elem if isinstance(leaf, Remote) else leaf, (args, kwargs))
    if asked is not None:
        plain[1]["device"] = torch.device("cpu")
    plain[1].pop("pin_memory", None)
    out = func(*plain[0], **plain[1])
    if name.endswith("_") and isinstance(args[0], Tensor):
        return args[0]
    if not remote:
        return out
    if name == "_to_copy" and out is plain[0][0]:
        out = out.clone()
    return tree_map(lambda leaf: Remote(leaf) if isinstance(leaf, Tensor) else leaf, out)


class Pretend(TorchDispatchMode):
    """Within, `meta` is the pretended device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def moved(module: nn.Module) -> nn.Module:
    """The module, on the pretended device."""
    for part in module.modules():
        for key, p in part._parameters.items():
            if p is not None and not isinstance(p.data, Remote):
                part._parameters[key] = nn.Parameter(Remote(p.data), p.requires_grad)
        for key, b in part._buffers.items():
            if b is not None and not isinstance(b, Remote):
                part._buffers[key] = Remote(b)
    return module


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """What is copied to the device, and waited for, inside."""
    COPIES.clear()
    found: Counter[str] = Counter()
    yield found
    found.update(COPIES)
