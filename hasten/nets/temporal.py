"""A U-Net that gives several moments of a path at once, joined by convolutions along time in the Fourier domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .unet import UNet, UNetStage


class TemporalConv(nn.Module):
    """`u + LeakyReLU(K u)`, `K u = irfft_T(R rfft_T(u))` along the states of a path, `(B T, C, H, W)` to the same.

    Row b T + m is state m of sample b. R holds one complex C x C matrix for each of the lowest `modes` frequencies, the
    others are dropped; K is the circular convolution along T with the kernel irfft(R), the same at every pixel.

    states: T. modes: at most T // 2 + 1, which is all there are. R begins as U[0, 1) / C^2, close to no K at all.
    Zheng et al. 2023, arXiv:2211.13449.
    """

    def __init__(self, channels: int, states: int, modes: int) -> None:
        super().__init__()
        self.states, self.modes = states, min(modes, states // 2 + 1)
        # real and imaginary part: neither safetensors nor the optimisers are sure to know complex numbers
        self.weight = nn.Parameter(torch.rand(2, self.modes, channels, channels) / channels**2)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.leaky_relu(self.convolve(x))

    def convolve(self, x: Tensor) -> Tensor:
        """K x, `(B T, C, H, W)`, in float32 at least: half precision has no transform."""
        with torch.autocast(x.device.type, enabled=False):
            u = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (-1, self.states))
            weight = torch.complex(*self.weight.to(u.dtype).unbind())
            low = torch.fft.rfft(u, dim=1)[:, : self.modes]
            mixed = torch.einsum("kio,bkihw->bkohw", weight, low)
            full = F.pad(mixed, (0, 0) * 3 + (0, self.states // 2 + 1 - self.modes))
            return torch.fft.irfft(full, n=self.states, dim=1).flatten(0, 1).to(x.dtype)


class TemporalStage(nn.Module):
    """A stage of a U-Net and the temporal convolution that follows it; what the stage had keeps its names."""

    def __init__(self, stage: UNetStage, channels: int, states: int, modes: int) -> None:
        super().__init__()
        self.block, self.attention = stage.block, stage.attention
        self.temporal = TemporalConv(channels, states, modes)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.block(x, embedding)
        return self.temporal(x if self.attention is None else self.attention(x))


class RepeatedConv(nn.Conv2d):
    """A convolution of what all states of a path share, done once and repeated: `(B, C, H, W) -> (B T, C', H, W)`."""

    states = 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).repeat_interleave(self.states, 0)


class TemporalUNet(UNet):
    """A U-Net from the noise at the beginning of a path to T states of it, `(B, C, H, W), (B,), (B,)` to (B, C, H, W).

    Every stage works on each state by itself, with the embedding of its own time, and a `TemporalConv` after it joins
    them. `forward` gives the last state, which is the clean end, so that a denoiser that predicts x0 around it is
    sampled in one step; `path` gives all of them. It takes as many times the work of a `UNet` as there are states, and
    has that network's parameters under their names beside its own.

    states: the clocks of the states, in the order of the path, the last one that of the clean end.
    start: the clock at which it must be asked. modes: of the temporal convolutions. net: arguments of `UNet`.

    Raises ValueError at any other clock: it knows what follows from the beginning alone.
    """

    def __init__(self, states: Sequence[float], start: float = 1.0, modes: int = 2, **net: Any) -> None:
        super().__init__(**net)
        if not states or modes < 1:
            raise ValueError(f"a path needs a state and a mode or more, got {list(states)} and {modes}")
        self.config |= {"states": [float(s) for s in states], "start": float(start), "modes": modes}
        self.start, T = float(start), len(states)
        self.register_buffer("clocks", torch.tensor(self.config["states"], dtype=torch.float32), persistent=False)
        widths = self.config["widths"]
        first = RepeatedConv(self.conv_in.in_channels, self.conv_in.out_channels, 3, padding=1)
        first.load_state_dict(self.conv_in.state_dict())
        first.states, self.conv_in = T, first
        rows = [*zip(self.down, widths), (self.middle, widths[-1]), *zip(self.up, reversed(widths))]
        for row, width in rows:
            for k, stage in enumerate(row):  # type: ignore[arg-type, var-annotated]
                row[k] = TemporalStage(stage, width, T, modes)  # type: ignore[index]

    def embed(self, time: Tensor, *args: Any, **cond: Any) -> Tensor:
        """The embeddings of all states, `(B T, E)`, for samples at the clock `start`."""
        if not torch.allclose(time.detach().float(), torch.full_like(time, self.start).float(), rtol=1e-4, atol=1e-6):
            raise ValueError(f"this network answers at clock {self.start:g} alone, in one step, asked at {time[0]:g}")
        T = len(self.clocks)
        each = [v.repeat_interleave(T, 0) if isinstance(v, Tensor) else v for v in args]
        named = {k: v.repeat_interleave(T, 0) if isinstance(v, Tensor) else v for k, v in cond.items()}
        return super().embed(self.clocks.to(time.dtype).repeat(len(time)), *each, **named)

    def decode(self, skips: Sequence[Tensor], middle: Tensor, emb: Tensor) -> Tensor:
        """The last state, `(B, C, H, W)`, from what `encode` returned for all."""
        return self._whole(skips, middle, emb)[:, -1]

    def path(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """All the states, `(B, T, C, H, W)`."""
        emb = self.embed(time, **cond)
        return self._whole(*self.encode(x, emb), emb)

    def _whole(self, skips: Sequence[Tensor], middle: Tensor, emb: Tensor) -> Tensor:
        return super().decode(skips, middle, emb).unflatten(0, (-1, len(self.clocks)))
