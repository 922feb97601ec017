"""A network of `diffusers` with split points."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import BadInput
from .split_network import SplitNetwork


def split_network(net: nn.Module, whole: bool = False) -> SplitNetwork:
    """The seams for a network of `diffusers`. Raises BadInput for a kind that has none here."""
    from . import transformers as _transformers
    from . import unets as _unets

    kinds: dict[str, Any] = {**_unets.KINDS, **_transformers.KINDS}
    for base in type(net).__mro__:
        if base.__name__ in kinds:
            return kinds[base.__name__](net, whole)
    raise BadInput(f"no seams are known for {type(net).__name__}; those of {', '.join(kinds)} are")
