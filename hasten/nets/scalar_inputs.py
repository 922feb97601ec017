"""Guidance scale and number of steps as additional inputs of a network that was built without them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layers import GuidanceFeatures, TimeFeatures, zero

WIDTH = 32  # channels of the adapters, for networks without a known time embedding


def with_scalars(
    net: nn.Module,
    shape: Sequence[int],
    guidance: Sequence[float] | None = None,
    steps: Sequence[int] | None = None,
) -> ScalarInputs:
    """`EmbeddedInputs` if the network has a time embedding that can be added to, else `ScalarInputs`.

    The arguments are those of `ScalarInputs`.
    """
    kind = ScalarInputs if embedding_width(net) is None else EmbeddedInputs
    return kind(net, shape, guidance, steps)


class ScalarInputs(nn.Module):
    """Any network with the guidance scale, the number of sampling steps, or both, as inputs.

    Everything that is added is initialised to zero, so that the output is at first exactly that of the wrapped network.
    Two small convolutional (or, for points, fully connected) adapters that read the scalars and the time modify its
    input and its output:

        raw = net(x + A(x; c), time) + B(x, raw'; c)         raw': the network's output, c: time, guidance, steps

    Args:
        net: called as `net(x (B, *S), time (B,), **cond) -> (B, *S)`.
        shape: S.
        guidance: the range (low, high) of guidance scales, None for no such input.
        steps: the numbers of steps that the network is trained for, None for no such input.

    Raises:
        ValueError: for an empty range of guidance scales.

    References:
        After Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans 2023, arXiv:2210.03142, whose networks have an embedding.
    """

    net: Any  # a module, which may have further methods

    def __init__(
        self,
        net: nn.Module,
        shape: Sequence[int],
        guidance: Sequence[float] | None = None,
        steps: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if guidance is not None and not guidance[0] < guidance[1]:
            raise ValueError(f"guidance needs (low, high) with low < high, got {tuple(guidance)}")
        self.net = net
        self.config: dict[str, Any] = {"shape": [int(side) for side in shape]}
        if guidance is not None:
            self.config["guidance"] = [float(guidance[0]), float(guidance[1])]
        if steps is not None:
            self.config["steps"] = [int(count) for count in steps]
        self.null_label = getattr(net, "null_label", None)
        pass_source(net, self)
        self.guidance_range = None if guidance is None else (float(guidance[0]), float(guidance[1]))
        self.step_counts = None if steps is None else tuple(int(count) for count in steps)
        self._add_layers(shape, guidance, steps)
        first = next((p for p in net.parameters() if p.is_floating_point()), None)
        for name, child in self.named_children():
            if name != "net" and first is not None:
                child.to(first.device, first.dtype)

    def _add_layers(self, shape: Sequence[int], guidance: Any, steps: Any) -> None:
        """Create the trainable layers."""
        self._add_embeddings(WIDTH, guidance, steps)
        for layer in (None if self.guidance is None else self.guidance.out, self.steps):
            if layer is not None:  # here the last layers of the adapters are zero instead
                nn.init.normal_(layer.get_parameter("weight"), std=0.1)
        self.time = nn.Sequential(TimeFeatures(WIDTH, 1.0), nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.before, self.after = Adapter(shape, 1), Adapter(shape, 2)

    def _add_embeddings(self, width: int, guidance: Any, steps: Any) -> None:
        """Create the embeddings of the scalars."""
        self.guidance = None if guidance is None else GuidanceFeatures(guidance[0], guidance[1], width)
        self.steps = None if steps is None else zero(nn.Embedding(len(steps), width))

    def forward(
        self, x: Tensor, time: Tensor, guidance: Tensor | None = None, steps: Tensor | None = None, **cond: Any
    ) -> Tensor:
        """Raw output (B, *S) with guidance scales (B,) and numbers of steps (B,)."""
        c = self._scalars(guidance, steps)
        c = c + self.time(time).to(c)
        raw = self.net(x + self.before([x], c).to(x), time, **cond)
        return raw + self.after([x, raw], c).to(raw)

    def fixed(self, scale: float) -> nn.Module:
        """A copy for one guidance scale, without that input."""
        return FixedGuidance(copy.deepcopy(self), scale)

    def _scalars(self, guidance: Tensor | None, steps: Tensor | None) -> Tensor:
        """The embedding (B, E) of the scalars; raises ValueError if one is missing."""
        total: Tensor | None = None
        if self.guidance is not None:
            if guidance is None:
                raise ValueError("this network needs guidance=, one scale per sample")
            total = self.guidance(guidance)
        if self.steps is not None:
            if steps is None:
                raise ValueError("this network needs steps=, one number of steps per sample")
            counts = torch.tensor(self.step_counts, device=steps.device)
            row = self.steps((steps[:, None] == counts).long().argmax(1))
            total = row if total is None else total + row
        assert total is not None
        return total


class EmbeddedInputs(ScalarInputs):
    """`ScalarInputs` of a network with `embed`, `encode` and `decode`: the scalars' embedding is added to the time's.

    References:
        Meng et al. 2023, arXiv:2210.03142.
    """

    def _add_layers(self, shape: Sequence[int], guidance: Any, steps: Any) -> None:
        width = embedding_width(self.net)
        if width is None:
            raise ValueError(f"{type(self.net).__name__} has no time embedding that can be added to")
        self._add_embeddings(width, guidance, steps)

    def forward(
        self, x: Tensor, time: Tensor, guidance: Tensor | None = None, steps: Tensor | None = None, **cond: Any
    ) -> Tensor:
        """Raw output (B, *S) with guidance scales (B,) and numbers of steps (B,)."""
        emb = self.embed(time, guidance=guidance, steps=steps, **cond)
        skips, middle = self.encode(x, emb)
        return self.decode(skips, middle, emb)

    def embed(self, time: Tensor, guidance: Tensor | None = None, steps: Tensor | None = None, **cond: Any) -> Any:
        """The network's embedding, with that of the scalars added to that of the time."""
        emb, added = self.net.embed(time, **cond), self._scalars(guidance, steps)
        if isinstance(emb, Tensor):
            return emb + added.to(emb)
        return type(emb)({**emb.tensors, "time": emb["time"] + added.to(emb["time"])}, emb.options)

    def encode(self, x: Tensor, emb: Any) -> Any:
        """The network's encoder."""
        return self.net.encode(x, emb)

    def decode(self, skips: Any, middle: Tensor, emb: Any) -> Tensor:
        """The network's decoder."""
        return self.net.decode(skips, middle, emb)


class FixedGuidance(nn.Module):
    """A network with a guidance scale as its input, at one fixed scale.

    Args:
        net: the network.
        scale: the guidance scale.
    """

    def __init__(self, net: nn.Module, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, float(scale)
        self.config = {"scale": self.scale}
        self.null_label = getattr(net, "null_label", None)
        pass_source(net, self)
        self.step_counts = getattr(net, "step_counts", None)

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """Raw output (B, *S)."""
        return self.net(x, time, guidance=torch.full((len(x),), self.scale, device=x.device), **cond)


def pass_source(net: nn.Module, wrapper: nn.Module) -> None:
    """Give a wrapper what its network says of the source image that it reads, and of the sizes that it takes."""
    for name in ("source_channels", "source_factor", "multiple"):
        if hasattr(net, name):
            setattr(wrapper, name, getattr(net, name))


class Adapter(nn.Module):
    """A residual correction (B, *S) from `count` inputs (B, *S) and a condition (B, WIDTH); initially zero.

    Two layers: convolutions over up to three dimensions after the channels, or linear layers for points (D,).

    Args:
        shape: S.
        count: number of inputs.
    """

    def __init__(self, shape: Sequence[int], count: int) -> None:
        super().__init__()
        dimensions = len(shape) - 1
        self.flat = dimensions not in (1, 2, 3)
        channels = math.prod(shape) if self.flat else int(shape[0])
        if self.flat:
            self.first: nn.Module = nn.Linear(count * channels, WIDTH)
            self.last: nn.Module = zero(nn.Linear(WIDTH, channels))
        else:
            conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
            self.first = conv(count * channels, WIDTH, 3, padding=1)
            self.last = zero(conv(WIDTH, channels, 3, padding=1))
        self.shift = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Sequence[Tensor], c: Tensor) -> Tensor:
        """The correction (B, *S)."""
        shape = inputs[0].shape
        if self.flat:
            inputs = [value.flatten(1) for value in inputs]
        h = self.first(torch.cat([value.to(c) for value in inputs], 1))
        h = nn.functional.silu(h + self.shift(c).reshape(*c.shape, *[1] * (h.ndim - 2)))
        return self.last(h).reshape(shape)


def embedding_width(net: nn.Module) -> int | None:
    """E if `net.embed` returns an embedding (B, E) that its encoder and decoder read, else None."""
    if not all(callable(getattr(net, name, None)) for name in ("embed", "encode", "decode")):
        return None
    own = getattr(net, "net", net)  # a diffusers network is inside its adapter
    last = getattr(getattr(own, "time_embedding", None), "linear_2", None)
    if isinstance(last, nn.Linear):
        return last.out_features
    time = getattr(own, "time", None)
    return time[-1].out_features if isinstance(time, nn.Sequential) and isinstance(time[-1], nn.Linear) else None
