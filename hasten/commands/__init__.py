"""The verbs. Each is a plain function; the command line is built from their signatures and docstrings."""

from __future__ import annotations

from .distilling import distill
from .exporting import export
from .judging import compare, evaluate
from .looking import models, show
from .making import sample, train
from .quantizing import quantize
from .restyling import restyle
from .tuning import tune

VERBS = (sample, compare, distill, quantize, tune, restyle, export, train, evaluate, models, show)
__all__ = [verb.__name__ for verb in VERBS]
