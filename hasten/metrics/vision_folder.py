"""Feature networks from folders of `transformers`: the image towers of CLIP, SigLIP, DINOv2 and other encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import BadInput
from .measure import weights_digest
from .text_judge import TOWERS, load_judge, pixel_statistics, read_json_file, square_resized, without_weight_bars

__all__ = ["CoarsePixels", "VisionFeatures", "load_vision", "net_from_folder"]

TOKENIZERS = ("tokenizer.json", "vocab.json")
CONFIG = "config.json"


class VisionFeatures(nn.Module):
    """Pooled features of an image encoder of `transformers`.

    `net(images)`: (B, 1 or 3, H, W) in [-1, 1] -> (B, D): the encoder's `pooler_output` where it has one, else the
    first token of its last layer, else the mean over positions. The centre square is resized to `size` and scaled as
    the folder's image processor does.

    Args:
        encoder: the image tower.
        name: for the record.
        size: side in pixels.
        mean, std: of the image processor, by channel, for pixels in [0, 1].
    """

    def __init__(self, encoder: nn.Module, name: str, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.encoder, self.size = encoder, size
        self.register_buffer("mean", torch.tensor(list(mean)).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).reshape(1, 3, 1, 1))
        self.name = f"{name}-{weights_digest(encoder)}"

    def forward(self, images: Tensor) -> Tensor:
        pixels = ((square_resized(images, self.size) + 1) / 2 - self.mean) / self.std  # type: ignore[operator]
        output: Any = self.encoder(pixel_values=pixels)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)  # type: ignore[no-any-return]
        last: Tensor = output.last_hidden_state
        return last[:, 0] if last.ndim == 3 else last.flatten(2).mean(2)


class CoarsePixels(nn.Module):
    """The image averaged to `side` x `side` squares, as a vector: a distance of it is a root mean square difference on
    the scale 0 to 1. What is there where no feature network is."""

    def __init__(self, side: int = 16) -> None:
        super().__init__()
        self.side, self.name = side, f"pixels at {side}x{side}"

    def forward(self, images: Tensor) -> Tensor:
        coarse = F.adaptive_avg_pool2d(images, self.side).flatten(1)
        return coarse / 2 / coarse.shape[1] ** 0.5


def net_from_folder(folder: str | Path) -> nn.Module:
    """The feature network in a folder: a judge (`text_judge.load_judge`), or the image tower of an encoder of
    `transformers`.

    Raises:
        BadInput: where it holds neither.
    """
    folder = Path(folder)
    kind = read_json_file(folder / CONFIG).get("model_type")
    if kind is None and not (folder / TOWERS).is_file():
        raise BadInput(
            f"{folder} holds no feature network: no {CONFIG} of a CLIP, SigLIP, DINOv2 or other image encoder of "
            f"transformers, and no {TOWERS}"
        )
    tower = isinstance(kind, str) and (kind != "clip" or not any((folder / name).is_file() for name in TOKENIZERS))
    return load_vision(folder) if tower else load_judge(folder)


def load_vision(folder: str | Path) -> VisionFeatures:
    """The image tower in a folder of `transformers`, frozen and in float32: of a CLIPModel or SiglipModel the vision
    model, of DINOv2, ViT and others the model itself.

    Raises:
        BadInput: for a folder that holds no encoder of images, or that transformers cannot load.
    """
    folder = Path(folder)
    config = read_json_file(folder / CONFIG)
    with without_weight_bars():
        from transformers import AutoModel

        try:
            model: Any = AutoModel.from_pretrained(str(folder), local_files_only=True).float()
        except Exception as error:  # transformers and safetensors raise various exceptions
            line = " ".join(str(error).split())[:160]
            raise BadInput(f"transformers cannot load {folder} ({type(error).__name__}: {line})") from error
    encoder = getattr(model, "vision_model", model)
    own = getattr(encoder, "config", model.config)
    size = processor_side(folder) or side_of(getattr(own, "image_size", None))
    if size is None or int(getattr(own, "num_channels", 3)) != 3:
        raise BadInput(f"{folder} ({config.get('model_type')}) is no encoder of RGB images")
    mean, std = pixel_statistics(folder)
    return VisionFeatures(encoder, str(config.get("model_type")), size, mean, std).eval().requires_grad_(False)


def processor_side(folder: Path) -> int | None:
    """The side that the folder's image processor crops or resizes to; None where it does not say."""
    saved = read_json_file(folder / "preprocessor_config.json")
    if saved.get("do_center_crop", True) and (side := side_of(saved.get("crop_size"))) is not None:
        return side
    return side_of(saved.get("size"))


def side_of(value: Any) -> int | None:
    """A side in pixels from the forms that transformers has; None for anything else."""
    if isinstance(value, dict):
        value = value.get("height") or value.get("shortest_edge")
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return int(value) if isinstance(value, int) and value > 0 else None
