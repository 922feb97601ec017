"""Numbers on the command line: every one is read as its type and held to its range here, before a verb begins."""

from __future__ import annotations

import functools
import inspect
import math
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from ..errors import HastenError

SEEDS = 2**64 - 1  # what a torch generator takes
COUNT, LARGE = 10**6, 10**12
# Lowest and highest value of an option, for all verbs or for one ("verb.option").
RANGES: dict[str, tuple[float, float]] = {
    "n": (1, 10**8), "seed": (0, SEEDS), "steps": (1, COUNT), "batch_size": (1, COUNT), "timing_batch": (1, COUNT),
    "rounds": (1, 10**4), "repeats": (1, 10**4), "columns": (1, 10**5), "guidance_scale": (-1e6, 1e6),
    "encode_guidance_scale": (-1e6, 1e6), "encode_steps": (1, COUNT), "decode_steps": (1, COUNT),
    "iterations": (0, LARGE), "size": (1, 2**16), "channels": (1, 4), "blocks": (1, 1000), "patch": (1, 2**12),
    "grad_accumulation": (1, COUNT), "lr": (1e-12, 1e3), "label_drop": (0, 1), "minutes": (1e-9, 1e7),
    "nfe_budget": (1, 1e30), "weight_bits": (1, 64), "act_bits": (0, 64), "rank": (0, 2**16), "time_groups": (1, 1000),
    "int8_fraction": (0, 1), "images": (1, COUNT), "calibration_steps": (1, COUNT), "opset": (1, 1000),
    "factor": (1, 2**10), "crop": (1, 2**16), "latent_channels": (1, 2**12), "gan_weight": (0, 1e6), "lora": (1, 2**16),
    "extract_lora.rank": (1, 2**16), "images_per_prompt": (1, 1000), "levels": (2, 2**16), "mu": (-100, 100),
    "tile": (1, 2**16), "overlap": (0, 2**16), "temperature": (0, 2), "border": (0, 2**16),
    "psnr": (1, 99), "seconds": (1e-9, 1e9), "confidence": (0.5, 0.9999), "speed": (0.25, 4), "choose.n": (16, 10**8),
    "train_steps": (1, LARGE), "times": (2, COUNT), "error": (1e-9, 0.999), "prior_images": (0, COUNT),
    "train.steps": (1, LARGE), "distill.steps": (1, LARGE), "quantize.iterations": (1, LARGE),
}  # fmt: skip


def with_checked_numbers(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb as the command line calls it: its numbers are read by `read`, and no path is empty.

    Its help and its types stay the same."""
    from cyclopts import Parameter

    hints = typing.get_type_hints(verb, include_extras=True)
    signature = inspect.signature(verb)
    parameters = []
    for name, parameter in signature.parameters.items():
        hint = hints.get(name, parameter.annotation)
        if (kind := number_type(hint)) is not None:
            low, high = RANGES.get(f"{verb.__name__}.{name}") or RANGES.get(name, (-math.inf, math.inf))

            def convert(type_: Any, tokens: Sequence[Any], args: Any = (kind, low, high, name)) -> Any:
                return read_number(tokens[0].value, *args)

            hint = Annotated[hint, Parameter(converter=convert)]
        elif Path in (typing.get_args(hint) or (hint,)) or name in ("model", "reference"):

            def convert_path(type_: Any, tokens: Sequence[Any], kind: Any = hint) -> Any:
                if not tokens[0].value.strip():
                    raise ValueError("is empty: give a path (. is the current folder)")
                path = Path in (typing.get_args(kind) or (kind,))
                return Path(tokens[0].value) if path else tokens[0].value

            if list not in (typing.get_origin(hint), *map(typing.get_origin, typing.get_args(hint))):
                hint = Annotated[hint, Parameter(converter=convert_path)]
        parameters.append(parameter.replace(annotation=hint))

    @functools.wraps(verb)
    def run(*arguments: Any, **options: Any) -> Any:
        return verb(*arguments, **options)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {**hints, **{p.name: p.annotation for p in parameters}}
    del run.__wrapped__
    return run


def number_type(hint: Any) -> type | None:
    """int or float, of an option that is such a number or None; None of another."""
    kinds = {kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)}
    return next(iter(kinds)) if kinds in ({int}, {float}) else None


class OutOfRange(HastenError):
    """A number of the right type that cannot be. (No ValueError, which the parser would take for a wrong usage.)"""


def read_number(text: str, kind: type, low: float = -math.inf, high: float = math.inf, name: str = "it") -> Any:
    """The number that a text is. Raises ValueError for one of another type and OutOfRange, in a line that says what it
    must be."""
    what = "a whole number" if kind is int else "a number"
    shown = text if len(text) <= 40 else f"{text[:37]}..."
    form = "[+-]?[0-9]{1,4000}" if kind is int else r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|inf|nan)"
    if not re.fullmatch(form, text, re.ASCII):
        raise ValueError(
            f"must be {what} of {parse_number(low)} to {parse_number(high)}, got {shown!r}{type_hint_of(text)}"
        )
    value = kind(text)
    if kind is float and not math.isfinite(value):
        raise OutOfRange(f"{name} must be a finite number of {parse_number(low)} to {parse_number(high)}, got {shown}")
    if value < low and 0 < low < 1e-6:
        raise OutOfRange(f"{name} must be positive, {what} of at most {parse_number(high)}, got {shown}")
    if value < low:
        raise OutOfRange(f"{name} must be {what} of at least {parse_number(low)}, got {shown}")
    if value > high:
        raise OutOfRange(f"{name} must be {what} of at most {parse_number(high)}, got {shown}")
    return value


def type_hint_of(text: str) -> str:
    """The whole number that was perhaps meant by `1e3` or `10.0`."""
    try:
        value = float(text)
    except ValueError:
        return ""
    return f" (write {int(value)})" if value.is_integer() and abs(value) < 1e15 else ""


def parse_number(value: float) -> str:
    """A bound as people write it."""
    return str(value) if isinstance(value, int) else f"{value:g}"
