"""`Model`: a denoiser with what a user needs to sample from it."""

from __future__ import annotations

from ..utils.deprecation import forward
from .model import Label, Model

__all__ = ["Label", "Model"]

__getattr__ = forward(__name__, {"load": "hasten.loading"})
