"""Applications of a model other than generating images from noise. One task a file."""

from __future__ import annotations

from .speech.speech import Speech, Spoken
from .style_transfer import Restyled, restyle

__all__ = ["Restyled", "Speech", "Spoken", "restyle"]
