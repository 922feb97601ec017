"""The verbs. Each is a plain function; the command line is built from their signatures and docstrings."""

from __future__ import annotations

from .distill import distill
from .export import export
from .compare import compare, evaluate
from .models import models, show
from .sample import sample, train
from .quantize import quantize
from .restyle import restyle
from .tune import tune

VERBS = (sample, compare, distill, quantize, tune, restyle, export, train, evaluate, models, show)
__all__ = [verb.__name__ for verb in VERBS]
