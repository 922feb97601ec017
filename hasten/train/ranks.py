"""The processes that train together: one device each, one mean gradient, one clock."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from ..errors import BadInput, HastenError


@dataclass(frozen=True)
class Ranks:
    """This process among `world`, and its device. Start several with `accelerate launch` or `torchrun`.

    Gradients are averaged after the backward pass, one flat tensor an optimiser. That loses the overlap with the
    backward pass that `DistributedDataParallel` has, and lets a loss reach its modules in any way it likes.
    """

    device: torch.device
    rank: int = 0
    world: int = 1

    @classmethod
    def start(cls, device: str | None = None) -> Ranks:
        """Join the other processes, if any. device: `cpu`, `cuda`, ...; by default a GPU where there is one."""
        cpu = device == "cpu" or not torch.cuda.is_available()
        if device is not None and device.startswith("cuda") and cpu:
            raise BadInput(f"device {device} was asked for, but torch finds no GPU here (choices: cpu)")
        try:
            from accelerate import PartialState
        except ImportError:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise HastenError(
                    "training on several processes needs accelerate: pip install 'hasten[train]'"
                ) from None
            return cls(torch.device(device or ("cpu" if cpu else "cuda")))
        state = PartialState(cpu=cpu)
        if state.num_processes == 1:
            return cls(torch.device(device or ("cpu" if cpu else "cuda")))
        return cls(state.device, state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    def share(self, module: nn.Module) -> None:
        """Give every process the weights and buffers of the first."""
        if self.world > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                distributed.broadcast(tensor.data, 0)

    def mean(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Replace each gradient by its mean over the processes; the mean of `loss` is returned."""
        if self.world == 1:
            return loss
        owners = [p for p in parameters if p.requires_grad]
        for p in owners:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([loss.detach().float().view(1), *(p.grad.float().flatten() for p in owners)])  # type: ignore[union-attr]
        distributed.all_reduce(flat)
        flat /= self.world
        sizes = [p.numel() for p in owners]
        for p, part in zip(owners, flat[1:].split(sizes), strict=True):
            p.grad.copy_(part.view_as(p))  # type: ignore[union-attr]
        return flat[0]

    def agree(self, seconds: float, stop: bool, due: bool) -> tuple[float, bool, bool]:
        """The first process's clock and wish to save, and whether any process was told to stop."""
        if self.world == 1:
            return seconds, stop, due
        said = torch.tensor([seconds, float(due)], dtype=torch.float64, device=self.device)
        halt = torch.tensor(float(stop), device=self.device)
        distributed.broadcast(said, 0)
        distributed.all_reduce(halt, distributed.ReduceOp.MAX)
        return float(said[0]), bool(halt), bool(said[1])

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            distributed.barrier()
