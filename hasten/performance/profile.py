"""What an evaluation of a network is made of, from its shapes alone: operations, and what patches of it exchange."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..accelerators._patches.exchange import RowPartition
from ..accelerators._patches.swap import ASIDE, core_of
from ..errors import BadInput

if TYPE_CHECKING:
    from .hardware import Device, ParallelLayout

__all__ = ["Op", "Message", "Workload", "work_of"]

KINDS = ("halo", "keys", "moments", "rows", "branches")


@dataclass(frozen=True)
class Op:
    """An operation: its macs; bytes of memory that grow with the rows (`moving`) and that do not (`still`); whether it
    is on rows (`parted`); whether it is of a text, and kept while the image is sampled."""

    macs: int
    moving: int
    still: int
    parted: bool
    text: bool = False


@dataclass(frozen=True)
class Message:
    """A tensor that ranks exchange. kind: "halo": `count` numbers a row, `rows` rows, of which `above` and `below` are
    needed; "keys", "rows": `count` numbers of the whole image; "moments": `count` numbers of each rank, of a map of
    `rows` numbers of `width` bytes. size: bytes a number."""

    kind: str
    count: int
    size: int
    rows: int = 0
    above: int = 0
    below: int = 0
    width: int = 0

    def sent(self, way: ParallelLayout, units: Sequence[int], me: int) -> int:
        """Bytes that rank `me` sends, where the ranks have `units` of the coarsest rows."""
        others, most, all_ = len(units) - 1, max(units), sum(units)
        if self.kind == "halo":
            there = self.below * (me > 0) + self.above * (me < others)
            return self.count * self.size * (there if way.neighbours else 2 * max(self.above, self.below) * others)
        if self.kind == "moments":
            return self.count * self.size * others
        size = 2 if self.kind == "keys" and way.keys == "bf16" else self.size
        return self.count * most // all_ * size * others

    def moved(self, way: ParallelLayout, share: float) -> float:
        """Bytes more in memory than on one device."""
        if self.kind == "halo":  # rows and halo are joined: read and written
            return 2 * self.count * self.rows * self.size * share
        if self.kind == "moments":
            size = self.width
            own = self.rows * share
            if way.neighbours:  # scaled and shifted; to float32, wider there, and back, where it is none
                return own * (4 * size if size >= 4 else 32)
            return own * 9 * size  # E[x], x^2, E[x^2], x - m, / s, * w, + b: 12 for 3
        if self.kind == "keys":  # own ones are said, those of others heard; all are put together
            size = 2 if way.keys == "bf16" else self.size
            return self.count * (2 * share * size + (1 - share) * size + size + self.size)
        return 0.0

    def drawn_on(self, way: ParallelLayout, share: float) -> float:
        """Bytes more in memory where others' keys are drawn on: those of one evaluation more are read."""
        size = 2 if way.keys == "bf16" else self.size
        return (1 - share) * self.count * size if self.kind == "keys" and way.forecast else 0.0


@dataclass(frozen=True)
class Workload:
    """An evaluation of a batch: its operations, what patches exchange (None: not a network that they know), how many
    rows the coarsest level has, bytes of the answer; `half`: the same for the larger half of the batch."""

    batch: int
    ops: tuple[Op, ...]
    talks: tuple[Message, ...] | None
    units: int
    answer: int
    half: Workload | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of an evaluation on one device."""
        return sum(op.macs for op in self.ops)

    def macs_of(self, share: float, first: bool = True) -> float:
        """Those of a rank with a share of the rows. first: the text is new."""
        return sum(op.macs * (share if op.parted else 1) for op in self.ops if first or not op.text)

    def shares(self, group: int) -> tuple[int, ...]:
        """Rows of the coarsest level that each rank has, as even as can be. Raises BadInput for too few of them."""
        if group > 1 and self.talks is None:
            raise BadInput(
                "rows are parted in hasten's UNet and in UNet2DModel and UNet2DConditionModel of diffusers, "
                "this is none of them: 2 ranks can have a branch each"
            )
        if group > self.units:
            raise BadInput(
                f"{self.units} rows of the coarsest level cannot be parted in {group} (choices: 1 to {self.units})"
            )
        return RowPartition.of(self.units, group, 0).units

    def sent(self, way: ParallelLayout, rank: int = 0, later: bool = False) -> dict[str, int]:
        """Bytes that a rank sends in an evaluation, by kind. later: not one of the first, synchronous ones."""
        work, found = self._of(way), dict.fromkeys(KINDS, 0)
        shares = work.shares(way.group)
        for talk in work._talks(way, later):
            found[talk.kind] += talk.sent(way, shares, rank % way.group)
        found["branches"] = work.answer if way.ranks > way.group else 0
        return found

    def messages(self, way: ParallelLayout, later: bool = False) -> dict[str, int]:
        """How often a rank speaks: "gather" (keys, moments), "neighbours" (halos), "rows", "branches"."""
        late = later and way.mode == "async"
        kinds = [talk.kind for talk in self._of(way)._talks(way, later)]
        halos, keys, norms = (kinds.count(kind) for kind in ("halo", "keys", "moments"))
        if late:
            fresh = norms if way.norm == "full" else 0
            gathers, halos = -(-(keys + norms - fresh) // way.chunk) + fresh, -(-halos // way.chunk)
        else:
            gathers = keys + norms
        rows = kinds.count("rows")
        return {"gather": gathers, "neighbours": halos, "rows": rows, "branches": int(way.ranks > way.group)}

    def seconds(self, device: Device, share: float = 1.0, more: float = 0.0, first: bool = True) -> float:
        """Of an evaluation on a rank with a share of the rows, which moves so many bytes `more`."""
        done = [op for op in self.ops if first or not op.text]
        spent = more / device.memory_bandwidth
        for op in done:
            part = share if op.parted else 1.0
            read = op.still + op.moving * part
            spent += max(2 * op.macs * part / device.flops, read / device.memory_bandwidth)
        return max(spent, len(done) * device.launch)

    def _of(self, way: ParallelLayout) -> Workload:
        if way.ranks == way.group:
            return self
        if self.half is None:
            raise BadInput("a batch of one row has no two branches: profile the batch that guidance asks for")
        return self.half

    def _talks(self, way: ParallelLayout, later: bool) -> list[Message]:
        if way.group == 1 or self.talks is None:
            return []
        silent = later and way.mode == "async" and way.norm == "separate"
        return [talk for talk in self.talks if not (silent and talk.kind == "moments")]


def work_of(net: nn.Module, shape: Sequence[int], dtype: torch.dtype | None = None, **cond: Any) -> Workload:
    """What `net(x, time, **cond)` does for x of `shape` (B, C, H, W), found on a copy without memory or arithmetic.

    It is run there at H and 2 H rows, and for half of the batch again: what grows with H can be parted. Macs are those
    of products, convolutions and attention, as `hasten.performance.cost` counts them.

    net: hasten's UNet, a diffusers network, or any module whose shapes do not depend on numbers; real or on "meta".
    dtype: of weights and feature maps, by default that of the network. (Autocast is not followed; hasten's own network
        is of float32 or float64.)
    cond: tensors, or dictionaries of them; those of B rows belong to the rows of the batch.

    Raises:
        BadInput: where the network does not run so: it looks at numbers, or not at such a shape.
    """
    if len(shape) != 4 or min(shape) < 1:
        raise BadInput(f"the shape of a batch of images is (B, C, H, W), found {tuple(shape)}")
    batch, _, rows, _ = shape
    shadow = _shadow(net, dtype)
    made = dtype or next((p.dtype for p in shadow.parameters() if p.is_floating_point()), torch.float32)

    def at(height: int, count: int) -> _Recorder:
        given = _on_meta(cond, made, batch, count)
        x = torch.empty((count, shape[1], height, shape[3]), dtype=made, device="meta")
        recorder = _Recorder()
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(_heard(shadow, recorder))
            stack.enter_context(_Attention(recorder))
            stack.enter_context(recorder)
            try:
                shadow(x, torch.empty(count, dtype=made, device="meta"), **given)
            except BadInput:
                raise
            except Exception as error:
                told = (str(error).splitlines() or [type(error).__name__])[0]
                raise BadInput(
                    f"{type(net).__name__} does not run on shapes alone, at {tuple(x.shape)}: {told}"
                ) from error
        return recorder

    def work(count: int) -> Workload:
        one, two = at(rows, count), at(2 * rows, count)
        if len(one.ops) != len(two.ops):
            raise BadInput(f"{type(net).__name__} does other operations at {2 * rows} rows than at {rows}")
        ops = tuple(_op(a, b) for a, b in zip(one.ops, two.ops))
        answer = count * shape[1] * rows * shape[3] * made.itemsize
        known = bool(one.talks) and one.talks[-1].kind == "rows"
        return Workload(count, ops, tuple(one.talks) if known else None, one.coarsest or rows, answer)

    found = work(batch)
    return found if batch == 1 else replace(found, half=work(-(-batch // 2)))


@dataclass(frozen=True)
class _Seen:
    """An operation at one height: its macs, bytes, and those of the keys and values of self-attention."""

    macs: int
    bytes: int
    whole: int = 0
    text: bool = False


class _Recorder(TorchDispatchMode):
    """Keeps what runs: operations, and what patches would exchange."""

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry

        self.count = flop_registry
        self.ops: list[_Seen] = []
        self.talks: list[Message] = []
        self.coarsest = 0
        self.keys = 0  # how many projections of keys and values are open

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        alias = [r.alias_info for r in func._schema.returns]
        packet = func._overloadpacket
        if any(a is not None and not a.is_write for a in alias) or "empty" in packet.__name__:
            return out  # a view
        macs = self.count[packet](*args, **(kwargs or {}), out_val=out) // 2 if packet in self.count else 0
        moved = sum(t.numel() * t.element_size() for t in _tensors((args, kwargs or {}, out)))
        self.ops.append(_Seen(macs, moved, text=self.keys > 0))
        return out


class _Attention(TorchFunctionMode):
    """Counts attention as one operation that never writes its weights."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (
            (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3] if kwargs else args[:3]
        )
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        macs = q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        own, others = ((a.numel() + b.numel()) * q.element_size() for a, b in ((q, out), (k, v)))
        self.recorder.ops.append(_Seen(macs, own, others))
        return out


def _op(one: _Seen, two: _Seen) -> Op:
    """An operation from what it was at H and at 2 H rows."""
    moving = min(one.bytes, max(two.bytes - one.bytes, 0))
    parted = moving > 0 or two.macs > one.macs
    return Op(one.macs, moving, one.bytes - moving + one.whole, parted, one.text and not parted)


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (list, tuple)):
        for each in given:
            yield from _tensors(each)
    elif isinstance(given, dict):
        yield from _tensors(list(given.values()))


def _shadow(net: nn.Module, dtype: torch.dtype | None) -> Any:
    """A copy of the network on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in (*net.parameters(), *net.buffers()):
        kind = dtype if tensor.is_floating_point() else None
        empty = torch.empty_like(tensor, device="meta", dtype=kind)
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(net, memo).eval()


def _on_meta(given: Any, dtype: torch.dtype, batch: int, count: int) -> Any:
    """Conditions without memory, of `count` rows."""
    if isinstance(given, dict):
        return {key: _on_meta(value, dtype, batch, count) for key, value in given.items()}
    if not isinstance(given, Tensor):
        return given
    cut = given[:count] if given.ndim and len(given) == batch else given
    return torch.empty(cut.shape, dtype=dtype if cut.is_floating_point() else cut.dtype, device="meta")


@contextmanager
def _heard(net: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """The layers of a U-Net tell the recorder what they would exchange."""
    core: Any = core_of(net)
    handles = []
    padded: set[int] = set()
    if all(isinstance(getattr(core, end, None), nn.Conv2d) for end in ("conv_in", "conv_out")):
        for name, module in core.named_modules():
            if name.partition(".")[0] in ASIDE or "norm_cross" in name.split(".") or id(module) in padded:
                continue
            conv = getattr(module, "conv", None)
            if type(module).__name__ == "Downsample2D" and getattr(module, "padding", None) == 0 and conv is not None:
                padded.add(id(conv))  # it adds a row below by itself
            handles += _hooks(name, module, recorder)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(name: str, module: Any, recorder: _Recorder) -> list[Any]:
    """The hooks of one module."""
    talks = recorder.talks

    def halo(_: Any, args: Any) -> None:
        own = module.conv if type(module).__name__ == "Downsample2D" else module
        x, k, s, d = args[0], own.kernel_size[0], own.stride[0], own.dilation[0]
        B, C, h, w = x.shape
        recorder.coarsest = min(recorder.coarsest or h, max(h // s, 1))
        pad = own.padding if isinstance(own.padding, str) else int(own.padding[0])
        above = {"valid": 0, "same": d * (k - 1) // 2}[pad] if isinstance(pad, str) else pad
        below = max(0, d * (k - 1) - above - s + 1)
        if name != "conv_in" and (above or below):
            talks.append(Message("halo", B * C * w, x.element_size(), h, above, below))

    def answer(_: Any, args: Any, out: Tensor) -> None:
        talks.append(Message("rows", out.numel(), out.element_size()))

    def norm(_: Any, args: Any) -> None:
        x = args[0]
        size = 8 if x.dtype == torch.float64 else 4
        talks.append(Message("moments", 2 * len(x) * module.num_groups, size, x.numel(), width=x.element_size()))

    def keys(_: Any, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        told = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        if told is not None:
            return
        tokens = x[:, 0].numel() if x.ndim == 4 else x[..., 0].numel()
        both = 2 * module.qkv.in_features if hasattr(module, "qkv") else 2 * module.to_k.out_features
        talks.append(Message("keys", tokens * both, x.element_size()))

    def open_(_: Any, args: Any) -> None:
        recorder.keys += 1

    def close(_: Any, args: Any, out: Any) -> None:
        recorder.keys -= 1

    kind = type(module).__name__
    if kind == "Downsample2D" and getattr(module, "padding", None) == 0 and getattr(module, "conv", None) is not None:
        return [module.register_forward_pre_hook(halo)]
    if type(module) is nn.Conv2d:
        last = [module.register_forward_hook(answer)] if name == "conv_out" else []
        return [module.register_forward_pre_hook(halo), *last]
    if type(module) is nn.GroupNorm:
        return [module.register_forward_pre_hook(norm)]
    if kind == "Attention" and (hasattr(module, "qkv") or hasattr(module, "to_k")):
        return [module.register_forward_pre_hook(keys, with_kwargs=True)]
    if name.rpartition(".")[2] in ("to_k", "to_v"):
        return [module.register_forward_pre_hook(open_), module.register_forward_hook(close)]
    return []
