"""Displaced patch parallelism: one image on several devices, each with a patch of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..distributed.groups import ProcessGroup, process_group, process_rank
from ..errors import BadInput, check_choice
from . import PART, Accelerator, SamplingContext
from ._caching.split import same_conditions
from ._patches.attention import TextVersion
from ._patches.exchange import Exchange
from ._patches.swap import Patched

__all__ = ["PatchNet", "PatchParallel"]

MODES, NORMS, KEYS = ("async", "sync", "naive"), ("corrected", "stale", "full", "separate"), ("same", "bf16")
OF_ROWS = ("down_residual_", "mid_residual", "adapter_")  # conditions that are feature maps of the whole image
SPLIT_METHODS = ("embed", "encode", "decode", "shallow_encode", "deep", "shallow_decode")


@dataclass(frozen=True)
class PatchParallel(Accelerator):
    """DistriFusion: every process runs the network on some rows of x_t, and receives what it reads of the others'.

    All processes of a group are started alike (torchrun), draw the same noise (else the first model evaluation raises)
    and return the same, bit for bit. A convolution reads the `halo` rows next to its patch, of the neighbours alone;
    self-attention the keys and values of all ranks; group normalisation their moments. The first `warmup` + 1
    evaluations of a trajectory exchange these where they are needed, and are exact; later ones use what the others sent
    one evaluation before, which travels while the layers run, and differ from the exact output as much as features
    change from one evaluation to the next. Few-step samplings gain nothing: with `warmup` + 1 evaluations or fewer all
    are exact.

    Rows are divided as evenly as the coarsest level allows: H of them, at `multiple` a row there, on up to H / multiple
    processes; the one with most sets the pace. With fewer than three of the coarsest rows a process, later evaluations
    are inaccurate, and a warning says so. In one process nothing changes at all.

    Args:
        warmup: 0 or more; see above. An evaluation whose batch size differs from the one before is exact too.
        norm: group normalisation in later evaluations: "corrected" (the moments of one evaluation ago, plus this rank's
            own drift), "stale", "full" (waits for the current ones), "separate" (each patch by itself), see
            `PatchNorm`. Networks whose moments change fast, such as Stable Diffusion 1 at 512 pixels, may need "full".
        mode: "async"; "sync": every evaluation is exact; "naive": no exchange, each patch an image of its own, to
            compare with.
        size: how many processes share an image; by default all, or half of them where another accelerator has claimed
            the two branches of guidance. A divisor of that makes several groups, each for its own images:
            `hasten.sample_many` distributes batches to them.
        keys: keys and values are sent as they are ("same") or rounded to bfloat16 ("bf16"), half the bytes of float32
            (16-bit formats are sent as they are); then no evaluation is exact.
        forecast: 0: keys, values and halos are those of one evaluation before, as in the paper; 1: they are linearly
            extrapolated from the last two, at most as far as these are apart in time. It sends no more, and takes a
            second receive buffer. Moments are never extrapolated, and nothing where a process has fewer than three of
            the coarsest rows: that is unstable.
        chunk: how many tensors are sent in one message.

    Raises:
        BadInput: for a network with unknown layers (see `Patched`), such as quantized or compiled ones; and at the
            first evaluation for more processes than rows.

    References:
        Li, Cai, Cao, Zhang, Cai, Bai, Jia, Liu, Li, Han 2024, arXiv:2402.19481; without their factor N / (N - 1) of the
        variance, with which a synchronous evaluation is not exact.
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
        check_choice("patch_parallel norm", self.norm, NORMS)
        check_choice("patch_parallel mode", self.mode, MODES)
        check_choice("patch_parallel keys", self.keys, KEYS)
        if self.warmup < 0 or self.chunk < 1 or (self.size is not None and self.size < 1):
            raise BadInput(
                "patch_parallel: warmup is 0 or more, chunk and size are 1 or more, "
                f"found {self.warmup}, {self.chunk} and {self.size}"
            )
        if self.forecast not in (0, 1):
            raise BadInput(
                "patch_parallel: forecast is 0 (features are reused) or 1 (they are linearly extrapolated), "
                f"found {self.forecast}"
            )

    @property
    def claims(self) -> frozenset[str]:
        """The space of an image; and, where they are reused, its features."""
        return frozenset({"space", "features"} if self.mode == "async" else {"space"})

    def apply(self, denoiser: nn.Module, context: SamplingContext) -> nn.Module:
        """The denoiser with a `PatchNet` of its network. Every process must call it, in the same order as the others.

        Raises:
            BadInput: see the class, and where the processes cannot be divided into groups of `size`.
        """
        net, replace = getattr(denoiser, "net", None), getattr(denoiser, "replace", None)
        if not isinstance(net, nn.Module) or not callable(replace):
            raise BadInput(f"patch_parallel works on a Denoiser and its network, found {type(denoiser).__name__}")
        return replace(net=PatchNet(net, self._group("branches" in context.claimed), self))

    def _group(self, halved: bool) -> ProcessGroup:
        """The processes that share an image with this one.

        Args:
            halved: another accelerator gives half of the processes each branch of guidance.
        """
        world = process_rank()[1]
        if halved and world > 1 and world % 2:
            raise BadInput(f"patch_parallel with cfg_parallel takes an even number of processes, found {world}")
        maximum = world // 2 if halved and world > 1 else world
        size = maximum if self.size is None else self.size
        if maximum % size:
            sizes = ", ".join(str(n) for n in range(1, maximum + 1) if maximum % n == 0)
            raise BadInput(f"patch_parallel: {maximum} processes make no groups of {size} (choices: {sizes})")
        return process_group([tuple(range(first, first + size)) for first in range(0, world, size)])


class PatchNet(nn.Module):
    """A network of which this process runs some rows, with the signature of the network: all of x_t in, all rows out.

    Args:
        net: the network.
        group: the processes that share an image.
        method: the options.

    Attributes:
        net: a copy with the same weights and other layers; in one process, the network itself.
        exchange: the communication, with the `traffic` and `collectives` of the last evaluation.
    """

    def __init__(self, net: nn.Module, group: ProcessGroup, method: PatchParallel) -> None:
        super().__init__()
        self.exchange = Exchange(
            group, method.mode, method.norm, method.warmup, method.keys, method.chunk, method.forecast
        )
        self.alone = group.size == 1
        self._text = TextVersion()
        self._cond: dict[str, Any] | None = None
        self.net: nn.Module = net if self.alone else Patched(net, self.exchange, self._text).net
        self.train(net.training)

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes that this process sent in the last evaluation, by kind, see `Exchange`."""
        return self.exchange.traffic

    @property
    def collectives(self) -> dict[str, int]:
        """How many messages it sent in the last evaluation, by kind, see `Exchange`."""
        return self.exchange.collectives

    def reset(self) -> None:
        """A new trajectory begins, with exact evaluations."""
        self.exchange.reset()
        self._cond = None
        self._text.version += 1

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """The network's raw output (B, *S), at noisy x (B, *S)."""
        if self.alone:
            return self.net(x, time, **cond)
        self._begin(x, cond)
        self.exchange.set_time(time)
        with torch.no_grad(), self._own_conditions(cond) as own:
            raw = self.net(x, time, **own)
        self.exchange.finish()
        return raw

    def _begin(self, x: Tensor, cond: dict[str, Any]) -> None:
        """Begin a model evaluation."""
        self.exchange.begin(x)
        self._check_conditions(cond)

    def _check_conditions(self, cond: dict[str, Any]) -> None:
        """Invalidate the cached keys of a text where conditions have changed."""
        if self._cond is None or not same_conditions(self._cond, cond):
            self._text.version += 1
            self._cond = cond

    @contextmanager
    def _own_conditions(self, cond: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The conditions, of feature maps this rank's rows; within the block also those that are side inputs."""
        side_inputs = getattr(self.net, "side_inputs", None)
        more: dict[str, Any] = {} if side_inputs is None else side_inputs.conditions
        rows = [value.shape[2] for key, value in {**more, **cond}.items() if key.startswith(OF_ROWS)]
        if rows and not self.exchange.open:
            self.exchange.divide(max(rows))  # the finest of them has the rows of x_t, which is yet to come
        side_context: AbstractContextManager[Any] = nullcontext()
        if side_inputs is not None and more:
            side_context = side_inputs.using(self._own_rows(more))
        with side_context:
            yield self._own_rows(cond)

    def _own_rows(self, cond: dict[str, Any]) -> dict[str, Any]:
        """Conditions with this rank's rows of feature maps."""

        def rows(value: Tensor) -> Tensor:
            begin, end = self.exchange.partition.span(value.shape[2])
            return value[:, :, begin:end]

        return {key: rows(value) if key.startswith(OF_ROWS) else value for key, value in cond.items()}

    def _embed(self, time: Tensor, **cond: Any) -> Any:
        """`embed` of a network that runs part by part, whose features are reused: a model evaluation begins."""
        self.exchange.open = False
        self._check_conditions(cond)
        net: Any = self.net
        with self._own_conditions(cond) as own:
            return net.embed(time, **own)

    def __getattr__(self, name: str) -> Any:
        if name in SPLIT_METHODS and not self.alone:
            if self.exchange.mode == "async":
                raise AttributeError(
                    f"{name}: a network whose features are one evaluation late cannot be run part by part"
                )
            if name == "embed":
                return self._embed
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)
