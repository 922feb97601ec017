"""The conditions of a network, separated from the options of the function that passes them on."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from ..errors import BadInput, nearest

__all__ = ["conditions_of"]

RESERVED = ("x_t", "t")  # the arguments of a denoiser
COMMON = ("label", "guidance")  # what hasten's own networks are given
ELSEWHERE = (
    "batch_size",
    "callback",
    "cfg",
    "cond",
    "eta",
    "generator",
    "guidance_scale",
    "guides",
    "images",
    "n",
    "noise",
    "num_inference_steps",
    "num_steps",
    "order",
    "plan",
    "progress",
    "sampler",
    "schedule",
    "scheduler",
    "seed",
    "start",
    "steps",
    "timesteps",
    "times",
)


def conditions_of(
    what: str,
    options: Collection[str],
    cond: Mapping[str, Any] | None,
    keywords: dict[str, Any],
    denoiser: Any = None,
) -> dict[str, Any]:
    """The keyword arguments of a denoiser: `cond`, and the keywords that are not options.

    A keyword is a condition where it is "label" or "guidance", or the network names it in its `forward`. Other keywords
    are refused where they resemble an option or are numbers (`step=8`); the rest are accepted with a
    DeprecationWarning: conditions of any name go in `cond`.

    Args:
        what: name of the function, for the message.
        options: the names of its own arguments.
        cond: name -> value.
        keywords: the other keyword arguments of the call.
        denoiser: that gets them.

    Raises:
        BadInput: for a keyword that is no condition, or one that `cond` names as well.
    """
    conditions = {} if cond is None else dict(cond) if isinstance(cond, Mapping) else None
    if conditions is None:
        raise BadInput(f"{what}: cond must be a dict of the network's conditions, found {type(cond).__name__}")
    for name, value in keywords.items():
        if name in conditions:
            raise BadInput(f"{what}: the condition {name!r} is given twice, in cond and as a keyword")
        if name not in COMMON and name not in named_conditions(denoiser):
            _refuse_options(what, options, name, value)
            warnings.warn(
                f"{what}({name}=...): pass the network's own conditions as cond={{{name!r}: ...}}",
                DeprecationWarning,
                stacklevel=3,
            )
        conditions[name] = value
    accepted = denoiser.condition_names() if hasattr(type(denoiser), "condition_names") else None
    for name in conditions:
        if not isinstance(name, str):
            raise BadInput(f"{what}: the names of conditions must be texts, found {name!r}")
        if accepted is not None and name not in accepted and name not in RESERVED:
            raise BadInput(f"{what}: the network takes no condition {name!r}: {nearest(name, sorted(accepted))}")
    for name in RESERVED:
        if name in conditions:
            raise BadInput(
                f"{what}: a condition cannot be called {name!r}, which is an argument of the denoiser itself"
            )
    return conditions


def _refuse_options(what: str, options: Collection[str], name: str, value: Any) -> None:
    """Raise BadInput for a keyword that looks like a misspelled option."""
    known = [option for option in (*options, *ELSEWHERE) if option != "self"]
    instead = f"(a condition of the network goes in cond={{{name!r}: ...}})"
    if name in known or difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        raise BadInput(f"{what} has no option {name!r}: {nearest(name, options)} {instead}")
    if value is None or isinstance(value, (int, float, complex)):
        raise BadInput(f"{what} has no option {name}={value!r}: {nearest(name, options)} {instead}")


def named_conditions(denoiser: Any) -> frozenset[str]:
    """The conditions that the network inside a denoiser names in its `forward`, or a function in its signature."""
    while isinstance(denoiser, nn.Module) and isinstance(inner := getattr(denoiser, "denoiser", None), nn.Module):
        denoiser = inner
    net = getattr(denoiser, "net", denoiser)
    call = type(net).forward if isinstance(net, nn.Module) else net
    try:
        parameters = inspect.signature(call).parameters.values() if callable(call) else ()
    except (TypeError, ValueError):
        return frozenset()
    return frozenset(
        p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in RESERVED
    )
