"""The verbs. Each is a plain function; the command line is built from their signatures and docstrings."""

from __future__ import annotations

from .compare import compare
from .distill import distill
from .evaluate import evaluate
from .export import export
from .models import models, show
from .quantize import quantize
from .restyle import restyle
from .sample import sample
from .train import train
from .tune import tune

VERBS = (sample, compare, distill, quantize, tune, restyle, export, train, evaluate, models, show)
__all__ = [verb.__name__ for verb in VERBS]
