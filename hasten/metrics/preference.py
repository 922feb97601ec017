"""A learned human preference of images for their prompts: ImageReward, where it is installed with its weights."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..images import to_uint8

__all__ = ["ImageReward", "find_image_reward"]

WEIGHTS, CONFIG = "ImageReward.pt", "med_config.json"
PLACE = Path("~/.cache/ImageReward")


class ImageReward:
    """Scores of the package `ImageReward`.

    Args:
        model: of its `load`.

    References:
        Xu et al. 2023, arXiv:2304.05977.
    """

    name = "ImageReward"

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The score of each image (N, C, H, W) in [-1, 1] for its prompt, (N,)."""
        from PIL import Image

        pictures = [Image.fromarray(pixels.squeeze()).convert("RGB") for pixels in to_uint8(images)]
        pairs = zip(prompts, pictures, strict=True)
        return torch.tensor([float(self.model.score(prompt, picture)) for prompt, picture in pairs])


def find_image_reward() -> tuple[ImageReward | None, str | None]:
    """ImageReward with the weights that its package has downloaded before; nothing is downloaded.

    Returns:
        The scorer or None, and a line on what is missing where the package is installed.

    Raises:
        BadInput: where package and weights are there and do not load.
    """
    if importlib.util.find_spec("ImageReward") is None:
        return None, None
    folder = PLACE.expanduser()
    missing = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
    if missing:
        return None, f"ImageReward is installed, but {' and '.join(missing)} not in {folder}: it is not measured"
    try:
        package: Any = importlib.import_module("ImageReward")
        return ImageReward(package.load(str(folder / WEIGHTS), med_config=str(folder / CONFIG))), None
    except Exception as error:  # of many kinds
        raise BadInput(f"ImageReward does not load ({type(error).__name__}: {error})") from error
