"""LWTDM: the lightweight network of diffusion super-resolution, which reads the small image as it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .embeddings import Embeddings
from .layers import ModuleListOf, TimeFeatures, group_norm
from .source_cache import SourceCache

__all__ = ["LWTDM"]


class LWTDMBlock(nn.Module):
    """Two 3x3 convolutions, with the time added between them, and the shortcut: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, embedding: int, dropout: float) -> None:
        super().__init__()
        groups = min(32, max(channels // 8, 1))
        self.norm1 = group_norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(embedding, channels)
        self.norm2 = group_norm(channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """embedding: (B, E) of the time; None for the small image, which has none."""
        h = self.conv1(F.silu(self.norm1(x)))
        if embedding is not None:
            h = h + self.time(F.silu(embedding))[:, :, None, None]
        return x + self.conv2(self.dropout(F.silu(self.norm2(h))))


class CrossAttention(nn.Module):
    """Attention of x (B, C, H, W) to y (B, C, h, w), one head of `inner` channels, with a 3x3 output convolution."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, inner, 1, bias=False)
        self.key = nn.Conv2d(channels, inner, 1, bias=False)
        self.value = nn.Conv2d(channels, inner, 1, bias=False)
        self.out = nn.Conv2d(inner, channels, 3, padding=1)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """x (B, C, H, W) with what it finds in the keys and values of y, see `read`."""
        h = F.scaled_dot_product_attention(tokens(self.query(x)), key, value)
        return x + self.out(h[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))

    def read(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of y (B, C, h, w), (B, 1, h w, inner) each."""
        return tokens(self.key(y)), tokens(self.value(y))


def tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H W, C), of one head: exporters and torch's fast kernels know four dimensions only."""
    return x.flatten(2).transpose(1, 2)[:, None]


class LWTDM(nn.Module):
    """Denoiser of images that are `factor` times larger than the image it reads: `(B, C, H, W), (B,), source
    (B, C, H / factor, W / factor) -> (B, C_out, H, W)`.

    Noisy and small image pass the same encoder, of residual blocks and space-to-depth; the small one, enlarged, is
    added to the noisy one after every block. In the middle the noisy one attends to the small one. The decoder is of
    residual blocks and depth-to-space; there are no skip connections. The default is the paper's, of 11,590,587
    parameters. What depends on the small image alone is computed once a sampling (`caching_sources`).

    Args:
        channels: C of both images.
        out_channels: of the output. Default: C.
        factor: of the sides of both images, 2, 4, 8, ...
        width: channels in the middle, a multiple of `8 * 4**levels`.
        levels: space-to-depth steps, each of which halves the sides and has four times the channels.
        inner: channels of the attention and of the time features, even.
        middle: residual blocks with attention in the middle.
        dropout: probability in [0, 1], in the residual blocks.
        time_scale: factor of the time before the sinusoids (1000 for a time in [0, 1]).

    Raises:
        ValueError: for a width that the levels do not divide.

    References:
        An, Xue, Huo, Xiang, Pan 2024, "Efficient remote sensing image super-resolution via lightweight diffusion
        models", IEEE Geoscience and Remote Sensing Letters.
    """

    def __init__(
        self,
        channels: int = 3,
        out_channels: int | None = None,
        factor: int = 8,
        width: int = 384,
        levels: int = 2,
        inner: int = 32,
        middle: int = 2,
        dropout: float = 0.1,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        if factor < 1 or levels < 1 or width % (8 * 4**levels):
            raise ValueError(
                f"LWTDM needs a factor and levels of at least 1, and a width that {8 * 4**levels} divides; got "
                f"factor {factor}, {levels} levels, width {width}"
            )
        out = channels if out_channels is None else out_channels
        self.config: dict[str, Any] = {
            "channels": channels,
            "out_channels": out,
            "factor": factor,
            "width": width,
            "levels": levels,
            "inner": inner,
            "middle": middle,
            "dropout": dropout,
            "time_scale": time_scale,
        }
        self.source_channels, self.source_factor = channels, factor
        self.classes, self.null_label = 0, None
        self.multiple = factor * 2**levels
        self.source_cache = SourceCache()
        self.time = nn.Sequential(
            TimeFeatures(inner, time_scale), nn.Linear(inner, 4 * inner), nn.SiLU(), nn.Linear(4 * inner, inner)
        )
        first = width // 4**levels
        widths = [first * 4**level for level in range(levels)]
        self.conv_in = nn.Conv2d(channels, first, 3, padding=1)
        self.down: ModuleListOf[nn.Module] = ModuleListOf(LWTDMBlock(w, inner, dropout) for w in widths)
        self.fusion: ModuleListOf[nn.Module] = ModuleListOf(nn.Conv2d(w, w, 3, padding=1) for w in widths)
        self.middle: ModuleListOf[nn.Module] = ModuleListOf(LWTDMBlock(width, inner, dropout) for _ in range(middle))
        self.attention: ModuleListOf[CrossAttention] = ModuleListOf(CrossAttention(width, inner) for _ in range(middle))
        self.up: ModuleListOf[ModuleListOf[nn.Module]] = ModuleListOf(
            ModuleListOf(LWTDMBlock(4 * w, inner, dropout) for _ in range(2)) for w in reversed(widths)
        )
        self.norm_out = group_norm(first, min(32, max(first // 8, 1)))
        self.conv_out = nn.Conv2d(first, out, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, source: Tensor | None = None) -> Tensor:
        """Raw output (B, C_out, H, W) at noisy images x (B, C, H, W), times (B,) and small images `source`.

        Raises:
            ValueError: for a source of another size than x asks for, and for sides that the levels do not divide.
        """
        emb = self.embed(time, source)
        return self.decode(*self.encode(x, emb), emb)

    def embed(self, time: Tensor, source: Tensor | None = None) -> Embeddings:
        """The embedding of the time (B,), and the features of the small images (B, C, h, w).

        Raises:
            ValueError: without a source, and for one whose sides the levels do not divide.
        """
        if source is None or source.ndim != 4 or source.shape[1] != self.source_channels:
            size = f"({self.source_channels}, H / {self.source_factor}, W / {self.source_factor})"
            found = "none" if source is None else tuple(source.shape[1:])
            raise ValueError(f"this network needs source= of shape {size}, got {found}")
        sides = tuple(side * self.source_factor for side in source.shape[2:])
        if any(side % self.multiple for side in sides):
            raise ValueError(f"height and width must be multiples of {self.multiple}, got {sides}")
        emb = self.time(time)
        small = source.to(emb.dtype)
        # the shared encoder's activation ranges, where it is quantized by groups of times
        groups = tuple(int(getattr(layer, "group", 0)) for layer in self.modules())
        features = self.source_cache.features(small, (id(self), self.training, groups), lambda: self.read(small))
        return Embeddings({"time": emb, **features})

    def read(self, source: Tensor) -> dict[str, Tensor]:
        """What is added to the noisy images after each block, `added_K` (B, C_K, H_K, W_K), and what the middle attends
        to, `key_K` and `value_K`."""
        features: dict[str, Tensor] = {}
        y = self.conv_in(source)
        for k, (block, fusion) in enumerate(zip(self.down, self.fusion, strict=True)):
            y = block(y, None)
            enlarged = F.interpolate(y, scale_factor=float(self.source_factor), mode="nearest")
            features[f"added_{k}"] = fusion(enlarged)
            y = F.pixel_unshuffle(y, 2)
        for k, (block, attention) in enumerate(zip(self.middle, self.attention, strict=True)):
            y = block(y, None)
            features[f"key_{k}"], features[f"value_{k}"] = attention.read(y)
        return features

    def encode(self, x: Tensor, emb: Embeddings) -> tuple[list[Tensor], Tensor]:
        """The features (B, C_K, H_K, W_K) of each level, which the decoder does not read, and those in the middle.

        Raises:
            ValueError: for images of another size than the sources ask for.
        """
        height, width = x.shape[-2:]
        if height % self.multiple or width % self.multiple:
            raise ValueError(f"height and width must be multiples of {self.multiple}, got {(height, width)}")
        if tuple(emb["added_0"].shape[2:]) != (height, width):
            wanted, found = (
                (self.source_channels, *(side // self.source_factor for side in sides))
                for sides in ((height, width), emb["added_0"].shape[2:])
            )
            raise ValueError(f"this network needs source= of shape {wanted}, got {found}")
        h, skips = self.conv_in(x), []
        for k, block in enumerate(self.down):
            h = block(h, emb["time"]) + emb[f"added_{k}"]
            skips.append(h)
            h = F.pixel_unshuffle(h, 2)
        for k, (block, attention) in enumerate(zip(self.middle, self.attention, strict=True)):
            h = attention(block(h, emb["time"]), emb[f"key_{k}"], emb[f"value_{k}"])
        return skips, h

    def decode(self, skips: list[Tensor], middle: Tensor, emb: Embeddings) -> Tensor:
        """The raw output (B, C_out, H, W)."""
        h = middle
        for row in self.up:
            for block in row:
                h = block(h, emb["time"])
            h = F.pixel_shuffle(h, 2)
        result: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return result
