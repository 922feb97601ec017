"""A player's parameters, gradients, averages and optimiser state divided among the processes (FSDP)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.ranks import Ranks
from ..errors import BadInput


def divide(module: nn.Module, ranks: Ranks) -> None:
    """Leave each process a part of every parameter; a block's are put together while it is computed.

    Of a denoiser the network is divided, block by block; of any other module the whole. Both must then be asked by
    their `forward` alone, not in pieces. `fully_shard` of torch: Zhao et al. 2023, 2304.11277.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    net = getattr(module, "net", module)
    for block in blocks(net):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def blocks(net: nn.Module) -> Iterator[nn.Module]:
    """The entries of its lists of layers."""
    for module in net.modules():
        for child in module if isinstance(module, nn.ModuleList) else ():
            if not isinstance(child, nn.ModuleList) and any(True for _ in child.parameters()):
                yield child


def check(name: str, module: nn.Module, optimiser: str, ranks: Ranks) -> None:
    """BadInput for a player that cannot be divided."""
    if ranks.world == 1:
        raise BadInput("shard divides a network among processes, and there is one: start several with torchrun")
    if optimiser != "adamw":
        raise BadInput(f"{name}: {optimiser} looks at whole matrices and cannot be sharded: use adamw")
    net = getattr(module, "net", module)
    if type(module).forward is nn.Module.forward:
        raise BadInput(f"{name}: this method's student is several networks in one, and cannot be sharded")
    if {id(p) for p in net.parameters()} != {id(p) for p in module.parameters()}:
        raise BadInput(f"{name}: shard divides the network of a denoiser, and this player has parameters beside it")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a parameter; of a whole one, itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def whole(value: Any) -> Any:
    """Parameters put together, on the CPU, in anything that a `state_dict` may be. All processes must call it."""
    if isinstance(value, dict):
        return {key: whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [whole(each) for each in value]
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


def parted(value: Any, like: Any) -> Any:
    """The opposite of `whole`: divided as `like`, where that is divided."""
    if not hasattr(like, "to_local") or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load_module(module: nn.Module, saved: dict[str, Tensor]) -> None:
    """Fill a module, divided or not, from a whole `state_dict`."""
    mine = module.state_dict()
    module.load_state_dict({key: parted(value, mine.get(key)) for key, value in saved.items()})


def load_optimiser(optimiser: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Fill an optimiser, of divided parameters or not, from a whole `state_dict`."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state = {number: {key: parted(value, parameters[number]) for key, value in each.items()}
             for number, each in saved["state"].items()}  # fmt: skip
    optimiser.load_state_dict({**saved, "state": state})


def restored(module: nn.Module, saved: dict[str, Tensor], device: torch.device) -> nn.Module:
    """A copy of an undivided module with a whole `state_dict`, on the device."""
    made = copy.deepcopy(module)
    made.load_state_dict(saved)
    return made.to(device)
