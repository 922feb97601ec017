"""Displaced patch parallelism: one image on several devices, each with a part of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..distributed.groups import ProcessGroup, process_group, process_rank
from ..errors import BadInput
from . import PART, SamplingContext
from ._caching.seams import same
from ._patches.attention import Text
from ._patches.exchange import Exchange
from ._patches.swap import Patched

__all__ = ["PatchNet", "PatchParallel"]

MODES, NORMS, KEYS = ("async", "sync", "naive"), ("corrected", "stale", "full", "separate"), ("same", "bf16")
OF_ROWS = ("down_residual_", "mid_residual", "adapter_")  # conditions that are feature maps of the whole image
SEAMS = ("embed", "encode", "decode", "shallow_encode", "deep", "shallow_decode")


@dataclass(frozen=True)
class PatchParallel:
    """DistriFusion: every process runs the network on some rows of x_t, and is told what it needs of the others'.

    All processes of a group are started alike (torchrun), draw the same noise (the first query is refused where they
    did not) and answer the same, bit for bit. A convolution needs the `halo` rows next to its part, from the neighbours
    alone; self-attention the keys and values of all; group normalisation their moments. The first `warmup` + 1 queries
    of a trajectory exchange these where they are needed, and are exact; the later ones use what the others said in the
    query before, which travels while the layers go on, and differ from the exact answer as much as features change from
    query to query. Few-step samplings leave nothing to be gained: with `warmup` + 1 queries or fewer all are exact.

    Args:
        warmup: 0 or more; see above. A query whose batch is of another size than the one before is exact too.
        norm: group normalisation in later queries: "corrected" (the moments of then, plus this rank's own drift),
            "stale", "full" (waits for those of now), "separate" (each part by itself), see `PatchNorm`. Networks in
            which moments change fast, such as Stable Diffusion 1 at 512 pixels, may want "full".
        mode: "async"; "sync": every query is exact; "naive": no exchange, each part an image of its own, to compare.
        size: how many processes share an image; by default all that are joined, or half of them where another
            accelerator has claimed the two branches of guidance. A divisor of that makes several groups, each for the
            images that it is asked for: `hasten.sample_many` deals them batches.
        keys: keys and values as they are ("same") or rounded to bfloat16 on their way ("bf16"), half the bytes of
            float32 (those of 16 bits are sent as they are); then no query is exact.
        forecast: 0: keys, values and halos are those of the query before, as in the paper; 1: they are drawn on along
            the line through the last two, at most as far as these are apart in time. It is for nothing on the link, and
            takes a second buffer of what is heard. Moments are never drawn on, and nothing where a process has fewer
            than three of the coarsest rows: that is not stable.
        chunk: how many tensors go in one message.

    Rows are parted as evenly as the coarsest level allows: H of them, at `multiple` a row there, on up to H / multiple
    processes; the one with most sets the pace. With fewer than three of the coarsest rows a process, late queries are
    far off, and a warning says so. In one process nothing changes at all.

    Raises:
        BadInput: for a network with layers that are not known (see `Patched`), such as quantized or compiled ones; and
            at the first query for more processes than rows.

    Reference: Li, Cai, Cao, Zhang, Cai, Bai, Jia, Liu, Li, Han 2024, arXiv:2402.19481; their factor N / (N - 1) of the
    variance, with which a synchronous evaluation is not exact, is left out.
    """

    warmup: int = 4
    norm: Literal["corrected", "stale", "full", "separate"] = "corrected"
    mode: Literal["async", "sync", "naive"] = "async"
    size: int | None = None
    keys: Literal["same", "bf16"] = "same"
    forecast: int = 1
    chunk: int = 60
    stage: ClassVar[int] = PART

    def __post_init__(self) -> None:
        for name, value, choices in (("norm", self.norm, NORMS), ("mode", self.mode, MODES), ("keys", self.keys, KEYS)):
            if value not in choices:
                raise BadInput(f"patch_parallel: {name} is one of {', '.join(choices)}, found {value!r}")
        if self.warmup < 0 or self.chunk < 1 or (self.size is not None and self.size < 1):
            raise BadInput(
                "patch_parallel: warmup is 0 or more, chunk and size are 1 or more, "
                f"found {self.warmup}, {self.chunk} and {self.size}"
            )
        if self.forecast not in (0, 1):
            raise BadInput(f"patch_parallel: forecast is 0 (hold) or 1 (a line), found {self.forecast}")

    @property
    def claims(self) -> frozenset[str]:
        """The space of an image; and, where they are reused, its features."""
        return frozenset({"space", "features"} if self.mode == "async" else {"space"})

    def apply(self, denoiser: nn.Module, ahead: SamplingContext) -> nn.Module:
        """The denoiser with a `PatchNet` of its network. Every process must call it, in the same order as the others.

        Raises:
            BadInput: see the class, and where the processes do not make groups of `size`.
        """
        net, replace = getattr(denoiser, "net", None), getattr(denoiser, "replace", None)
        if not isinstance(net, nn.Module) or not callable(replace):
            raise BadInput(f"patch_parallel works on a Denoiser and its network, found {type(denoiser).__name__}")
        return replace(net=PatchNet(net, self._team("branches" in ahead.claimed), self))

    def _team(self, halved: bool) -> ProcessGroup:
        world = process_rank()[1]
        if halved and world > 1 and world % 2:
            raise BadInput(f"patch_parallel beside cfg_parallel takes an even number of processes, found {world}")
        most = world // 2 if halved and world > 1 else world
        size = most if self.size is None else self.size
        if most % size:
            sizes = ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
            raise BadInput(f"patch_parallel: {most} processes make no groups of {size} (choices: {sizes})")
        return process_group([tuple(range(first, first + size)) for first in range(0, world, size)])


class PatchNet(nn.Module):
    """A network of which this process runs some rows; called as the network is, with all of x_t, and answering all.

    net: the copy with the same weights and other layers; of one process, the network itself.
    exchange: what is known of the talk: its `traffic` and `collectives` are those of the last query.
    """

    def __init__(self, net: nn.Module, group: ProcessGroup, method: PatchParallel) -> None:
        super().__init__()
        self.exchange = Exchange(
            group, method.mode, method.norm, method.warmup, method.keys, method.chunk, method.forecast
        )
        self.alone = group.size == 1
        self._text = Text()
        self._told: dict[str, Any] | None = None
        self.net = net if self.alone else Patched(net, self.exchange, self._text).net
        self.train(net.training)

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes that this process sent in the last query, by kind, see `Exchange`."""
        return self.exchange.traffic

    @property
    def collectives(self) -> dict[str, int]:
        """How often it spoke in the last query, by kind, see `Exchange`."""
        return self.exchange.collectives

    def reset(self) -> None:
        """A new trajectory begins, with exact queries."""
        self.exchange.reset()
        self._told = None
        self._text.version += 1

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """The network's raw output (B, *S), at noisy x (B, *S)."""
        if self.alone:
            return self.net(x, time, **cond)
        self._begin(x, cond)
        self.exchange.at(time)
        with torch.no_grad(), self._parted(cond) as own:
            raw = self.net(x, time, **own)
        self.exchange.finish()
        return raw

    def _begin(self, x: Tensor, cond: dict[str, Any]) -> None:
        self.exchange.begin(x)
        self._told_again(cond)

    def _told_again(self, cond: dict[str, Any]) -> None:
        if self._told is None or not same(self._told, cond):
            self._text.version += 1
            self._told = cond

    @contextmanager
    def _parted(self, cond: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The conditions, of feature maps this rank's rows; also of those that reach the network past its callers."""
        side_inputs = getattr(self.net, "side_inputs", None)
        more = {} if side_inputs is None else side_inputs.conditions
        known = [value.shape[2] for key, value in {**more, **cond}.items() if key.startswith(OF_ROWS)]
        if known and not self.exchange.open:
            self.exchange.part(max(known))  # the finest of them has the rows of x_t, which is yet to come
        with side_inputs.using(self._own(more)) if more else nullcontext():  # type: ignore[union-attr]
            yield self._own(cond)

    def _own(self, cond: dict[str, Any]) -> dict[str, Any]:
        def rows(value: Tensor) -> Tensor:
            begin, end = self.exchange.shares.span(value.shape[2])
            return value[:, :, begin:end]

        return {key: rows(value) if key.startswith(OF_ROWS) else value for key, value in cond.items()}

    def _embed(self, time: Tensor, **cond: Any) -> Any:
        """What `embed` is of an exact one, by whose seams features are kept between queries: there a query begins."""
        self.exchange.open = False
        self._told_again(cond)
        with self._parted(cond) as own:
            return self.net.embed(time, **own)  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        if name in SEAMS and not self.alone:
            if self.exchange.mode == "async":
                raise AttributeError(f"{name}: a network whose features are one query late cannot be run part by part")
            if name == "embed":
                return self._embed
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)
