"""Two towers, of text and of images, trained to agree: the text encoder of a small pipeline, or its judge."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import BadInput

__all__ = ["ContrastiveTowers", "ImageTower"]


class ImageTower(nn.Module):
    """A small convolutional network: images (B, 3, H, W) in [-1, 1] to features (B, widths[-1]).

    A 4x4 stem of stride 4, then for each width one residual pair of 3x3 convolutions, halving the side between widths;
    the features are the mean over positions.

    Args:
        widths: channels of each stage; multiples of 8.
        channels: of the images.
    """

    def __init__(self, widths: Sequence[int] = (48, 96, 192), channels: int = 3) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"widths": list(widths), "channels": channels}
        self.stem = nn.Conv2d(channels, widths[0], 4, stride=4)
        stages: list[nn.Module] = []
        for k, width in enumerate(widths):
            if k:
                stages.append(nn.Conv2d(widths[k - 1], width, 2, stride=2))
            stages.append(TowerBlock(width))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.GroupNorm(8, widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.stages(self.stem(x)))).mean((2, 3))


class TowerBlock(nn.Module):
    """`x + conv(act(norm(conv(act(norm(x))))))`, 3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(F.silu(norm(h)))
        return x + h


class ContrastiveTowers(nn.Module):
    """Features of text and images in one space: unit vectors whose product is high for a picture and its caption.

    Args:
        text_model: a `CLIPTextModel` of transformers; its pooled output is used.
        image_tower: images to features.
        dim: of the common space.

    References:
        Radford et al. 2021, arXiv:2103.00020.
    """

    def __init__(self, text_model: nn.Module, image_tower: ImageTower, dim: int = 128) -> None:
        super().__init__()
        self.text_model, self.image_tower = text_model, image_tower
        hidden: Any = text_model.config.hidden_size  # type: ignore[union-attr]
        self.text_projection = nn.Linear(hidden, dim, bias=False)
        self.image_projection = nn.Linear(image_tower.config["widths"][-1], dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def text(self, tokens: Tensor) -> Tensor:
        """Unit vectors (B, dim) of tokens (B, L)."""
        return F.normalize(self.text_projection(self.text_model(tokens).pooler_output), dim=-1)

    def image(self, x: Tensor) -> Tensor:
        """Unit vectors (B, dim) of images (B, C, H, W) in [-1, 1]."""
        return F.normalize(self.image_projection(self.image_tower(x)), dim=-1)

    def loss(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The symmetric cross-entropy of a batch, where a caption that occurs twice is right for both pictures."""
        logits = self.log_scale.exp().clamp_max(100.0) * self.image(x) @ self.text(tokens).T
        same = (tokens[:, None] == tokens[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))

    def save(self, folder: Path) -> None:
        """Write `text_encoder/` in the layout of transformers, and the rest into `towers.safetensors`."""
        from safetensors.torch import save_file

        text: Any = self.text_model
        text.save_pretrained(folder / "text_encoder")
        rest = {k: v.contiguous() for k, v in self.state_dict().items() if not k.startswith("text_model.")}
        config = {"image_tower": json.dumps(self.image_tower.config), "dim": str(self.image_projection.out_features)}
        save_file(rest, folder / "towers.safetensors", config)

    @classmethod
    def load(cls, folder: Path) -> ContrastiveTowers:
        """Read what `save` wrote. Raises BadInput if it is missing or damaged."""
        from safetensors import safe_open
        from transformers import CLIPTextModel

        try:
            with safe_open(folder / "towers.safetensors", "pt") as file:
                config = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            text = CLIPTextModel.from_pretrained(folder / "text_encoder")
        except Exception as e:  # safetensors and transformers raise various exceptions
            raise BadInput(f"cannot read the towers in {folder} ({type(e).__name__})") from e
        towers = cls(text, ImageTower(**json.loads(config["image_tower"])), int(config["dim"]))
        missing, unexpected = towers.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if not name.startswith("text_model.")]
        if missing or unexpected:
            raise BadInput(f"{folder} lacks the weights {missing[:3]} of towers, or has others: {unexpected[:3]}")
        return towers.eval()
