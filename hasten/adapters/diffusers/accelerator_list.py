"""The accelerators of a call, from objects or texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ...errors import BadInput
from ...pick import pick


def parse_accelerators(accelerators: Any) -> list[Any]:
    """A list of accelerators from one or several, as objects or texts.

    Raises:
        BadInput: for other objects.
    """
    if isinstance(accelerators, str) or not isinstance(accelerators, Iterable):
        accelerators = [accelerators]
    methods = [pick("accelerators", one) if isinstance(one, str) else one for one in accelerators]
    for one in methods:
        if isinstance(one, (type, nn.Module)) or not callable(getattr(one, "apply", None)):
            raise BadInput(
                f"accelerators are objects of hasten.accelerators or texts such as 'deep_cache', found {one!r}"
            )
    return methods
