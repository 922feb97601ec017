"""A U-Net conditioned on text, driven by a table with one row per level, as of MobileDiffusion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import BadInput, check_int
from .layers import ModuleListOf
from .text_unet_blocks import DownLevel, Level, MiddleLevel, UpLevel

__all__ = ["Level", "TextUNet", "mobile", "mobile_table", "sd_like", "sd_like_table"]

LevelLike = Level | Mapping[str, Any]
Table = tuple[list[Level], Level]


class TextTimeEmbedding(nn.Module):
    """Sinusoidal features of a time in 0..999 and two linear layers: `(B,) -> (B, E)`.

    Args:
        features: even number of features.
        width: E.
        condition: width of a further condition, whose projection is added to the features; None: there is none.
    """

    def __init__(self, features: int, width: int, condition: int | None = None) -> None:
        super().__init__()
        self.features = features
        self.cond_proj = None if condition is None else nn.Linear(condition, features, bias=False)
        self.linear_1 = nn.Linear(features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, time: Tensor, dtype: torch.dtype, condition: Tensor | None = None) -> Tensor:
        half = self.features // 2
        rates = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=time.device))
        phase = time.float()[:, None] * rates
        features = torch.cat([phase.cos(), phase.sin()], dim=1).to(dtype)
        if self.cond_proj is not None and condition is not None:
            features = features + self.cond_proj(condition.to(dtype))
        return self.linear_2(F.silu(self.linear_1(features)))


class TextUNet(nn.Module):
    """Time- and text-conditional U-Net, `(B, C, H, W), (B,), (B, L, D) -> (B, C_out, H, W)`.

    With the table of `sd_like_table` it is the `UNet2DConditionModel` of Stable Diffusion 1, with the same names of
    parameters. The forward pass is `embed`, then `encode`, then `decode`; or `embed`, then `shallow_encode`, `deep`,
    `shallow_decode`: accelerators cache what lies between (Li et al. 2023, arXiv:2312.09608; Ma et al. 2023,
    arXiv:2312.00858). Any height and width are taken.

    Args:
        levels: the table, the finest level first; each further level halves the resolution. Levels, or dicts of their
            fields.
        middle: the row of the middle block.
        in_channels: C, 4 for the latents of Stable Diffusion.
        out_channels: C_out. Default: `in_channels`.
        cross_attention_dim: D, the width of the text encoder's output.
        norm_num_groups: groups of every GroupNorm; the widths must be multiples of it.
        time_cond_proj_dim: width of an embedded guidance scale that is an input, as of latent consistency models; None:
            there is none.

    Raises:
        BadInput: for a table, widths or channels that are not valid.

    References:
        Zhao et al. 2023, arXiv:2311.16567; Rombach et al. 2022, arXiv:2112.10752.
    """

    null_conditions = True  # guidance's unconditional branch has the condition null_text

    def __init__(
        self,
        levels: Sequence[LevelLike],
        middle: LevelLike,
        in_channels: int = 4,
        out_channels: int | None = None,
        cross_attention_dim: int = 768,
        norm_num_groups: int = 32,
        time_cond_proj_dim: int | None = None,
    ) -> None:
        super().__init__()
        rows, center = [as_level(row) for row in levels], as_level(middle)
        out_channels = in_channels if out_channels is None else out_channels
        sizes = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "cross_attention_dim": cross_attention_dim,
            "norm_num_groups": norm_num_groups,
            **({} if time_cond_proj_dim is None else {"time_cond_proj_dim": time_cond_proj_dim}),
        }
        for name, value in sizes.items():
            check_int(name, value, 1)
        check_table(rows, center, norm_num_groups)
        self._settings: dict[str, Any] = {"levels": [asdict(row) for row in rows], "middle": asdict(center), **sizes}
        self.conv_in = nn.Conv2d(in_channels, rows[0].width, 3, padding=1)
        shared = 4 * rows[0].width, cross_attention_dim, norm_num_groups  # time, text, groups
        self.time_embedding = TextTimeEmbedding(rows[0].width, shared[0], time_cond_proj_dim)
        widths = [rows[0].width] + [row.width for row in rows]  # of the input of each level, and of the middle
        self.down_blocks: ModuleListOf[DownLevel] = ModuleListOf(
            DownLevel(row, widths[k], *shared, row is rows[-1]) for k, row in enumerate(rows)
        )
        self.mid_block = MiddleLevel(center, widths[-1], *shared)
        self.up_blocks: ModuleListOf[UpLevel] = ModuleListOf()
        c = center.width
        for k, row in reversed(list(enumerate(rows))):
            skips = ([widths[k]] + [row.width] * row.down_blocks)[-row.up_blocks :]
            self.up_blocks.append(UpLevel(row, c, skips, *shared, k == 0))
            c = row.width
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, c)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)

    @property
    def config(self) -> Any:
        """The constructor's arguments, as plain values."""
        return self._settings

    def embed(self, time: Tensor, text: Tensor, timestep_cond: Tensor | None = None) -> dict[str, Tensor]:
        """What the blocks read except x.

        Args:
            time: (B,), 0 to 999.
            text: (B, L, D), the output of the text encoder.
            timestep_cond: (B, time_cond_proj_dim), the embedded guidance scale.

        Raises:
            BadInput: for a text of another width, and a guidance scale that the network does not take.
        """
        width = self._settings["cross_attention_dim"]
        if text.ndim != 3 or text.shape[-1] != width:
            raise BadInput(f"text must be (B, L, {width}), the text encoder's output, got {tuple(text.shape)}")
        if timestep_cond is not None and self.time_embedding.cond_proj is None:
            raise BadInput("this U-Net takes no guidance scale: it was built without time_cond_proj_dim")
        return {"time": self.time_embedding(time, self.conv_norm_out.weight.dtype, timestep_cond), "text": text}

    def encode(self, x: Tensor, emb: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """The encoder and the middle block: (skips, middle); neither is modified later."""
        return self._deeper(self.shallow_encode(x, emb), emb)

    def decode(self, skips: Sequence[Tensor], middle: Tensor, emb: dict[str, Tensor]) -> Tensor:
        """The decoder: `encode`'s features, with an embedding that may be of another time -> `(B, C_out, H, W)`."""
        return self._head(self._ups(skips, middle, emb, 0, len(self.up_blocks)))

    def shallow_encode(self, x: Tensor, emb: dict[str, Tensor]) -> list[Tensor]:
        """The finest level of the encoder: the skips of the decoder's last level."""
        return self.down_blocks[0](self.conv_in(x), emb["time"], emb["text"])

    def deep(self, first: Sequence[Tensor], emb: dict[str, Tensor]) -> Tensor:
        """Everything deeper: the input of the decoder's last level, which DeepCache caches."""
        skips, middle = self._deeper(first, emb)
        return self._ups(skips, middle, emb, 0, len(self.up_blocks) - 1)

    def shallow_decode(self, first: Sequence[Tensor], up_input: Tensor, emb: dict[str, Tensor]) -> Tensor:
        """The decoder's last level and the output layers: -> `(B, C_out, H, W)`."""
        last = len(self.up_blocks)
        return self._head(self._ups(first, up_input, emb, last - 1, last))

    def forward(self, x: Tensor, time: Tensor, text: Tensor, timestep_cond: Tensor | None = None) -> Tensor:
        """Raw output (B, C_out, H, W) at noisy x (B, C, H, W); the other arguments are those of `embed`."""
        emb = self.embed(time, text, timestep_cond)
        return self.decode(*self.encode(x, emb), emb)

    def _deeper(self, first: Sequence[Tensor], emb: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """The levels below the finest one, and the middle block: (skips, middle)."""
        skips = list(first)
        for above, row in zip(self.down_blocks, list(self.down_blocks)[1:]):
            skips += row(above.downsamplers[0](skips[-1]), emb["time"], emb["text"])
        return skips, self.mid_block(skips[-1], emb["time"], emb["text"])

    def _ups(self, skips: Sequence[Tensor], x: Tensor, emb: dict[str, Tensor], first: int, last: int) -> Tensor:
        """The levels first to last - 1 of the decoder, which read skips from the end of the list."""
        skips = list(skips)
        for row in list(self.up_blocks)[first:last]:
            count = len(row.resnets)
            x = row(x, skips[-count:], emb["time"], emb["text"])
            del skips[-count:]
            if len(row.upsamplers):
                x = row.upsamplers[0](x, skips[-1].shape[-2:])
        return x

    def _head(self, x: Tensor) -> Tensor:
        """The output layers."""
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def as_level(row: LevelLike) -> Level:
    """A row of the table as a `Level`.

    Raises:
        BadInput: for fields that a level does not have.
    """
    if isinstance(row, Level):
        return row
    try:
        return Level(**row)
    except TypeError as e:
        raise BadInput(f"a row of the table must be a Level or a dict of its fields, got {row!r} ({e})") from e


def check_table(levels: Sequence[Level], middle: Level, groups: int) -> None:
    """Refuse a table that describes no U-Net.

    Raises:
        BadInput: with the row.
    """
    if not levels:
        raise BadInput("a U-Net needs at least one level")
    for k, row in enumerate(levels):
        if not 1 <= row.up_blocks <= row.down_blocks + 1:
            raise BadInput(
                f"level {k}: up_blocks must be 1 to down_blocks + 1 = {row.down_blocks + 1}: {row.up_blocks}"
            )
    for row in (*levels, middle):
        if row.width % groups:
            raise BadInput(f"width {row.width} is no multiple of norm_num_groups = {groups}")
    if levels[0].width % 2:
        raise BadInput(f"the finest level's width must be even, got {levels[0].width}")


def _heads(widths: Sequence[int], heads: int | Sequence[int]) -> list[int]:
    """One number of heads per level."""
    every = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    if not widths or len(every) != len(widths):
        raise BadInput(f"heads must be one number or one per width, got {heads!r} for widths {tuple(widths)}")
    return every


def sd_like_table(widths: Sequence[int], heads: int | Sequence[int] = 8, layers: int = 2) -> Table:
    """The table of Stable Diffusion 1: (levels, middle).

    Args:
        widths: of the levels, the finest first; Stable Diffusion has 320, 640, 1280, 1280.
        heads: attention heads, of all levels or of each.
        layers: residual blocks of each level of the encoder; the decoder has one more.

    Raises:
        BadInput: for numbers of heads that do not fit.

    References:
        Rombach et al. 2022, arXiv:2112.10752.
    """
    every = _heads(widths, heads)
    levels = [Level(w, h, layers, layers + 1) for w, h in zip(widths, every)]
    levels[-1] = replace(levels[-1], transformer_blocks=0)
    return levels, Level(widths[-1], every[-1], 1, 1)


def mobile_table(widths: Sequence[int], heads: int | Sequence[int] = 8, transformer_blocks: int = 2) -> Table:
    """The table of MobileDiffusion's choices, without ReLU attention: (levels, middle).

    No attention at the finest level, cross-attention only at the second; self- and cross-attention with one projection
    for keys and values in the coarser ones and the middle, which has most transformer blocks; swish gates and smaller
    feed-forward layers; separable convolutions below the finest level; one residual block in each level of the encoder
    and two in the decoder, one in the coarsest level.

    Args:
        widths: of the levels, the finest first.
        heads: attention heads, of all levels or of each.
        transformer_blocks: in the middle.

    Raises:
        BadInput: for numbers of heads that do not fit.

    References:
        Zhao et al. 2023, arXiv:2311.16567.
    """
    levels = []
    for k, (width, h) in enumerate(zip(widths, _heads(widths, heads))):
        row = Level(width, h, 1, 2 if k + 1 < len(widths) else 1, shared_kv=True, ff_factor=6, activation="silu")
        row = replace(row, convolution="dense" if k == 0 else "separable", self_attention=k > 1)
        levels.append(replace(row, transformer_blocks=0 if k == 0 else 1))
    deepest = levels[-1]
    middle = replace(deepest, self_attention=True, transformer_blocks=transformer_blocks, up_blocks=1)
    return levels, middle


def sd_like(widths: Sequence[int], heads: int | Sequence[int] = 8, layers: int = 2, **sizes: Any) -> TextUNet:
    """A `TextUNet` with the table of `sd_like_table`; `sizes` are the other arguments of `TextUNet`."""
    return TextUNet(*sd_like_table(widths, heads, layers), **sizes)


def mobile(
    widths: Sequence[int], heads: int | Sequence[int] = 8, transformer_blocks: int = 2, **sizes: Any
) -> TextUNet:
    """A `TextUNet` with the table of `mobile_table`; `sizes` are the other arguments of `TextUNet`."""
    return TextUNet(*mobile_table(widths, heads, transformer_blocks), **sizes)
