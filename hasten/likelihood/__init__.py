"""Likelihood of a model in bits a dimension: exactly by the probability-flow ODE, or bounded by the variational bound.

The folder is the list of methods: `pick("likelihood", "ode:rtol=1e-4")`. Each is called as
`method(denoiser, x, seeds, levels, **cond)` and returns a `Likelihood`, with one value for each sample.
"""

from __future__ import annotations

from ._base import Likelihood, bits_per_dim, decoder_log_probability, dequantise, gaussian_bin_log_probability
from .ancestral_bound import AncestralBound
from .bound import VariationalBound
from .ode import OdeLikelihood

__all__ = [
    "AncestralBound",
    "Likelihood",
    "OdeLikelihood",
    "VariationalBound",
    "bits_per_dim",
    "decoder_log_probability",
    "dequantise",
    "gaussian_bin_log_probability",
]
