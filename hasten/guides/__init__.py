"""Guides: one method a file, each a frozen dataclass whose `wrap(denoiser)` returns a denoiser that is steered."""

from __future__ import annotations

from .cfg import CFG

__all__ = ["CFG"]
