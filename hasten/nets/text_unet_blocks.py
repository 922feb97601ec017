"""Blocks of `TextUNet`: residual blocks, transformers, and the rows of a level.

Their parameters have the names of `UNet2DConditionModel` of diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import BadInput, check_choice, check_int
from .layers import ModuleListOf

CONVOLUTIONS, ACTIVATIONS, ATTENTIONS = ("dense", "separable"), ("gelu", "silu"), ("softmax", "relu")


@dataclass(frozen=True)
class Level:
    """One row of a `TextUNet`'s table: a level of its encoder and decoder, or its middle.

    Args:
        width: channels.
        heads: attention heads, of width / heads channels.
        down_blocks: residual blocks in the encoder; in the middle, those before the transformer.
        up_blocks: residual blocks in the decoder, 1 to down_blocks + 1, each of which reads one skip (the last
            up_blocks of the level); in the middle, those after the transformer, 0 or more.
        convolution: "dense" 3x3, or "separable": depthwise 3x3, then 1x1. Of the residual blocks and resamplers.
        self_attention, cross_attention: whether the transformer blocks have these.
        transformer_blocks: in the transformer after each residual block; 0: no transformers.
        shared_kv: one projection for keys and values of self-attention.
        ff_factor: the first feed-forward layer has ff_factor * width outputs, half of them gates (GEGLU).
        activation: of the gates, "gelu" or "silu" (swish).
        attention: "softmax", or "relu": relu(q k^T / sqrt(d)) / L for L keys.

    Raises:
        BadInput: for values outside these ranges.

    References:
        Zhao et al. 2023, arXiv:2311.16567.
    """

    width: int
    heads: int = 8
    down_blocks: int = 2
    up_blocks: int = 3
    convolution: str = "dense"
    self_attention: bool = True
    cross_attention: bool = True
    transformer_blocks: int = 1
    shared_kv: bool = False
    ff_factor: int = 8
    activation: str = "gelu"
    attention: str = "softmax"

    def __post_init__(self) -> None:
        for name in ("width", "heads", "down_blocks"):
            check_int(name, getattr(self, name), 1)
        check_int("up_blocks", self.up_blocks, 0)
        check_int("transformer_blocks", self.transformer_blocks, 0)
        check_int("ff_factor", self.ff_factor, 2)
        check_choice("convolution", self.convolution, CONVOLUTIONS)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("attention", self.attention, ATTENTIONS)
        if self.ff_factor * self.width % 2:
            raise BadInput(f"ff_factor * width must be even, got {self.ff_factor} * {self.width}")
        if self.transformer_blocks and self.width % self.heads:
            raise BadInput(f"{self.width} channels do not split into {self.heads} attention heads")


def conv3x3(level: Level, channels: int, out_channels: int, stride: int = 1) -> nn.Module:
    """A dense or a separable 3x3 convolution."""
    if level.convolution == "dense":
        return nn.Conv2d(channels, out_channels, 3, stride, padding=1)
    depthwise = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    nn.init.kaiming_normal_(depthwise.weight, nonlinearity="linear")  # keeps the variance
    return nn.Sequential(depthwise, nn.Conv2d(channels, out_channels, 1))


class TextResBlock(nn.Module):
    """Residual block of two 3x3 convolutions, to the first of whose outputs the time embedding is added."""

    def __init__(self, level: Level, channels: int, time_width: int, groups: int) -> None:
        super().__init__()
        width = level.width
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = conv3x3(level, channels, width)
        self.time_emb_proj = nn.Linear(time_width, width)
        self.norm2 = nn.GroupNorm(groups, width)
        self.conv2 = conv3x3(level, width, width)
        self.conv_shortcut = None if channels == width else nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


def relu_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`relu(q k^T / sqrt(d)) v / L`, of queries (..., N, d), keys and values (..., L, d): (..., N, d).

    The factor 1 / L makes the result independent of the number of keys where all are duplicated.
    """
    scores = F.relu(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5)
    return scores @ value / key.shape[-2]


class TextAttention(nn.Module):
    """Multi-head attention of tokens (B, N, C) over themselves, or over a text (B, L, D).

    Args:
        level: heads, softmax or ReLU, shared keys and values.
        text_width: D for cross-attention; None: self-attention.
    """

    identity = False  # pass the values on, as with the identity for the attention map

    def __init__(self, level: Level, text_width: int | None = None) -> None:
        super().__init__()
        width = level.width
        self.heads, self.relu, self.cross = level.heads, level.attention == "relu", text_width is not None
        self.shared = level.shared_kv and text_width is None
        self.to_q = nn.Linear(width, width, bias=False)
        if self.shared:
            self.to_kv = nn.Linear(width, width, bias=False)
        else:
            self.to_k = nn.Linear(text_width or width, width, bias=False)
            self.to_v = nn.Linear(text_width or width, width, bias=False)
        self.to_out: ModuleListOf[nn.Linear] = ModuleListOf([nn.Linear(width, width)])

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        source = x if text is None else text
        key = self._heads(self.to_kv(source) if self.shared else self.to_k(source))
        value = key if self.shared else self._heads(self.to_v(source))
        if self.identity:
            return self.to_out[0](value.transpose(1, 2).flatten(2))
        query = self._heads(self.to_q(x))
        attend = relu_attention if self.relu else F.scaled_dot_product_attention
        return self.to_out[0](attend(query, key, value).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, C / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class GatedLinear(nn.Module):
    """`a * activation(b)`, of the halves a, b of a linear layer."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)
        self.silu = activation == "silu"

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.proj(x).chunk(2, dim=-1)
        return a * (F.silu(b) if self.silu else F.gelu(b))


class GatedFeedForward(nn.Module):
    """A gated linear layer and a linear layer."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        inner = level.width * level.ff_factor // 2
        gated = GatedLinear(level.width, inner, level.activation)
        self.net = nn.Sequential(gated, nn.Identity(), nn.Linear(inner, level.width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TextTransformerBlock(nn.Module):
    """Self-attention, cross-attention over the text, and a feed-forward layer, each residual, of those a level has."""

    def __init__(self, level: Level, text_width: int) -> None:
        super().__init__()
        width = level.width
        self.norm1 = nn.LayerNorm(width) if level.self_attention else None
        self.attn1 = TextAttention(level) if level.self_attention else None
        self.norm2 = nn.LayerNorm(width) if level.cross_attention else None
        self.attn2 = TextAttention(level, text_width) if level.cross_attention else None
        self.norm3 = nn.LayerNorm(width)
        self.ff = GatedFeedForward(level)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        if self.attn1 is not None and self.norm1 is not None:
            x = x + self.attn1(self.norm1(x))
        if self.attn2 is not None and self.norm2 is not None:
            x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class TextTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (B, C, H, W), between 1x1 convolutions; residual."""

    def __init__(self, level: Level, text_width: int, groups: int) -> None:
        super().__init__()
        width = level.width
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks: ModuleListOf[TextTransformerBlock] = ModuleListOf(
            TextTransformerBlock(level, text_width) for _ in range(level.transformer_blocks)
        )
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, text)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]).contiguous())


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2; odd sides are rounded up."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.conv = conv3x3(level, level.width, level.width, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to a size (H, W), and a 3x3 convolution."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.conv = conv3x3(level, level.width, level.width)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))


class LevelBlocks(nn.Module):
    """Residual blocks, each followed by a transformer where the level has them: base class of a level's parts.

    With `gradient_checkpointing = True` each block's activations are computed again in the backward pass, in place of
    being stored.

    Args:
        level: its row of the table.
        channels: of the input of each residual block.
        time_width, text_width, groups: of the network.
    """

    gradient_checkpointing = False

    def __init__(self, level: Level, channels: Sequence[int], time_width: int, text_width: int, groups: int) -> None:
        super().__init__()
        self.resnets: ModuleListOf[TextResBlock] = ModuleListOf(
            TextResBlock(level, c, time_width, groups) for c in channels
        )
        count = self.count_transformers(level, len(channels)) if level.transformer_blocks else 0
        self.attentions: ModuleListOf[TextTransformer] = ModuleListOf(
            TextTransformer(level, text_width, groups) for _ in range(count)
        )

    def count_transformers(self, level: Level, blocks: int) -> int:
        """The number of transformers, of a level that has them."""
        return blocks

    def block(self, k: int, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """Residual block k and the transformer after it."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._block, k, x, time, text, use_reentrant=False)
        return self._block(k, x, time, text)

    def _block(self, k: int, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """`block` without checkpointing."""
        x, place = self.resnets[k](x, time), self.transformer_after(k)
        return x if place is None else self.attentions[place](x, text)

    def transformer_after(self, k: int) -> int | None:
        """The index of the transformer after residual block k, None where there is none."""
        return k if k < len(self.attentions) else None


class DownLevel(LevelBlocks):
    """A level of the encoder: its input, time and text -> the skips that the decoder reads, the last one its output.

    Args:
        level, channels, time_width, text_width, groups: see `LevelBlocks`.
        last: there is no coarser level.
    """

    def __init__(self, level: Level, channels: int, time_width: int, text_width: int, groups: int, last: bool) -> None:
        super().__init__(level, [channels] + [level.width] * (level.down_blocks - 1), time_width, text_width, groups)
        self.downsamplers: ModuleListOf[nn.Module] = ModuleListOf([] if last else [Downsample(level)])
        self.read = level.up_blocks

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> list[Tensor]:
        features = [x]
        for k in range(len(self.resnets)):
            features.append(self.block(k, features[-1], time, text))
        return features[-self.read :]


class MiddleLevel(LevelBlocks):
    """The middle: residual blocks, one transformer, residual blocks."""

    def __init__(self, level: Level, channels: int, time_width: int, text_width: int, groups: int) -> None:
        count = level.down_blocks + level.up_blocks
        super().__init__(level, [channels] + [level.width] * (count - 1), time_width, text_width, groups)
        self.before = level.down_blocks

    def count_transformers(self, level: Level, blocks: int) -> int:
        return 1

    def transformer_after(self, k: int) -> int | None:
        return 0 if k == self.before - 1 and len(self.attentions) else None

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for k in range(len(self.resnets)):
            x = self.block(k, x, time, text)
        return x


class UpLevel(LevelBlocks):
    """A level of the decoder: its input and its skips, of which each residual block reads one, the last first.

    Args:
        level, time_width, text_width, groups: see `LevelBlocks`.
        channels: of its input.
        skips: channels of its skips.
        last: there is no finer level.
    """

    def __init__(
        self,
        level: Level,
        channels: int,
        skips: Sequence[int],
        time_width: int,
        text_width: int,
        groups: int,
        last: bool,
    ) -> None:
        inputs = [channels] + [level.width] * (level.up_blocks - 1)
        both = [c + skip for c, skip in zip(inputs, reversed(skips))]
        super().__init__(level, both, time_width, text_width, groups)
        self.upsamplers: ModuleListOf[Upsample] = ModuleListOf([] if last else [Upsample(level)])

    def forward(self, x: Tensor, skips: Sequence[Tensor], time: Tensor, text: Tensor) -> Tensor:
        for k, skip in enumerate(reversed(skips)):
            x = self.block(k, torch.cat([x, skip], dim=1), time, text)
        return x
