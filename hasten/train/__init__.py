"""Training: the one loop, its data and its losses."""

from .data import Batches, Data, open_data, to_float
from .ema import Ema
from .encoded import encode_captioned
from .fit import Fit
from .losses import DenoisingLoss
from .trained_module import TrainedModule

__all__ = [
    "Batches",
    "Data",
    "DenoisingLoss",
    "Ema",
    "Fit",
    "TrainedModule",
    "encode_captioned",
    "open_data",
    "to_float",
]
