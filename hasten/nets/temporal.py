"""A U-Net that predicts several states of a trajectory at once, with convolutions along time in Fourier space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import ModuleListOf
from .unet import UNet, UNetStage


class TemporalConv(nn.Module):
    """`u + LeakyReLU(K u)`, `K u = irfft_T(R rfft_T(u))` along the states of a trajectory, shape `(B T, C, H, W)`.

    Row b T + m is state m of sample b. R is one complex C x C matrix for each of the lowest `modes` frequencies, the
    others are dropped; K is the circular convolution along T with the kernel irfft(R), the same at every pixel. R is
    initialised to U[0, 1) / C^2, almost zero.

    Args:
        channels: C.
        states: T.
        modes: at most T // 2 + 1, all frequencies.

    References:
        Zheng et al. 2023, arXiv:2211.13449.
    """

    def __init__(self, channels: int, states: int, modes: int) -> None:
        super().__init__()
        self.states, self.modes = states, min(modes, states // 2 + 1)
        # real and imaginary part: safetensors and some optimisers do not support complex numbers
        self.weight = nn.Parameter(torch.rand(2, self.modes, channels, channels) / channels**2)

    def forward(self, x: Tensor) -> Tensor:
        """`u + LeakyReLU(K u)`, `(B T, C, H, W)`."""
        return x + F.leaky_relu(self.convolve(x))

    def convolve(self, x: Tensor) -> Tensor:
        """K x, `(B T, C, H, W)`, computed in at least float32: half precision has no FFT."""
        with torch.autocast(x.device.type, enabled=False):
            u = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (-1, self.states))
            weight = torch.complex(*self.weight.to(u.dtype).unbind())
            low = torch.fft.rfft(u, dim=1)[:, : self.modes]
            mixed = torch.einsum("kio,bkihw->bkohw", weight, low)
            full = F.pad(mixed, (0, 0) * 3 + (0, self.states // 2 + 1 - self.modes))
            return torch.fft.irfft(full, n=self.states, dim=1).flatten(0, 1).to(x.dtype)


class TemporalStage(nn.Module):
    """A stage of a U-Net followed by a temporal convolution; parameter names of the stage do not change."""

    def __init__(self, stage: UNetStage, channels: int, states: int, modes: int) -> None:
        super().__init__()
        self.block, self.attention = stage.block, stage.attention
        self.temporal = TemporalConv(channels, states, modes)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`(B T, C, H, W), (B T, E) -> (B T, C', H, W)`."""
        x = self.block(x, embedding)
        return self.temporal(x if self.attention is None else self.attention(x))


class RepeatedConv(nn.Conv2d):
    """A convolution of the input shared by all states, computed once: `(B, C, H, W) -> (B T, C', H, W)`."""

    states = 1

    def forward(self, x: Tensor) -> Tensor:
        """The convolution, repeated for each state."""
        return super().forward(x).repeat_interleave(self.states, 0)


class TemporalUNet(UNet):
    """A U-Net from the initial noise of a trajectory to T states of it: `(B, C, H, W), (B,), (B,) -> (B, C, H, W)`.

    Every stage processes each state on its own, with the embedding of its time, and a `TemporalConv` after it mixes
    them. `forward` returns the last state, the clean end, so that a denoiser with x0 prediction around it samples in
    one step; `path` returns all. It costs as many times a `UNet` as there are states. The parameters of `UNet` have the
    same names.

    Args:
        states: the times of the states, in the order of the trajectory, the last one that of the clean end.
        start: the time of the input.
        modes: of the temporal convolutions.
        net: arguments of `UNet`.

    Raises:
        ValueError: without states or modes; in `embed`, for times other than `start`.
    """

    clocks: Tensor

    def __init__(self, states: Sequence[float], start: float = 1.0, modes: int = 2, **net: Any) -> None:
        super().__init__(**net)
        if not states or modes < 1:
            raise ValueError(f"a path needs at least one state and one mode, got {list(states)} and {modes}")
        self.config |= {"states": [float(s) for s in states], "start": float(start), "modes": modes}
        self.start, T = float(start), len(states)
        self.register_buffer("clocks", torch.tensor(self.config["states"], dtype=torch.float32), persistent=False)
        widths = self.config["widths"]
        first = RepeatedConv(self.conv_in.in_channels, self.conv_in.out_channels, 3, padding=1)
        first.load_state_dict(self.conv_in.state_dict())
        first.states, self.conv_in = T, first
        rows: list[tuple[ModuleListOf[nn.Module], int]] = [*zip(self.down, widths), (self.middle, widths[-1])]
        rows += zip(self.up, reversed(widths))
        for row, width in rows:
            for k, stage in enumerate(row):
                assert isinstance(stage, UNetStage)
                row[k] = TemporalStage(stage, width, T, modes)

    def embed(self, time: Tensor, *args: Any, **cond: Any) -> Tensor:
        """The embeddings of all states, `(B T, E)`, for samples at time `start`; arguments as of `UNet.embed`."""
        if not torch.allclose(time.detach().float(), torch.full_like(time, self.start).float(), rtol=1e-4, atol=1e-6):
            raise ValueError(f"this network is evaluated at time {self.start:g} only, in one step, got {time[0]:g}")
        T = len(self.clocks)
        args = tuple(v.repeat_interleave(T, 0) if isinstance(v, Tensor) else v for v in args)
        cond = {k: v.repeat_interleave(T, 0) if isinstance(v, Tensor) else v for k, v in cond.items()}
        return super().embed(self.clocks.to(time.dtype).repeat(len(time)), *args, **cond)

    def decode(self, skips: Sequence[Tensor], middle: Tensor, emb: Tensor) -> Tensor:
        """The last state, `(B, C, H, W)`, from what `encode` returned for all states."""
        return self._decode_all(skips, middle, emb)[:, -1]

    def path(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """All states, `(B, T, C, H, W)`; arguments as of `forward`."""
        emb = self.embed(time, **cond)
        return self._decode_all(*self.encode(x, emb), emb)

    def _decode_all(self, skips: Sequence[Tensor], middle: Tensor, emb: Tensor) -> Tensor:
        """All states from what `encode` returned."""
        return super().decode(skips, middle, emb).unflatten(0, (-1, len(self.clocks)))
