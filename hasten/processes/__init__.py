"""Forward processes other than `x_t = alpha x + sigma eps`, one file each: `Process` and its subclasses."""

from __future__ import annotations

from ._base import Process
from .i2sb import I2SB

__all__ = ["I2SB", "Process"]
