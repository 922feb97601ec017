"""Comparisons of samplers, accelerators and students in quality and cost, with their report."""

from __future__ import annotations

from .runner import compare

__all__ = ["compare"]
