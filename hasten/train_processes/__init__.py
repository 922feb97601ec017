"""Forward processes that `hasten train --process` trains, one file each."""

from __future__ import annotations

from ._base import TrainProcess, TrainSettings

__all__ = ["TrainProcess", "TrainSettings"]
