"""Applications of a model other than generating images from noise. One task a file, or a folder."""

from __future__ import annotations

from .speech.speech import Speech, Spoken
from .style_transfer import Restyled, restyle
from .super_resolution import SuperResolution

__all__ = ["Restyled", "Speech", "Spoken", "SuperResolution", "restyle"]
