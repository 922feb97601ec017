"""Networks with further scalar inputs: a guidance scale, a number of steps."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..nets.scalar_inputs import ScalarInputs, with_scalars


def with_scalar_inputs(net: nn.Module, shape: Sequence[int], **inputs: Any) -> nn.Module:
    """A copy of the network, with its weights, that takes `guidance` or `steps` as inputs; new weights are zero."""
    config, arguments = getattr(net, "config", None), inspect.signature(type(net).__init__).parameters
    with_guidance: Any = getattr(net, "with_guidance", None)
    if set(inputs) == {"guidance"} and with_guidance is not None:
        extended: nn.Module = with_guidance()
        return extended
    if isinstance(net, ScalarInputs):
        extended = with_scalars(copy.deepcopy(net.net), shape, **{**scalar_inputs_of(net), **inputs})
    elif isinstance(config, Mapping) and all(name in arguments for name in inputs):
        extended = type(net)(**{**config, **inputs})
    else:
        return with_scalars(copy.deepcopy(net), shape, **inputs)
    extended.to(next(net.parameters()).device)
    extended.load_state_dict(net.state_dict(), strict=False)
    return extended


def scalar_inputs_of(net: ScalarInputs) -> dict[str, Any]:
    """The scalar inputs that a wrapped network takes already."""
    inputs = {"guidance": net.guidance_range, "steps": net.step_counts}
    return {name: value for name, value in inputs.items() if value is not None}
