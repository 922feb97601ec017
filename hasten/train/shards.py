"""Parameters, gradients, EMA and optimiser state of a trained module sharded among the processes (FSDP)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from ..distributed.ranks import Ranks
from ..errors import BadInput

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard_module(module: nn.Module, ranks: Ranks) -> None:
    """Shard the parameters of `module` in place; those of a block are gathered while it is computed.

    Of a denoiser the network is sharded, block by block; of any other module all of it. Both must then be called by
    their `forward` only, not by their parts.

    References:
        Zhao et al. 2023, arXiv:2304.11277 (`fully_shard` of torch).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    net = getattr(module, "net", module)
    for block in blocks(net):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def blocks(net: nn.Module) -> Iterator[nn.Module]:
    """The entries of the network's lists of layers."""
    for module in net.modules():
        for child in module if isinstance(module, nn.ModuleList) else ():
            if not isinstance(child, nn.ModuleList) and any(True for _ in child.parameters()):
                yield child


def check_shardable(name: str, module: nn.Module, optimiser: str, ranks: Ranks) -> None:
    """Raise BadInput if the trained module `name` cannot be sharded."""
    if ranks.world == 1:
        raise BadInput("shard divides a network among processes, and there is one: start several with torchrun")
    if optimiser != "adamw":
        raise BadInput(f"{name}: {optimiser} needs whole matrices and cannot be sharded: use adamw")
    net = getattr(module, "net", module)
    if type(module).forward is nn.Module.forward:
        raise BadInput(f"{name}: this method's student is several networks in one, and cannot be sharded")
    if {id(p) for p in net.parameters()} != {id(p) for p in module.parameters()}:
        raise BadInput(f"{name}: shard divides the network of a denoiser, and this module has parameters outside it")


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Whether a value is a sharded tensor. (Importing DTensor for an isinstance check is slow.)"""
    return isinstance(value, Tensor) and hasattr(value, "to_local")


def local_shard(tensor: Tensor) -> Tensor:
    """The shard of a tensor that this process holds; an unsharded tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes, which must all call it; an unsharded tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def full_state(value: Any) -> Any:
    """A `state_dict` with its sharded tensors gathered on the CPU. All processes must call it."""
    if isinstance(value, dict):
        return {key: full_state(each) for key, each in value.items()}
    if isinstance(value, list):
        return [full_state(each) for each in value]
    return value.full_tensor().cpu() if is_sharded(value) else value


def shard_like(value: Any, like: Any) -> Any:
    """`value` sharded as `like`, if that is sharded and of its shape; the inverse of `full_state` for one value."""
    if not is_sharded(like) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load_module(module: nn.Module, saved: dict[str, Tensor]) -> None:
    """Load an unsharded `state_dict` into a module, sharded or not."""
    own = module.state_dict()
    module.load_state_dict({key: shard_like(value, own.get(key)) for key, value in saved.items()})


def load_optimiser(optimiser: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load an unsharded `state_dict` into an optimiser, of sharded parameters or not."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state = {
        number: {key: shard_like(value, parameters[number]) for key, value in each.items()}
        for number, each in saved["state"].items()
    }
    optimiser.load_state_dict({**saved, "state": state})


def unsharded_copy(module: nn.Module, saved: dict[str, Tensor], device: torch.device) -> nn.Module:
    """A copy of an unsharded module with the `state_dict` `saved`, on the device."""
    copied = copy.deepcopy(module)
    copied.load_state_dict(saved)
    return copied.to(device)
