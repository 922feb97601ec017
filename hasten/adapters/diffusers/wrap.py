"""A network of `diffusers` with split points."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import BadInput
from .split_network import SplitNetwork


def split_network(net: nn.Module, with_variance: bool = False) -> SplitNetwork:
    """A network of `diffusers` with split points.

    Args:
        net: the network.
        with_variance: see `SplitNetwork`.

    Raises:
        BadInput: for a class whose parts are not known.
    """
    from . import split_text_unet as _text_unet
    from . import transformers as _transformers
    from . import unets as _unets

    kinds: dict[str, Any] = {**_unets.KINDS, **_text_unet.KINDS, **_transformers.KINDS}
    for base in type(net).__mro__:
        if base.__name__ in kinds:
            return kinds[base.__name__](net, with_variance)
    raise BadInput(f"no split points are known for {type(net).__name__}; those of {', '.join(kinds)} are")
