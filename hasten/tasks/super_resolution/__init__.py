"""Super-resolution of images of any size and kind."""

from __future__ import annotations

from .enlarge_picture import UpscaleRequest
from .task import SuperResolution

__all__ = ["SuperResolution", "UpscaleRequest"]
