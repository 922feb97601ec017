"""Judges of text-to-image samples: features for distances, and images and texts in one space."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import BadInput, nearest
from ..nets.contrastive import ContrastiveTowers
from .measure import weights_digest
from .references import ZOO

__all__ = ["ClipJudge", "TextJudge", "TowersJudge", "load_judge"]

BUNDLED_JUDGES = {"emoji": ZOO / "emoji_judge"}
TOWERS = "towers.safetensors"
TEXTS_AT_ONCE = 128
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class TextJudge(nn.Module):
    """Images and texts in one space; as a module it is a feature network (`features.FeatureNet`).

    `judge(images)` gives the pooled features of the image tower before its projection, in which distances are measured.
    `project` maps these to unit vectors, whose products with those of `texts` say how well an image fits a text.

    Args:
        tokenizer: of `transformers`; texts are truncated to `length` tokens.
        length: tokens of a text.
        size: side in pixels that images are resized to.

    References:
        Radford et al. 2021, arXiv:2103.00020.
    """

    features = "pooled image features before the projection"

    def __init__(self, tokenizer: Any, length: int, size: int) -> None:
        super().__init__()
        self.tokenizer, self.length, self.size = tokenizer, length, size
        self.name = type(self).__name__

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, 1 or 3, H, W) in [-1, 1]."""
        raise NotImplementedError

    def project(self, features: Tensor) -> Tensor:
        """Unit vectors (B, E) of features (B, D)."""
        raise NotImplementedError

    def text_vectors(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors (B, E) of tokens (B, L) and their attention mask."""
        raise NotImplementedError

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (n, E) of texts, float32 on the CPU."""
        device = next(self.parameters()).device
        parts = []
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            encoded = self.tokenizer(
                list(texts[first : first + TEXTS_AT_ONCE]),
                padding="max_length",
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            )
            mask = encoded.get("attention_mask", torch.ones_like(encoded["input_ids"]))
            parts.append(self.text_vectors(encoded["input_ids"].to(device), mask.to(device)).float().cpu())
        return torch.cat(parts)

    def truncated(self, texts: Sequence[str]) -> int:
        """How many texts are longer than what the judge reads."""
        tokens = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return sum(len(each) > self.length for each in tokens)

    @torch.no_grad()
    def image_vectors(self, features: Tensor) -> Tensor:
        """`project` on the device of the weights; (n, E) float32 on the CPU."""
        return self.project(features.to(next(self.parameters()).device)).float().cpu()

    def resized(self, images: Tensor) -> Tensor:
        """`square_resized` to the judge's side."""
        return square_resized(images, self.size)

    def named(self, kind: str) -> TextJudge:
        """The judge, frozen, with the name `KIND-DIGEST` of its weights."""
        self.name = f"{kind}-{weights_digest(self)}"
        return self.eval().requires_grad_(False)


def square_resized(images: Tensor, size: int) -> Tensor:
    """RGB images of a side, bilinear with antialiasing; the centre of images that are not square."""
    x = images.expand(-1, 3, -1, -1)
    height, width = x.shape[-2:]
    if (height, width) == (size, size):
        return x
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    x = x[..., top : top + side, left : left + side]
    if side == size:
        return x
    return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


class TowersJudge(TextJudge):
    """A judge of `ContrastiveTowers`, such as the bundled one of emoji.

    Args:
        towers: text and image towers that were trained together.
        tokenizer: of `transformers`.
        size: side of the images that they were trained on.
    """

    def __init__(self, towers: ContrastiveTowers, tokenizer: Any, size: int = 64) -> None:
        positions: Any = towers.text_model.config.max_position_embeddings  # type: ignore[union-attr]
        super().__init__(tokenizer, int(positions), size)
        self.towers = towers
        self.named("contrastive")

    def forward(self, images: Tensor) -> Tensor:
        return self.towers.image_tower(self.resized(images))  # type: ignore[no-any-return]

    def project(self, features: Tensor) -> Tensor:
        return F.normalize(self.towers.image_projection(features), dim=-1)

    def text_vectors(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.towers.text(tokens)  # which was trained without a mask


class ClipJudge(TextJudge):
    """A judge of a `CLIPModel` of `transformers`.

    Args:
        clip: the model.
        tokenizer: its tokenizer.
        mean, std: of its image processor, by channel, for pixels in [0, 1].
    """

    def __init__(
        self, clip: Any, tokenizer: Any, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
    ) -> None:
        super().__init__(
            tokenizer, int(clip.config.text_config.max_position_embeddings), int(clip.config.vision_config.image_size)
        )
        self.clip = clip
        self.register_buffer("mean", torch.tensor(list(mean)).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).reshape(1, 3, 1, 1))
        self.named("clip")

    def forward(self, images: Tensor) -> Tensor:
        pixels = ((self.resized(images) + 1) / 2 - self.mean) / self.std  # type: ignore[operator]
        return self.clip.vision_model(pixel_values=pixels).pooler_output  # type: ignore[no-any-return]

    def project(self, features: Tensor) -> Tensor:
        return F.normalize(self.clip.visual_projection(features), dim=-1)

    def text_vectors(self, tokens: Tensor, mask: Tensor) -> Tensor:
        pooled = self.clip.text_model(input_ids=tokens, attention_mask=mask).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1)


def load_judge(which: str | Path | TextJudge) -> TextJudge:
    """Load a judge, frozen and in float32.

    Args:
        which: a bundled name ("emoji"); a folder of contrastive towers (`towers.safetensors`, `text_encoder/` and
            `tokenizer/`); a folder of a `CLIPModel` of `transformers` with its tokenizer and image processor; or a
            judge.

    Raises:
        BadInput: for anything else, and for files that are missing or damaged.
    """
    if isinstance(which, TextJudge):
        return which
    folder = BUNDLED_JUDGES.get(str(which), Path(which))
    with without_weight_bars():
        return read_judge(folder, str(which))


@contextlib.contextmanager
def without_weight_bars() -> Iterator[None]:
    """Disable the bars that transformers shows while it loads weights, within the block."""
    try:
        from transformers.utils import logging as bars
    except ImportError as error:
        raise BadInput("a judge needs transformers: pip install transformers") from error

    enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            bars.enable_progress_bar()


def read_judge(folder: Path, which: str) -> TextJudge:
    """The judge in a folder, see `load_judge`; `which` is its name in messages."""
    if (folder / TOWERS).is_file():
        return TowersJudge(ContrastiveTowers.load(folder).float(), load_tokenizer(folder, folder / "tokenizer"))
    if not folder.is_dir():
        raise BadInput(f"no judge {which!r}: not a folder; {nearest(which, BUNDLED_JUDGES)}")
    kind = read_json_file(folder / "config.json").get("model_type")
    if kind != "clip":
        hint = f"; a {kind} gives --features" if str(kind).startswith(("siglip", "dino", "vit")) else ""
        raise BadInput(
            f"{folder} is no judge: it holds neither {TOWERS} nor the config.json of a CLIPModel of transformers{hint}"
        )
    from transformers import CLIPModel

    try:
        clip: Any = CLIPModel.from_pretrained(folder).float()
    except Exception as error:  # transformers and safetensors raise various exceptions
        raise BadInput(f"transformers cannot load {folder} ({type(error).__name__})") from error
    return ClipJudge(clip, load_tokenizer(folder, folder), *pixel_statistics(folder))


def load_tokenizer(judge: Path, folder: Path) -> Any:
    """The tokenizer in a folder. Raises BadInput, which names the judge."""
    from transformers import AutoTokenizer, CLIPTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):  # which would make an empty one
        raise BadInput(f"the judge {judge} has no tokenizer: {folder} holds neither tokenizer.json nor vocab.json")
    error: Exception | None = None
    for kind in (CLIPTokenizer, AutoTokenizer):
        try:
            return kind.from_pretrained(str(folder))
        except Exception as e:  # of many kinds: missing files, missing packages
            error = error or e
    raise BadInput(f"the judge {judge} has no tokenizer that transformers can load ({type(error).__name__})") from error


def pixel_statistics(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of a saved image processor; those of CLIP where there is none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        saved = read_json_file(folder / name)
        saved = saved.get("image_processor") or saved
        if "image_mean" in saved and "image_std" in saved:
            return saved["image_mean"], saved["image_std"]
    logging.getLogger(__name__).warning("%s has no image processor: pixels are scaled as those of CLIP", folder)
    return CLIP_MEAN, CLIP_STD


def read_json_file(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
