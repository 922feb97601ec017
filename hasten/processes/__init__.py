"""Forward processes other than `x_t = alpha x + sigma eps`, one file each: `Process` and its subclasses."""

from __future__ import annotations

from ._base import Process
from .blurring import Blurring
from .ddbm import DDBM
from .dsbm import DSBM
from .i2sb import I2SB
from .interpolant import Interpolant
from .soft import Soft

__all__ = ["DDBM", "DSBM", "I2SB", "Blurring", "Interpolant", "Process", "Soft"]
