"""What to choose for: a bound on the loss of quality, or on the time of an image."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..errors import BadInput, check_number

__all__ = ["Goal", "parse_goal"]

DEFAULT_LOSS = "5%"


@dataclass(frozen=True)
class Goal:
    """A bound.

    Args:
        kind: "loss", "psnr" or "seconds".
        value: a fraction, dB, or seconds an image.
    """

    kind: str
    value: float

    @property
    def limit(self) -> float:
        """The largest loss that is allowed: a PSNR counts negative, since more of it is better."""
        return {"loss": self.value, "psnr": -self.value, "seconds": math.inf}[self.kind]

    @property
    def seconds(self) -> float:
        """The longest time of an image that is allowed."""
        return self.value if self.kind == "seconds" else math.inf

    def __str__(self) -> str:
        if self.kind == "loss":
            return f"--loss {100 * self.value:g}%"
        return f"--{self.kind} {self.value:g}"


def parse_goal(loss: str | float | None, psnr: float | None, seconds: float | None) -> Goal:
    """The goal of a search.

    Args:
        loss: "5%", or a fraction such as 0.05.
        psnr: in dB.
        seconds: of an image.

    Raises:
        BadInput: for more than one, and for what is no number in its range.
    """
    named = {"loss": loss, "psnr": psnr, "seconds": seconds}
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise BadInput(f"give one of --loss, --psnr and --seconds, found {' and '.join(given)}")
    if given == ["psnr"]:
        return Goal("psnr", in_range("psnr", psnr, 1, 99, "dB, such as 30"))
    if given == ["seconds"]:
        return Goal("seconds", in_range("seconds", seconds, 1e-9, 1e9, "seconds an image, such as 1.0"))
    text = DEFAULT_LOSS if loss is None else loss
    what = "a share of the plain model's figure, such as 5% or 0.05"
    if isinstance(text, str):
        found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*", text)
        if not found:
            raise BadInput(f"loss is {what}, found {text!r}")
        if not found[2] and float(found[1]) >= 1:
            raise BadInput(f"loss is {what}: write {found[1]}%")
        text = float(found[1]) / (100 if found[2] else 1)
    return Goal("loss", in_range("loss", text, 1e-6, 10, what))


def in_range(name: str, value: float | None, low: float, high: float, what: str) -> float:
    """A number in a range. Raises BadInput."""
    number = check_number(name, value)
    if not low <= number <= high:
        raise BadInput(f"{name} is {what}, found {number:g}")
    return number
