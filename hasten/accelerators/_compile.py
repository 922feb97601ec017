"""`CompiledNet`: a network whose parts run compiled, behind the seams that it had."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import BadInput

__all__ = ["Built", "CompiledNet"]

PARTS = ("embed", "encode", "decode", "shallow_encode", "deep", "shallow_decode", "run", "finish", "forward")


@dataclasses.dataclass(frozen=True)
class Built:
    """A graph that was built: of which part, for how many rows (0: any), the seconds of its first and second call."""

    part: str
    rows: int
    cold: float
    warm: float


class CompiledNet(nn.Module):
    """A network of which each part is compiled by itself; for the rest it is the network, whose weights it shares.

    With `embed`, `encode` and `decode` (a U-Net) or `embed`, `blocks`, `run` and `finish` (a transformer) these are
    the parts, so that who keeps features between them still can; else the whole is one. Parts that nobody calls are
    not compiled. Where a gradient is wanted the network itself is run.

    compiler: what makes a function fast. graphs: how many graphs a part may have; for what comes then (a last, smaller
    batch) it runs as it is. dynamic: one graph is for all sizes of batch. copies: the compiler's answers last only
    until its next call, and must be copied.
    """

    def __init__(
        self,
        net: nn.Module,
        compiler: Callable[[Callable[..., Any]], Callable[..., Any]],
        graphs: int,
        dynamic: bool = False,
        copies: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.built: list[Built] = []
        self.parts: dict[str, Part] = {
            name: Part(name, getattr(net, name), compiler, self.built, graphs, dynamic, copies)
            for name in PARTS
            if callable(getattr(net, name, None))
        }
        self.train(net.training)

    @property
    def cold_seconds(self) -> float:
        """Seconds of all first calls so far: what compiling cost."""
        return sum(one.cold for one in self.built)

    @property
    def warm_seconds(self) -> float:
        """Seconds of one evaluation at the size of batch that was asked first: of each part's first graph."""
        first = {one.part: one.warm for one in reversed(self.built)}
        return sum(first.values())

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """The network's raw output."""
        own = self.parts
        if {"embed", "encode", "decode"} <= own.keys():
            emb = own["embed"](time, **cond)
            return own["decode"](*own["encode"](x, emb), emb)
        if {"embed", "run", "finish"} <= own.keys():
            tokens, emb = own["embed"](x, time, **cond)
            return own["finish"](own["run"](0, len(self.net.blocks), tokens, emb), emb)  # type: ignore[arg-type]
        return own["forward"](x, time, **cond)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            parts = self.__dict__.get("parts", {})
            return parts[name] if name in parts else getattr(super().__getattr__("net"), name)


class Part:
    """A function of tensors with a compiled copy for each kind of input that it meets."""

    def __init__(
        self,
        name: str,
        plain: Callable[..., Any],
        compiler: Callable[[Callable[..., Any]], Callable[..., Any]],
        built: list[Built],
        graphs: int,
        dynamic: bool,
        copies: bool,
    ) -> None:
        self.name, self.plain, self.compiler, self.built = name, plain, compiler, built
        self.graphs, self.dynamic, self.copies = graphs, dynamic, copies
        self.made: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *given: Any, **named: Any) -> Any:
        tensors = list(found((given, named)))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return self.plain(*given, **named)
        device = tensors[0].device.type if tensors else "cpu"
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = cast, signature((given, named), self.dynamic)
        with torch.no_grad():
            if key in self.made:
                return self._kept(self.made[key](*given, **named))
            if len(self.made) >= self.graphs:
                return self.plain(*given, **named)
            return self._kept(self._build(key, tensors, given, named))

    def _build(self, key: Any, tensors: list[Tensor], given: Any, named: Any) -> Any:
        """Compile for these inputs; both the first call and one more are timed."""
        if self.dynamic:
            for tensor in tensors:
                if tensor.ndim and len(tensor) > 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        fast = self.compiler(fresh(self.plain))
        try:
            trial_given, trial_named = copied((given, named))  # a network may change what it is given
            began = now(tensors)
            fast(*trial_given, **trial_named)
            middle = now(tensors)
        except Exception as e:
            if type(e).__module__.partition(".")[0] != "torch":
                raise
            first = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
            raise BadInput(f"compile failed on {self.name}: {type(e).__name__}: {first[:300]}") from e
        answer = fast(*given, **named)
        rows = 0 if self.dynamic else max((len(tensor) for tensor in tensors if tensor.ndim), default=0)
        self.built.append(Built(self.name, rows, middle - began, now(tensors) - middle))
        self.made[key] = fast
        return answer

    def _kept(self, answer: Any) -> Any:
        return copied(answer) if self.copies else answer

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        raise BadInput("a compiled network cannot be copied: copy the one that it was made from")


def fresh(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own: the compiler counts graphs by code, and stops at eight."""

    def call(*given: Any, **named: Any) -> Any:
        return plain(*given, **named)

    code = call.__code__.replace()
    return types.FunctionType(code, call.__globals__, call.__name__, call.__defaults__, call.__closure__)


def copied(tree: Any) -> Any:
    """The same tree with copies of its tensors."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def found(value: Any) -> Iterator[Tensor]:
    """The tensors inside lists, tuples, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from found(item)
    elif isinstance(value, dict):
        yield from found(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from found([getattr(value, field.name) for field in dataclasses.fields(value)])


def signature(value: Any, dynamic: bool = False) -> Any:
    """What decides whether a graph fits: structure, shapes (dynamic: but for the first size), dtypes, plain values."""
    if isinstance(value, Tensor):
        shape = tuple(value.shape)
        shape = (min(shape[0], 2), *shape[1:]) if dynamic and shape else shape
        return shape, value.dtype, str(value.device), value.is_contiguous(), value.is_inference()
    if isinstance(value, (list, tuple)):
        return type(value), *(signature(item, dynamic) for item in value)
    if isinstance(value, dict):
        return tuple((key, signature(value[key], dynamic)) for key in sorted(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), *(signature(getattr(value, field.name), dynamic) for field in dataclasses.fields(value))
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value)


def now(tensors: list[Tensor]) -> float:
    """Seconds of a clock, once the device has done what it was given."""
    if tensors and tensors[0].device.type == "cuda":
        torch.cuda.synchronize(tensors[0].device)
    elif tensors and tensors[0].device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(tensors[0].device)
    return time.perf_counter()


@contextlib.contextmanager
def frozen(freezing: bool) -> Iterator[None]:
    """Within the block inductor takes weights for constants."""
    if not freezing:
        yield
        return
    from torch._inductor import config

    with config.patch(freezing=True):
        yield
