"""CFG parallelism: two devices, each with one branch of guidance."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, Wrapper
from ..distributed.groups import ProcessGroup, all_gather, check_same_noise, process_group, process_rank
from ..errors import BadInput
from . import HALVE, Accelerator, SamplingContext
from ._caching.split import map_tensors

__all__ = ["CfgParallel", "Halved"]


@dataclass(frozen=True)
class CfgParallel(Accelerator):
    """Classifier-free guidance evaluates 2 B rows at once, B with and B without their condition: two processes run B
    rows each and exchange the outputs, which are those of one process (up to the rounding of a smaller batch).

    All processes are started alike (torchrun) and draw the same noise (else the first model evaluation raises). With an
    accelerator that divides the image, in 2 n processes, the first n have the first half of the batch and the last n
    the other, and n share an image.

    A batch that guidance did not double, such as those outside of a guidance interval, is halved too: its rows are
    independent. Of an odd one both processes run the row in the middle, and so of a single row.
    In one process nothing changes at all.

    References:
        Li, Cai, Cao, Zhang, Cai, Bai, Jia, Liu, Li, Han 2024, arXiv:2402.19481, which combine it with their patches.
    """

    stage: ClassVar[int] = HALVE
    claims: ClassVar[frozenset[str]] = frozenset({"branches"})

    def apply(self, denoiser: nn.Module, context: SamplingContext) -> nn.Module:
        """The denoiser on half of each batch. Every process must call it, in the same order as the others.

        Raises:
            BadInput: for a number of processes that is not two, or with an accelerator of space not even.
        """
        world = process_rank()[1]
        if world == 1:
            return Halved(denoiser, ProcessGroup())
        divided = "space" in context.claimed
        if world % 2 or (world > 2 and not divided):
            fits = "an even number of processes" if divided else "2 processes, or 2 n with patch_parallel"
            raise BadInput(f"cfg_parallel takes {fits}, found {world}")
        n = world // 2
        return Halved(denoiser, process_group([(k, k + n) for k in range(n)]))


class Halved(Wrapper):
    """A denoiser of which this process evaluates one half of every batch, and the other process of its pair the rest.

    Args:
        denoiser: is not changed.
        pair: the two processes.

    Attributes:
        traffic: bytes that this process sent in the last evaluation, as {"rows": ...}.
        collectives: how many messages it sent.
    """

    denoiser: Denoiser

    def __init__(self, denoiser: nn.Module, pair: ProcessGroup) -> None:
        super().__init__(denoiser)
        self.pair = pair
        self.traffic, self.collectives = {"rows": 0}, {"rows": 0}
        self._checked = False

    def reset(self) -> None:
        """A new trajectory begins, whose noise the two compare."""
        self._checked = False

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """x0 (B, *S) of the whole batch."""
        return self._evaluate(self.denoiser, x_t, t, cond)

    def raw(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The network's raw output (B, *S) for the whole batch."""
        return self._evaluate(self.denoiser.raw, x_t, t, cond)

    def _evaluate(
        self, evaluate: Callable[..., Tensor], x_t: Tensor, t: Tensor | float, cond: dict[str, Any]
    ) -> Tensor:
        """`evaluate` on this process's half of the batch, and the other's output."""
        if self.pair.size == 1:
            return evaluate(x_t, t, **cond)
        if x_t.requires_grad and torch.is_grad_enabled():
            raise BadInput("cfg_parallel has no gradient: do not use guides that need one")
        if not self._checked:
            check_same_noise(self.pair, x_t, "cfg_parallel")
            self._checked = True
        B = len(x_t)
        half = -(-B // 2)
        mine = slice(half) if self.pair.me == 0 else slice(B - half, B)

        def own(tree: Any) -> Any:  # a tensor, or a list or dict of them
            return map_tensors(lambda value: value[mine] if value.ndim and len(value) == B else value, tree)

        side_inputs = getattr(getattr(self.denoiser, "net", None), "side_inputs", None)
        more = {} if side_inputs is None else {key: own(value) for key, value in side_inputs.conditions.items()}
        side_context: AbstractContextManager[Any] = nullcontext()
        if side_inputs is not None and more:
            side_context = side_inputs.using(more)
        with torch.no_grad(), side_context:
            output = evaluate(own(x_t), own(t), **{key: own(value) for key, value in cond.items()}).contiguous()
        both = output.new_empty((2 * half, *output.shape[1:]))
        all_gather(both.view(-1), output.view(-1), self.pair.group)
        self.traffic, self.collectives = {"rows": output.numel() * output.element_size()}, {"rows": 1}
        return torch.cat([both[:half], both[3 * half - B :]])
