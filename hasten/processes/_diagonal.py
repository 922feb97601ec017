"""Processes that multiply every coordinate of an image by a number of its own, in a fixed orthonormal basis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import BadInput, check_int
from ..utils.dct import dct2, idct2
from ..utils.devices import as_float64
from ._base import Process

__all__ = ["Diagonal", "blur_std"]


@dataclass(frozen=True)
class Diagonal(Process):
    """A process with a linear corruption `C_t = U diag(c_t) U^T`, C_0 = I.

    Coordinates of one `key` have one factor, so that a sampler needs only as many coefficients as there are different
    keys. Keys are positive, and the kinds are those of `plan.basis.Basis`: "dct", where the key of the cosine i half
    waves down and j across is `1 + i^2 W^2 + j^2 H^2`, and "identity", the pixels.

    Args:
        shape: of one sample, (..., H, W).

    Raises:
        BadInput: for a shape of fewer than two axes.
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.shape, (tuple, list)) or len(self.shape) < 2:
            raise BadInput(f"{type(self).__name__} corrupts images: shape must be (..., H, W), found {self.shape!r}")
        sizes = tuple(check_int(f"{type(self).__name__}: a side of shape", n, 1) for n in self.shape)
        object.__setattr__(self, "shape", sizes)

    @property
    def kind(self) -> str:
        """The basis U: "dct" or "identity"."""
        return "dct"

    @cached_property
    def keys(self) -> Tensor:
        """(H, W) float64, > 0: which coordinates share a factor."""
        H, W = self.shape[-2:]
        with torch.inference_mode(False):  # cached values may be used under autograd later
            i, j = torch.arange(H, dtype=torch.float64)[:, None], torch.arange(W, dtype=torch.float64)
            return 1 + (i * W) ** 2 + (j * H) ** 2  # whole numbers: equal frequencies have exactly equal keys

    def factor(self, t: Tensor, keys: Tensor) -> Tensor:
        """c_t of these keys, float64, of the broadcast shape of `t` and `keys`; 1 at t = 0."""
        raise NotImplementedError

    def apply(self, x: Tensor, t: Tensor) -> Tensor:
        """`C_t x` of samples (B, *S) at times (B,) or (), in the dtype of `x`.

        Raises:
            BadInput: for samples of another shape.
        """
        return self.back(self.at(t, x) * self.to(x))

    def at(self, t: Tensor, like: Tensor) -> Tensor:
        """c_t (B, 1.., H, W), or (H, W) for one time: what multiplies the coordinates of samples such as `like`."""
        t = as_float64(torch.as_tensor(t))
        t = t.reshape(-1, *[1] * (like.ndim - 1)) if t.ndim else t
        c = self.factor(t, self.keys.to(t.device))
        return c.to(like.dtype).to(like.device)

    def to(self, x: Tensor) -> Tensor:
        """U^T x, the coordinates (B, *S) of samples."""
        if tuple(x.shape[1:]) != self.shape:
            raise BadInput(f"{type(self).__name__} was made for samples of {self.shape}, found {tuple(x.shape[1:])}")
        return dct2(x) if self.kind == "dct" else x

    def back(self, u: Tensor) -> Tensor:
        """U u, the samples (B, *S) of coordinates."""
        return idct2(u) if self.kind == "dct" else u

    def dissipation(self, std: Tensor, keys: Tensor) -> Tensor:
        """`exp(-Lambda std^2 / 2)`, what a Gaussian blur of `std` pixels leaves of a cosine, with
        `Lambda = (pi i / H)^2 + (pi j / W)^2` of its key: the heat equation at time std^2 / 2, with reflecting borders.
        """
        H, W = self.shape[-2:]
        return torch.exp(-0.5 * (math.pi / (H * W)) ** 2 * (keys - 1) * std**2)


def blur_std(t: Tensor, maximum: float) -> Tensor:
    """`maximum sin(pi t / 2)^2`, the blur in pixels at time t."""
    return maximum * torch.sin(0.5 * math.pi * t) ** 2
