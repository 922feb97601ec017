"""Where a network can be split, read from its modules: lists of blocks, or a U-Net's halves, whatever its class."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import BadInput

__all__ = ["Structure", "input_names", "read_structure"]

TIME_NAMES = ("timestep", "timesteps", "t", "time", "time_step")
SHARE = 0.1  # of the network's parameters: a smaller list of modules is no list of blocks


@dataclass(frozen=True)
class Structure:
    """The parts of a network that a split may skip, and the names of its inputs.

    Attributes:
        blocks: names of the modules, in the order of their registration, which need not be that in which they run.
        halves: whether it is a U-Net: names from `conv_in` to the middle, then the up blocks.
        encoder: of a U-Net: how many of `blocks` are its contracting half and the middle; else 0.
        stem: of a U-Net: further modules, which belong to the contracting half where they run within it.
        sample: name of the argument of `forward` that is the noisy sample.
        time: name of the argument that is the time.
    """

    blocks: tuple[str, ...]
    halves: bool
    encoder: int
    stem: tuple[str, ...]
    sample: str
    time: str


def read_structure(net: nn.Module) -> Structure:
    """The structure of a network of `diffusers`, or of one that is built like them.

    Args:
        net: the network.

    Raises:
        BadInput: where it cannot be read, with the reason.
    """
    sample, time = input_names(type(net))
    for prefix, module in _levels(net):
        lists = {name: child for name, child in module.named_children() if isinstance(child, nn.ModuleList)}
        if len(lists.get("down_blocks", ())) and len(lists.get("up_blocks", ())) and hasattr(module, "conv_in"):
            return _unet(module, prefix, sample, time)
        blocks = [
            f"{prefix}{name}.{k}" for name, items in lists.items() if _blocks(items, net) for k in range(len(items))
        ]
        if len(blocks) > 1:
            return Structure(tuple(blocks), False, 0, (), sample, time)
    raise BadInput(
        f"no split points can be read from {type(net).__name__}: it has neither conv_in, down_blocks and up_blocks nor "
        "a torch.nn.ModuleList of two or more blocks that hold a tenth of its weights"
    )


def input_names(kind: type[nn.Module]) -> tuple[str, str]:
    """The names of the sample and the time among the arguments of a network's `forward`.

    Raises:
        BadInput: where it has none.
    """
    names = [name for name in inspect.signature(kind.forward).parameters if name != "self"]
    time = next((name for name in TIME_NAMES if name in names), None)
    if time is None or names[0] == time:
        raise BadInput(
            f"no split points can be read from {kind.__name__}: its forward takes ({', '.join(names[:4])}), not a "
            "sample and then a timestep"
        )
    return names[0], time


def _levels(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """The network; and, where it only wraps another, that one, three deep, each with the prefix of its names."""
    levels, prefix, module = [("", net)], "", net
    for _ in range(3):
        children = dict(module.named_children())
        largest = max(children, key=lambda name: _weights(children[name]), default=None)
        if largest is None or isinstance(children[largest], nn.ModuleList):
            break
        prefix, module = f"{prefix}{largest}.", children[largest]
        levels.append((prefix, module))
    return levels


def _unet(module: Any, prefix: str, sample: str, time: str) -> Structure:
    """The structure of a U-Net."""
    encoder = ["conv_in", *(f"down_blocks.{k}" for k in range(len(module.down_blocks)))]
    if getattr(module, "mid_block", None) is not None:
        encoder.append("mid_block")
    blocks = [*encoder, *(f"up_blocks.{k}" for k in range(len(module.up_blocks)))]
    known = {"conv_in", "mid_block"}
    stem = [n for n, m in module.named_children() if n not in known and not isinstance(m, nn.ModuleList)]
    names, stems = (tuple(f"{prefix}{name}" for name in names) for names in (blocks, stem))
    return Structure(names, True, len(encoder), stems, sample, time)


def _blocks(items: nn.ModuleList, net: nn.Module) -> bool:
    """Whether a list holds blocks: modules of several layers, and a tenth of the weights."""
    composed = all(next(item.children(), None) is not None for item in items)
    return bool(len(items)) and composed and _weights(items) >= SHARE * _weights(net)


def _weights(module: nn.Module) -> int:
    """The number of a module's weights."""
    return sum(p.numel() for p in module.parameters())
