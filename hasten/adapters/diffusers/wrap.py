"""A network of `diffusers` with split points."""

from __future__ import annotations

from typing import Any

from torch import nn

from .calls import known_class
from .split_blocks import SplitBlocks
from .split_network import SplitNetwork


def split_network(net: nn.Module, with_variance: bool = False) -> SplitNetwork:
    """A network of `diffusers` with split points.

    The parts of some classes are known, and are called one by one; any other network, such as a subclass with its own
    `forward`, is split where its structure shows blocks, see `SplitBlocks`.

    Args:
        net: the network.
        with_variance: see `SplitNetwork`.

    Raises:
        BadInput: for a network whose structure cannot be read.
    """
    from . import split_text_unet as _text_unet
    from . import transformers as _transformers
    from . import unets as _unets

    kinds: dict[str, Any] = {**_unets.KINDS, **_text_unet.KINDS, **_transformers.KINDS}
    name = known_class(type(net))
    return SplitBlocks(net, with_variance) if name is None else kinds[name](net, with_variance)
