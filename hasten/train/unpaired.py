"""Two sets of images that are not paired: each image of a batch gets a random source."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..errors import BadInput
from .data import to_float
from .sources import Data

__all__ = ["unpaired_sources"]


def unpaired_sources(data: Data, source: Data) -> Data:
    """The data with a random image of `source` beside each image, as the condition `source`.

    The draw is a function of the rows of a batch, so that it differs between epochs and a run can be resumed.

    Args:
        data: the images at the end of the process.
        source: the images at its beginning, of the same shape; any number.

    Raises:
        BadInput: for sources of another shape.
    """
    if data.shape != source.shape:
        here, there = data.source or "the data", source.source or "the sources"
        raise BadInput(
            f"{there} holds images of shape {source.shape} and {here} of {data.shape}: both sets need one size and the "
            "same channels (--size, --channels)"
        )

    def fetch(rows: list[int]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(hash(tuple(int(row) for row in rows)) % 2**63)
        drawn = torch.randint(len(source), (len(rows),), generator=generator)
        return {"source": to_float(source.images(drawn))}

    return replace(data, conditions=fetch)
