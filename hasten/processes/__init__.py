"""Forward processes other than `x_t = alpha x + sigma eps`, one file each: `Process` and its subclasses."""

from __future__ import annotations

from ._base import Process
from .blurring import Blurring
from .i2sb import I2SB
from .soft import Soft

__all__ = ["I2SB", "Blurring", "Process", "Soft"]
