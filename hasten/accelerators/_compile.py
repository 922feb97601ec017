"""`CompiledNet`: a network whose parts run compiled, with the split points that it had."""

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
from ..utils.devices import synchronize

__all__ = ["CompiledGraph", "CompiledNet"]

PARTS = ("embed", "encode", "decode", "shallow_encode", "deep", "shallow_decode", "run", "finish", "forward")

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class CompiledGraph:
    """A graph that was compiled.

    Attributes:
        part: the network's method.
        rows: the batch size; 0 for a dynamic graph.
        cold: seconds of the first call, which compiles.
        warm: seconds of the second.
    """

    part: str
    rows: int
    cold: float
    warm: float


class CompiledNet(nn.Module):
    """A network of which each part is compiled by itself. In all else it is the network, whose weights it shares.

    With `embed`, `encode` and `decode` (a U-Net) or `embed`, `blocks`, `run` and `finish` (a transformer) these are
    the parts, so that features can still be cached between them; any other network is one part. Parts that are never
    called are not compiled. Where a gradient is needed the network itself runs.

    Args:
        net: the network.
        compiler: compiles a function.
        graphs: the maximum number of graphs per part; other inputs (a last, smaller batch) run uncompiled.
        dynamic: one graph for all batch sizes.
        copies: clone the outputs, which the compiler overwrites at its next call.
    """

    def __init__(
        self,
        net: nn.Module,
        compiler: Callable[[Function], Function],
        graphs: int,
        dynamic: bool = False,
        copies: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.built: list[CompiledGraph] = []
        self.parts: dict[str, CompiledPart] = {
            name: CompiledPart(name, getattr(net, name), compiler, self.built, graphs, dynamic, copies)
            for name in PARTS
            if callable(getattr(net, name, None))
        }
        self.train(net.training)

    @property
    def cold_seconds(self) -> float:
        """Seconds of all first calls so far: the cost of compiling."""
        return sum(graph.cold for graph in self.built)

    @property
    def warm_seconds(self) -> float:
        """Seconds of one evaluation at the first batch size: the second call of each part's first graph."""
        first = {graph.part: graph.warm for graph in reversed(self.built)}
        return sum(first.values())

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """The network's raw output (B, *S)."""
        parts = self.parts
        if {"embed", "encode", "decode"} <= parts.keys():
            emb = parts["embed"](time, **cond)
            return parts["decode"](*parts["encode"](x, emb), emb)
        if {"embed", "run", "finish"} <= parts.keys():
            tokens, emb = parts["embed"](x, time, **cond)
            net: Any = self.net
            return parts["finish"](parts["run"](0, len(net.blocks), tokens, emb), emb)
        return parts["forward"](x, time, **cond)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            parts = self.__dict__.get("parts", {})
            return parts[name] if name in parts else getattr(super().__getattr__("net"), name)


class CompiledPart:
    """A function of tensors with a compiled graph for each kind of input: shapes, dtypes and plain values.

    Args:
        name: of the function, for messages.
        plain: the function.
        compiler, graphs, dynamic, copies: see `CompiledNet`.
        built: a list to which its graphs are added.
    """

    def __init__(
        self,
        name: str,
        plain: Function,
        compiler: Callable[[Function], Function],
        built: list[CompiledGraph],
        graphs: int,
        dynamic: bool,
        copies: bool,
    ) -> None:
        self.name, self.plain, self.compiler, self.built = name, plain, compiler, built
        self.graphs, self.dynamic, self.copies = graphs, dynamic, copies
        self.compiled: dict[Any, Function] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = list(tensors_in((args, kwargs)))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return self.plain(*args, **kwargs)
        device = tensors[0].device.type if tensors else "cpu"
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = cast, input_signature((args, kwargs), self.dynamic)
        with torch.no_grad():
            if key in self.compiled:
                return self._copied(self.compiled[key](*args, **kwargs))
            if len(self.compiled) >= self.graphs:
                return self.plain(*args, **kwargs)
            return self._copied(self._compile(key, tensors, args, kwargs))

    def _compile(self, key: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Compile for these inputs; the first call and one more are timed."""
        if self.dynamic:
            for tensor in tensors:
                if tensor.ndim and len(tensor) > 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        fast = self.compiler(with_own_code(self.plain))
        try:
            trial_args, trial_kwargs = clone_tensors((args, kwargs))  # a network may change its inputs in place
            start = synchronized_time(tensors)
            fast(*trial_args, **trial_kwargs)
            middle = synchronized_time(tensors)
        except Exception as e:
            if type(e).__module__.partition(".")[0] != "torch":
                raise
            first = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
            raise BadInput(f"compile failed on {self.name}: {type(e).__name__}: {first[:300]}") from e
        output = fast(*args, **kwargs)
        rows = 0 if self.dynamic else max((len(tensor) for tensor in tensors if tensor.ndim), default=0)
        self.built.append(CompiledGraph(self.name, rows, middle - start, synchronized_time(tensors) - middle))
        self.compiled[key] = fast
        return output

    def _copied(self, output: Any) -> Any:
        """The output, as clones where the compiler will overwrite it."""
        return clone_tensors(output) if self.copies else output

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledPart:
        raise BadInput("a compiled network cannot be copied: copy the network that was compiled")


def with_own_code(plain: Function) -> Function:
    """The same function with a code object of its own: the compiler counts graphs by code, and stops at eight."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    code = call.__code__.replace()
    return types.FunctionType(code, call.__globals__, call.__name__, call.__defaults__, call.__closure__)


def clone_tensors(tree: Any) -> Any:
    """The same tree with clones of its tensors."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors inside lists, tuples, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, field.name) for field in dataclasses.fields(value)])


def input_signature(value: Any, dynamic: bool = False) -> Any:
    """What decides whether a graph fits an input: structure, shapes, dtypes, layout and plain values, hashable.

    Args:
        value: any tree of tensors and plain values.
        dynamic: leave out the batch size.
    """
    if isinstance(value, Tensor):
        shape = tuple(value.shape)
        shape = (min(shape[0], 2), *shape[1:]) if dynamic and shape else shape
        return shape, value.dtype, str(value.device), value.is_contiguous(), value.is_inference()
    if isinstance(value, (list, tuple)):
        return type(value), *(input_signature(item, dynamic) for item in value)
    if isinstance(value, dict):
        return tuple((key, input_signature(value[key], dynamic)) for key in sorted(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return type(value), *(input_signature(getattr(value, field.name), dynamic) for field in fields)
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value)


def synchronized_time(tensors: list[Tensor]) -> float:
    """`time.perf_counter()` after the device of the tensors has finished its work."""
    if tensors:
        synchronize(tensors[0].device)
    return time.perf_counter()


@contextlib.contextmanager
def freezing_weights(freezing: bool) -> Iterator[None]:
    """Within the block inductor treats weights as constants."""
    if not freezing:
        yield
        return
    from torch._inductor import config

    with config.patch(freezing=True):
        yield
