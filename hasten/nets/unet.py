"""A configurable U-Net with a split point between its encoder and its decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import Attention, GuidanceFeatures, ModuleListOf, ResBlock, TimeFeatures, group_norm, zero


class UNetStage(nn.Module):
    """A residual block, optionally followed by self-attention."""

    def __init__(self, channels: int, out_channels: int, embedding: int, attention: bool, dropout: float) -> None:
        super().__init__()
        self.block = ResBlock(channels, out_channels, embedding, dropout)
        self.attention = Attention(out_channels) if attention else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.block(x, embedding)
        return x if self.attention is None else self.attention(x)


class Up(nn.Module):
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """Time- and class-conditional U-Net, `(B, C, H, W), (B,), (B,) -> (B, C_out, H, W)`.

    The forward pass is `embed`, then `encode`, then `decode`; an accelerator may cache what `encode` returned and call
    `decode` with the embedding of a later time (Faster Diffusion, Li et al. 2023, arXiv:2312.09608).

    Args:
        channels: image channels C of the input.
        out_channels: image channels of the output. Default: `channels`.
        widths: channels at each resolution, finest first; each further level halves the resolution.
        blocks: residual blocks per level in the encoder; the decoder has one more.
        attention: levels (0 = finest) whose blocks are followed by self-attention; the middle block always is.
        classes: number of classes, 0 for none. Label `classes` is the null class; `label=None` is the null class too.
        patch: side of the space-to-depth patches of the input; H and W must be multiples of `patch * 2**(levels-1)`.
        embedding: width E of the time and class embedding. Default: `4 * widths[0]`.
        dropout: probability in [0, 1], in the residual blocks.
        time_scale: factor of the time before the sinusoids (1000 for a time in [0, 1]).
        guidance: the range (low, high) of guidance scales if the scale is an input of the network, None if it is not.
            The layer that reads it is initialised to zero (Meng et al. 2023, arXiv:2210.03142).
        steps: the numbers of sampling steps if that number is an input of the network, None if it is not: one student
            for several numbers of steps (Frans et al. 2025, arXiv:2410.12557, condition on the step size). Its
            embedding is initialised to zero too.

    Raises:
        ValueError: for widths, levels, ranges or step counts that are not valid.
    """

    _counts: Tensor | None

    def __init__(
        self,
        channels: int = 3,
        out_channels: int | None = None,
        widths: Sequence[int] = (64, 128),
        blocks: int = 1,
        attention: Sequence[int] = (),
        classes: int = 0,
        patch: int = 1,
        embedding: int | None = None,
        dropout: float = 0.0,
        time_scale: float = 1000.0,
        guidance: Sequence[float] | None = None,
        steps: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        widths, attention = tuple(widths), tuple(attention)
        if not widths or blocks < 1:
            raise ValueError(f"a U-Net needs at least one width and one block a level, got {widths} and {blocks}")
        if any(not 0 <= level < len(widths) for level in attention):
            raise ValueError(f"attention levels {attention} are not all among 0..{len(widths) - 1}")
        out_channels = channels if out_channels is None else out_channels
        embedding = 4 * widths[0] if embedding is None else embedding
        self.config: dict[str, Any] = {
            "channels": channels,
            "out_channels": out_channels,
            "widths": list(widths),
            "blocks": blocks,
            "attention": list(attention),
            "classes": classes,
            "patch": patch,
            "embedding": embedding,
            "dropout": dropout,
            "time_scale": time_scale,
        }
        if guidance is not None:
            low, high = guidance
            if not low < high:
                raise ValueError(f"guidance needs (low, high) with low < high, got {tuple(guidance)}")
            self.config["guidance"] = [float(low), float(high)]
        if steps is not None:
            if not steps or min(steps) < 1 or len(set(steps)) < len(steps):
                raise ValueError(f"steps must be distinct integers of at least 1, got {tuple(steps)}")
            self.config["steps"] = [int(count) for count in steps]
        self.patch, self.classes = patch, classes
        self.null_label = classes or None
        self.multiple = patch * 2 ** (len(widths) - 1)

        self.time = nn.Sequential(
            TimeFeatures(widths[0], time_scale),
            nn.Linear(widths[0], embedding),
            nn.SiLU(),
            nn.Linear(embedding, embedding),
        )
        self.label = nn.Embedding(classes + 1, embedding) if classes else None
        self.guidance_range = None if guidance is None else (float(guidance[0]), float(guidance[1]))
        self.guidance = None if guidance is None else GuidanceFeatures(guidance[0], guidance[1], embedding)
        self.step_counts = None if steps is None else tuple(int(count) for count in steps)
        counts = None if self.step_counts is None else torch.tensor(self.step_counts)
        self.register_buffer("_counts", counts, persistent=False)
        self.steps = None if steps is None else zero(nn.Embedding(len(steps), embedding))

        self.conv_in = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.down: ModuleListOf[ModuleListOf[nn.Module]] = ModuleListOf()
        self.downsample = nn.ModuleList()
        c, skips = widths[0], [widths[0]]
        for level, width in enumerate(widths):
            row: ModuleListOf[nn.Module] = ModuleListOf()
            for _ in range(blocks):
                row.append(UNetStage(c, width, embedding, level in attention, dropout))
                c = width
                skips.append(c)
            self.down.append(row)
            if level + 1 < len(widths):
                self.downsample.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)

        self.middle: ModuleListOf[nn.Module] = ModuleListOf(
            UNetStage(c, c, embedding, attend, dropout) for attend in (True, False)
        )

        self.up: ModuleListOf[ModuleListOf[nn.Module]] = ModuleListOf()
        self.upsample = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            row = ModuleListOf()
            for _ in range(blocks + 1):
                row.append(UNetStage(c + skips.pop(), width, embedding, level in attention, dropout))
                c = width
            self.up.append(row)
            if level:
                self.upsample.append(Up(c))
        self.norm_out = group_norm(c)
        self.conv_out = zero(nn.Conv2d(c, out_channels * patch**2, 3, padding=1))

    def embed(
        self,
        time: Tensor,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> Tensor:
        """The embedding that every block reads.

        Args:
            time: (B,), the network's own time.
            label: int64 (B,); None: the null class.
            guidance: guidance scales (B,), for a network that takes them.
            steps: numbers of steps (B,), for a network that takes them.

        Returns:
            (B, E).

        Raises:
            ValueError: for an input that the network does not take, or that is missing.
        """
        emb = self.time(time)
        if self.label is not None:
            if label is None:
                label = torch.full(time.shape, self.classes, dtype=torch.long, device=time.device)
            emb = emb + self.label(label)
        elif label is not None:
            raise ValueError("this U-Net was built with classes=0 and takes no label")
        for name, layer, value in (("guidance", self.guidance, guidance), ("steps", self.steps, steps)):
            if (layer is None) != (value is None):
                raise ValueError(f"this U-Net takes no {name}" if layer is None else f"this U-Net needs {name}=")
        if self.guidance is not None and guidance is not None:
            emb = emb + self.guidance(guidance)
        if self.steps is not None and steps is not None:
            emb = emb + self.steps(self._step_index(steps))
        return emb

    def _step_index(self, steps: Tensor) -> Tensor:
        """Index of each number of steps (B,) in `step_counts`."""
        assert self._counts is not None, "only for a U-Net that takes steps"
        same = steps[:, None] == self._counts.to(steps.device)
        if not torch.compiler.is_compiling() and not bool(same.any(1).all()):
            raise ValueError(f"this U-Net takes {self.step_counts} steps, got {sorted(set(steps.tolist()))}")
        return same.long().argmax(1)

    @torch.no_grad()
    def fixed(self, scale: float) -> UNet:
        """The same network for one guidance scale, folded into the time embedding, without that input.

        Raises:
            ValueError: for a network that takes no guidance scale.
        """
        if self.guidance is None:
            raise ValueError("this U-Net takes no guidance")
        net = UNet(**{**self.config, "guidance": None})
        net.load_state_dict({k: v for k, v in self.state_dict().items() if not k.startswith("guidance.")})
        net.to(self.conv_in.weight.device)
        last = net.time[-1]
        assert isinstance(last, nn.Linear)
        last.bias.add_(self.guidance(torch.tensor([scale], device=last.bias.device))[0])
        return net

    def encode(self, x: Tensor, emb: Tensor) -> tuple[list[Tensor], Tensor]:
        """The encoder and the middle block: `(B, C, H, W), (B, E) -> (skips, middle)`; neither is modified later."""
        skips = self._down_blocks([self._conv_in(x)], emb)
        return skips, self._middle(skips[-1], emb)

    def decode(self, skips: Sequence[Tensor], middle: Tensor, emb: Tensor) -> Tensor:
        """The decoder: what `encode` returned and an embedding -> `(B, C_out, H, W)`. Does not modify `skips`."""
        return self._conv_out(self._up_blocks(skips, middle, emb))

    def shallow_encode(self, x: Tensor, emb: Tensor, branch: int | None = None) -> list[Tensor]:
        """The first `branch + 1` skips: `(B, C, H, W), (B, E) -> first`.

        Args:
            x: images.
            emb: what `embed` returned.
            branch: how many blocks of the finest level are run, 0 to `branches`. Default: all.

        Raises:
            ValueError: for another `branch`.
        """
        branch = self.branches if branch is None else branch
        if not 0 <= branch <= self.branches:
            raise ValueError(f"branch must be an integer from 0 to {self.branches}, got {branch}")
        return self._down_blocks([self._conv_in(x)], emb, branch)

    @property
    def branches(self) -> int:
        """The largest `branch`."""
        return len(self.down[0])

    def deep(self, first: Sequence[Tensor], emb: Tensor) -> Tensor:
        """The blocks between `shallow_encode` and `shallow_decode`: the first skips -> the input of the last blocks.

        That input is what DeepCache caches (Ma et al. 2023, arXiv:2312.00858). `forward` is these three in sequence.
        """
        skips = self._down_blocks(first, emb)
        return self._up_blocks(skips, self._middle(skips[-1], emb), emb, remaining=len(first))

    def shallow_decode(self, first: Sequence[Tensor], up_input: Tensor, emb: Tensor) -> Tensor:
        """The last blocks, one for each of the first skips: -> `(B, C_out, H, W)`."""
        return self._conv_out(self._up_blocks(first, up_input, emb))

    def _conv_in(self, x: Tensor) -> Tensor:
        """The first convolution, of the space-to-depth patches."""
        if x.shape[-1] % self.multiple or x.shape[-2] % self.multiple:
            raise ValueError(f"height and width must be multiples of {self.multiple}, got {tuple(x.shape[-2:])}")
        return self.conv_in(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)

    def _down_blocks(self, first: Sequence[Tensor], emb: Tensor, until: int | None = None) -> list[Tensor]:
        """The first skips and the following ones, up to number `until`."""
        skips = list(first)
        blocks: list[tuple[nn.Module, bool]] = []  # and whether it reads the embedding
        for level, row in enumerate(self.down):
            blocks += [(stage, True) for stage in row]
            blocks += [(layer, False) for layer in self.downsample[level : level + 1]]
        for layer, conditional in blocks[len(skips) - 1 : until]:
            skips.append(layer(skips[-1], emb) if conditional else layer(skips[-1]))
        return skips

    def _middle(self, x: Tensor, emb: Tensor) -> Tensor:
        """The middle blocks."""
        for stage in self.middle:
            x = stage(x, emb)
        return x

    def _up_blocks(self, skips: Sequence[Tensor], x: Tensor, emb: Tensor, remaining: int = 0) -> Tensor:
        """`x` through the blocks that read these skips, without those of the first `remaining` ones."""
        blocks: list[tuple[nn.Module, nn.Module | None]] = []  # and the upsampling after it
        for level, row in enumerate(self.up):
            blocks += [(stage, None) for stage in row]
            if level < len(self.upsample):
                blocks[-1] = row[-1], self.upsample[level]
        for (stage, upsample), skip in zip(blocks[-len(skips) :], list(skips)[remaining:][::-1]):
            x = stage(torch.cat([x, skip], dim=1), emb)
            x = x if upsample is None else upsample(x)
        return x

    def _conv_out(self, x: Tensor) -> Tensor:
        """The last convolution, back to pixels."""
        x = self.conv_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Raw output `(B, C_out, H, W)` at noisy images `x (B, C, H, W)`; the other arguments are those of `embed`."""
        emb = self.embed(time, label, **inputs)
        return self.decode(*self.encode(x, emb), emb)
