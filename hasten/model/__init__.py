"""`Model`: a denoiser with what a user needs to sample from it."""

from __future__ import annotations

from .model import Label, Model

__all__ = ["Label", "Model"]
