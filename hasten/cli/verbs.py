"""The verbs. Each is a plain function; the command line is built from their signatures and docstrings."""

from __future__ import annotations

from .choose import choose
from .classify import classify
from .compare import compare
from .convert_lora import convert_lora
from .distill import distill
from .evaluate import evaluate
from .export import export
from .extract_lora import extract_lora
from .merge_lora import merge_lora
from .models import models, show
from .quantize import quantize
from .restyle import restyle
from .sample import sample
from .sigmas import sigmas
from .speak import speak
from .train import train
from .translate import translate
from .tune import tune
from .upscale import upscale

VERBS = (
    sample, compare, choose, distill, quantize, tune, restyle, translate, upscale, classify, speak, export, train,
    evaluate, models, show, sigmas, extract_lora, merge_lora, convert_lora,
)  # fmt: skip
__all__ = [verb.__name__ for verb in VERBS]
