"""A pretended device for tests on machines without one: its tensors say `cuda:0` and hold their numbers on the CPU.

    with Pretended() as device:  # or Pretended("mps")
        model.to("cuda")
        x = torch.zeros(2, 3, device="cuda")
        model(x).sum().backward()
    assert device.count("wait") == 0, device.lines("wait")

What a real device refuses is refused: tensors of two devices in one operation (but CPU tensors without dimensions), a
CPU generator for a draw on the device, `numpy()`; on MPS also float64 and complex128. What costs time there is recorded
as an event with the line of hasten (else of diffusers, else of another library) that caused it:

    wait       the host waits for the device: item, bool, tolist, equal, nonzero, indices that are a mask, copies to the
               CPU, synchronize
    upload     a copy of a pageable CPU tensor, or of Python numbers, to the device, which waits too
    async      a non-blocking copy from pinned memory to the device, or to the CPU, which does not
    float64    a float64 tensor is made on the device
    widened    a copy to the CPU that changes the dtype to float64 on its way, which MPS cannot do (copy first)

`watch()` is a callback of sampling, after which `loop` has the events of the loop over the steps alone.

Autograd works. There is no second stream, so nothing is found out about the order of asynchronous work; kernels that
need real addresses (Triton, oneDNN's integer ones) cannot run.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.pretend_trees import collect, mapped, where

__all__ = ["Pretended", "PretendedTensor", "put", "put_pipeline", "taken"]

META, CPU = torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
WAITING = {
    aten._local_scalar_dense,
    aten.item,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.unique_dim,
    aten.unique_consecutive,
    aten._unique,
    aten._unique2,
    aten.bincount,
    aten._linalg_eigh,
    aten._linalg_svd,
}
MEMORY = ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "current_allocated_memory")
WIDE = {torch.float64, torch.complex128}
_active: list[Pretended] = []


class PretendedTensor(torch.Tensor):
    """A tensor on the pretended device; `held` is the CPU tensor with its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendedTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=META
        )
        made.held = held.detach()
        return made

    device = property(lambda self: _device())  # type: ignore[assignment]
    is_cuda = property(lambda self: _device().type == "cuda")  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendedTensor({self.held!r})"

    def tolist(self) -> Any:
        _record("wait")
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {_device()} device type tensor to numpy")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made = PretendedTensor(self.held.clone())
        return nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Pretended:
    """Within it, what is made on `kind` or moved there lies on the pretended device; the events are counted.

    Args:
        kind: "cuda" or "mps".
    """

    def __init__(self, kind: str = "cuda") -> None:
        self.device = torch.device(kind, 0)
        self.events: Counter[tuple[str, str]] = Counter()
        self.loop: Counter[tuple[str, str]] = Counter()
        self.recording = True
        self.pinned: dict[int, Any] = {}

    def __enter__(self) -> Pretended:
        backend = getattr(torch, self.device.type)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(backend, "synchronize", lambda *_: _record("wait")))
            for name in MEMORY:
                if hasattr(backend, name):
                    stack.enter_context(mock.patch.object(backend, name, lambda *_: 0))
            stack.enter_context(mock.patch.multiple(torch.Tensor, pin_memory=_pin_memory, is_pinned=_is_pinned))
            self._patches = stack.pop_all()
        _active.append(self)
        self._start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()
        _active.remove(self)
        self._patches.close()

    def watch(self, first: int = 1) -> Callable[..., None]:
        """A callback of sampling: `loop` then has the events between evaluation `first` (from 0) and the last one.

        Those before fill what is kept on the device.
        """
        before: Counter[tuple[str, str]] = Counter()

        def callback(step: int, *_: Any) -> None:
            if step <= first:
                before.clear()
                before.update(self.events)
            self.loop = self.events - before

        return callback

    def _start(self) -> None:
        self._modes = _Names(), _Operations()
        for mode in self._modes:
            mode.__enter__()

    def _stop(self) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within it torch is as it was."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def count(self, kind: str, inside: str = "hasten/") -> int:
        """How many events of a kind were caused by files whose path contains `inside` ("": all)."""
        return sum(number for (what, where), number in self.events.items() if what == kind and inside in where)

    def lines(self, kind: str | None = None, events: Counter[tuple[str, str]] | None = None) -> str:
        """The events, one line each, most frequent first."""
        events = self.events if events is None else events
        found = [(number, *event) for event, number in events.items() if kind in (None, event[0])]
        return "\n".join(f"{number:5d} x {what:8s} {where}" for number, what, where in sorted(found, reverse=True))

    def clear(self) -> None:
        """Forget the events so far."""
        self.events.clear()

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Within it no event is counted."""
        before, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = before


class _Names(TorchFunctionMode):
    """Calls that name the device name the one that torch has for the pretended tensors, meta."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name in ("tensor", "as_tensor", "new_tensor", "asarray"):
            return _from_numbers(func, name, args, kwargs)
        if name in ("cuda", "mps"):
            return args[0].to(META)
        if name in ("to", "type", "__get__"):
            args = tuple(META if _is_there(value) else value for value in args)
        if _is_there(kwargs.get("device")):
            kwargs["device"] = META
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def put(module: nn.Module) -> nn.Module:
    """Move a module to the pretended device, in place, without counting the copies."""
    for inner in module.modules():
        for tensors in (inner._parameters, inner._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None and not isinstance(tensor, PretendedTensor):
                    made: Any = PretendedTensor(tensor.detach().clone())
                    parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(made, tensor.requires_grad) if parameter else made
    return module


def put_pipeline(pipe: Any) -> Any:
    """Move the networks of a pipeline to the pretended device, in place, but for its text encoders (transformers wants
    real tensors): what they make is moved."""
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and not name.startswith("text_encoder"):
            put(part)
    if hasattr(pipe, "encode_prompt"):
        original = pipe.encode_prompt

        @functools.wraps(original)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(original).bind(*args, **kwargs)
            given.arguments["device"] = CPU
            with _active[-1].suspended() if _active else nullcontext():
                made = original(*given.args, **given.kwargs)
            return tree_map_only(torch.Tensor, PretendedTensor, made)

        pipe.encode_prompt = encode_prompt
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {"_execution_device": property(lambda self: _device())})
    return pipe


def taken(value: Any) -> Any:
    """A tree with the numbers of its tensors on the CPU."""
    return tree_map_only(PretendedTensor, lambda x: x.held, value)


def _device() -> torch.device:
    """The pretended device; outside a `Pretended` a CUDA one."""
    return _active[-1].device if _active else torch.device("cuda", 0)


def _is_there(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == _device().type


def _pin_memory(tensor: Tensor, *_: Any) -> Tensor:
    if isinstance(tensor, PretendedTensor) or _device().type == "mps":
        raise RuntimeError(f"cannot pin a tensor of {tensor.device} here: only CPU tensors, for CUDA or XPU")
    made = tensor.clone()
    _active[-1].pinned[made.untyped_storage().data_ptr()] = made  # kept, so that its address is not used again
    return made


def _is_pinned(tensor: Tensor, *_: Any) -> bool:
    there = isinstance(tensor, PretendedTensor)
    return not there and tensor.untyped_storage().data_ptr() in _active[-1].pinned


def _from_numbers(func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """`torch.tensor` and the like: from numbers or a tensor, wherever it is."""
    source = args[1] if name == "new_tensor" else args[0]
    device = kwargs.get("device", args[0].device if name == "new_tensor" else None)
    if isinstance(source, Tensor):
        made = source.to(kwargs.get("dtype") or source.dtype)
        made = made if device is None else made.to(device)
        return made if name in ("as_tensor", "asarray") else made.detach().clone()
    if name == "new_tensor":
        func, kwargs = torch.tensor, {"dtype": args[0].dtype, **kwargs}
    if any(isinstance(leaf, PretendedTensor) for leaf in tree_leaves(source)):
        _record("wait")
        source = tree_map_only(PretendedTensor, lambda x: x.held.item() if x.ndim == 0 else x.held.tolist(), source)
    if not _is_there(device):
        return func(source, *args[1:], **kwargs) if func is not torch.tensor else torch.tensor(source, **kwargs)
    with torch._C.DisableTorchFunction():
        made = torch.as_tensor(source, dtype=kwargs.get("dtype"))
    _record("upload")
    _check_dtype(made.dtype)
    return PretendedTensor(made.clone()).requires_grad_(bool(kwargs.get("requires_grad", False)))


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation of torch, on tensors of both devices."""
    name = getattr(func, "_overloadpacket", func)
    tensors: list[Tensor] = []
    collect((args, kwargs), tensors)
    there = [tensor for tensor in tensors if isinstance(tensor, PretendedTensor)]
    wanted = kwargs.get("device")
    there_after = bool(there) if wanted is None else torch.device(wanted).type in (_device().type, "meta")
    if name is aten._fused_sdp_choice:
        return 0  # attention by plain matrix products
    if name is aten._to_copy:
        _record_copy(args[0], there_after, kwargs.get("dtype"), bool(kwargs.get("non_blocking")))
    elif name is aten.copy_:
        _record_copy(args[1], isinstance(args[0], PretendedTensor), None, len(args) > 2 and bool(args[2]))
    elif there:
        _checked(name, args, kwargs, tensors)
    if kwargs.get("generator") is not None and there_after and kwargs["generator"].device.type == "cpu":
        raise RuntimeError(f"Expected a '{_device().type}' device type for generator but found 'cpu'")
    if wanted is not None:
        kwargs = {**kwargs, "device": CPU}
    kwargs.pop("pin_memory", None)
    made = (
        func(*mapped(args, PretendedTensor, _held), **mapped(kwargs, PretendedTensor, _held))
        if there
        else func(*args, **kwargs)
    )
    known = {id(tensor.held): tensor for tensor in there}

    def placed(tensor: Tensor) -> Tensor:
        if id(tensor) in known:  # an operation in place, or into `out`
            return known[id(tensor)]
        if not there_after:
            return tensor
        _check_dtype(tensor.dtype)
        return PretendedTensor(tensor)

    return mapped(made, Tensor, placed)


def _held(tensor: PretendedTensor) -> Tensor:
    return tensor.held


def _checked(name: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
    """Record what waits, and refuse what a device refuses."""
    indices = args[1] if name in INDEXING else ()
    masks = any(isinstance(one, Tensor) and one.dtype == torch.bool for one in indices)
    filled = masks and name is not aten.index and args[2].numel() == 1  # by masked_fill
    sized = name is aten.repeat_interleave and kwargs.get("output_size") is None
    if name in WAITING or sized or (masks and not filled):
        _record("wait")
    other = [tensor for tensor in tensors if not isinstance(tensor, PretendedTensor) and tensor.ndim]
    if not other:
        return
    if name in INDEXING and isinstance(tensors[0], PretendedTensor):
        _record("upload")  # CPU tensors may be indices
        return
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {_device()} and cpu! "
        f"({name}, a CPU tensor of shape {tuple(other[0].shape)}, at {where()})"
    )


def _check_dtype(dtype: torch.dtype, counted: bool = True) -> None:
    """Record a tensor of this dtype on the device, or refuse it."""
    if dtype in WIDE and _device().type == "mps":
        raise TypeError(f"Cannot convert a MPS Tensor to {dtype}: MPS has none (at {where()})")
    if dtype in WIDE and counted:
        _record("float64")


def _record_copy(source: Tensor, there_after: bool, dtype: torch.dtype | None, non_blocking: bool) -> None:
    there_before = isinstance(source, PretendedTensor)
    cuda = _device().type == "cuda"  # where a non-blocking copy to the CPU is to pinned memory
    if there_before and not there_after:
        _record("async" if non_blocking and cuda else "wait")
        if dtype == torch.float64 and source.dtype != torch.float64:
            _record("widened")
            _check_dtype(dtype, counted=False)
    if there_after and not there_before:
        _record("async" if non_blocking and source.is_pinned() else "upload")


def _record(kind: str) -> None:
    if _active and _active[-1].recording:
        _active[-1].events[kind, where()] += 1
