"""Coordinates in which the data are uncorrelated: what samplers that treat each direction in its own way work in."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput, nearest

__all__ = ["Basis", "Coordinates", "dct_matrix"]

KINDS = ("identity", "dct", "matrix")


@dataclass(frozen=True, eq=False)
class Basis:
    """An orthogonal change of coordinates U of one sample, and the data's mean and variances in it:

        u = U^T (x - alpha m),     x = alpha m + U u,     Var[u_j] = v_j for the data themselves (alpha = 1)

    Numbers may differ from direction to direction only where the variances do: directions of equal v_j form one group,
    of G in all, and the coefficients of a sampler in this basis are tensors (G,), in the order of `values`.

    A sampler takes and queries pixels as ever; between `u = basis.to(x, alpha)` and `basis.back(u, alpha)` it adds,
    and multiplies by numbers and by tensors (G,). While such a sampler is traced to a `Plan`, `to` and `back` leave the
    symbols as they are: the plan's tables are in these coordinates. Two bases of the same numbers are equal.

    Args:
        mean: m, of the shape S of a sample, float64; 0-d for kind "identity" where samples may be of any shape.
        variance: v > 0, broadcastable to S, one for each coordinate of u. Any unit, that of x squared.
        kind: "identity": the pixels. "dct": orthonormal two-dimensional cosine transform (DCT-II) of the last two axes,
            variance[..., i, j] of i half waves down and j across. "matrix": u = matrix^T flatten(x - alpha m).
        matrix: (D, D) orthogonal, the directions in its columns; for kind "matrix" only.

    Raises BadInput for an unknown kind, shapes that do not fit, variances that are not positive, a skew matrix.
    """

    mean: Tensor
    variance: Tensor
    kind: str = "identity"
    matrix: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadInput(f"basis of kind {self.kind!r}: {nearest(self.kind, KINDS)}")
        for name in ("mean", "variance", "matrix"):
            found = getattr(self, name)
            if found is None:
                continue
            with torch.inference_mode(False):  # a basis may be used under autograd later
                found = torch.as_tensor(found)
                found = found.clone() if found.is_inference() else found
                found = found.detach().to("cpu").to(torch.float64)
            if not bool(torch.isfinite(found).all()):
                raise BadInput(f"basis: {name} holds a number that is not finite")
            object.__setattr__(self, name, found)
        S = tuple(self.mean.shape)
        if self.variance.numel() != 1 and _broadcast(tuple(self.variance.shape), S) != S:
            raise BadInput(f"basis: variance {tuple(self.variance.shape)} does not fit samples of shape {S}")
        if not bool((self.variance > 0).all()):
            raise BadInput(f"basis: every variance must be positive, found {float(self.variance.min()):.6g}")
        if self.kind == "dct" and self.mean.ndim < 2:
            raise BadInput(f"basis: kind 'dct' needs samples of at least two axes, found shape {S}")
        if (self.kind == "matrix") != (self.matrix is not None):
            raise BadInput("basis: kind 'matrix' and a matrix go together")
        if self.matrix is not None:
            D = self.mean.numel()
            if self.matrix.shape != (D, D):
                raise BadInput(
                    f"basis: samples of {D} numbers need a matrix {D} x {D}, found {tuple(self.matrix.shape)}"
                )
            skew = (self.matrix.T @ self.matrix - torch.eye(D, dtype=torch.float64)).abs().max()
            if skew > 1e-9:
                raise BadInput(f"basis: the matrix must be orthogonal, its columns are off by {float(skew):.2g}")

    @property
    def groups(self) -> int:
        """G, how many different variances there are."""
        return len(self.values)

    @cached_property
    def values(self) -> Tensor:
        """(G,) float64, the variances, each once, ascending."""
        with torch.inference_mode(False):
            return torch.unique(self.variance)

    @cached_property
    def index(self) -> Tensor:
        """The group of each coordinate of u: whole numbers below G, of shape S (0-d where G is 1)."""
        if self.groups == 1:
            with torch.inference_mode(False):
                return torch.zeros((), dtype=torch.long)
        with torch.inference_mode(False):
            return torch.searchsorted(self.values, self.variance.contiguous()).expand(self.mean.shape).contiguous()

    def to(self, x: Any, alpha: Tensor | float = 1.0) -> Any:
        """u = U^T (x - alpha m) of pixels x (B, *S), as `Coordinates`. alpha = 0 for what has no mean: noise."""
        return Coordinates(self.coordinates(x, alpha), self) if isinstance(x, Tensor) else x

    def back(self, u: Any, alpha: Tensor | float = 1.0) -> Any:
        """x = alpha m + U u, pixels (B, *S), of what `to` gave."""
        return self.pixels(u.value, alpha) if isinstance(u, Coordinates) else u

    def coordinates(self, x: Tensor, alpha: Tensor | float = 1.0) -> Tensor:
        """u = U^T (x - alpha m) as a tensor (B, *S), in the dtype of x."""
        self._fits(x)
        if self._centred:
            x = x - self._shift(alpha, x)
        return self._turn(x, back=False)

    def pixels(self, u: Tensor, alpha: Tensor | float = 1.0) -> Tensor:
        """x = alpha m + U u (B, *S), in the dtype of u."""
        x = self._turn(u, back=True)
        return x + self._shift(alpha, x) if self._centred else x

    def spread(self, number: Tensor, like: Tensor) -> Tensor:
        """Numbers (G,), one for each group, as a tensor that multiplies coordinates (B, *S) such as `like`."""
        number = number.to(like.device, like.dtype)
        return number.reshape(()) if self.groups == 1 else number[self._kept("index", like)]

    def grouped(self, most: int) -> Basis:
        """The basis with at most `most` different variances: where there are more, equal parts of the range of log v
        share the geometric mean of theirs."""
        if self.groups <= most:
            return self
        low, high = self.values[0].log(), self.values[-1].log()
        part = ((self.variance.log() - low) / (high - low) * most).long().clamp(max=most - 1).flatten()
        full = self.variance.log().flatten()
        sums = torch.zeros(most, dtype=torch.float64).index_add(0, part, full)
        counts = torch.zeros(most, dtype=torch.float64).index_add(0, part, torch.ones_like(full))
        variance = (sums / counts.clamp(min=1)).exp()[part].reshape(self.variance.shape)
        return Basis(self.mean, variance, self.kind, self.matrix)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, every number to its last bit; `from_dict` is the inverse."""
        told = {"kind": self.kind, "mean": self.mean.tolist(), "variance": self.variance.tolist()}
        return told if self.matrix is None else {**told, "matrix": self.matrix.tolist()}

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> Basis:
        """The basis that `to_dict` wrote. Raises BadInput that says what is wrong with it."""
        try:
            arrays = {
                name: torch.tensor(told[name], dtype=torch.float64)
                for name in ("mean", "variance", "matrix")
                if name != "matrix" or name in told
            }
            kind = str(told["kind"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"basis: cannot be read: {error}") from error
        return cls(**arrays, kind=kind)

    @cached_property
    def _key(self) -> str:
        told = hashlib.sha256(self.kind.encode())
        for part in (self.mean, self.variance, self.matrix):
            told.update(b"-" if part is None else str(tuple(part.shape)).encode() + part.numpy().tobytes())
        return told.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Basis) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        low, high = float(self.values[0]), float(self.values[-1])
        return f"Basis({self.kind}, {tuple(self.mean.shape)}, variance {low:.3g} .. {high:.3g})"

    @cached_property
    def _centred(self) -> bool:
        return bool((self.mean != 0).any())

    @cached_property
    def _matrices(self) -> dict[Any, tuple[Tensor, ...]]:
        return {}

    def _fits(self, x: Tensor) -> None:
        S = tuple(self.mean.shape)
        if S and tuple(x.shape[1:]) != S:
            raise BadInput(f"samples of shape {tuple(x.shape[1:])} in a basis that was made for {S}")

    def _shift(self, alpha: Tensor | float, like: Tensor) -> Tensor:
        """alpha m, for pixels such as `like`."""
        if like.device.type == "cpu":
            return (self.mean * alpha).to(like.dtype)
        return self._kept("mean", like) * alpha  # a number on the CPU, which is not copied

    def _kept(self, name: str, like: Tensor) -> Tensor:
        """The mean, in the dtype of `like`, or the index, on its device; each copied there once."""
        key = (name, like.device, like.dtype)
        if key not in self._matrices:
            with torch.inference_mode(False):
                value = getattr(self, name)
                value = value.to(like.dtype) if name == "mean" else value  # before it moves: not all have float64
                self._matrices[key] = (value.to(like.device),)
        return self._matrices[key][0]

    def _turn(self, x: Tensor, back: bool) -> Tensor:
        """U^T x, or U x where `back`."""
        if self.kind == "identity":
            return x
        key = (x.device, x.dtype)
        if key not in self._matrices:
            with torch.inference_mode(False):  # what is kept may be used under autograd later
                found = [self.matrix] if self.matrix is not None else [dct_matrix(n).T for n in self.mean.shape[-2:]]
                self._matrices[key] = tuple(side.to(x.dtype).to(x.device) for side in found)
        sides = self._matrices[key]
        with torch.autocast(x.device.type, enabled=False):  # coordinates in bfloat16 would lose the image
            if self.kind == "matrix":
                return (x.flatten(1) @ (sides[0].T if back else sides[0])).reshape(x.shape)
            rows, columns = sides
            return rows @ x @ columns.T if back else rows.T @ x @ columns


class Coordinates:
    """A batch in the coordinates of a basis, (B, *S): adds to its like, times and over numbers and tensors (G,)."""

    __slots__ = ("basis", "value")

    def __init__(self, value: Tensor, basis: Basis) -> None:
        self.value, self.basis = value, basis

    def _with(self, other: Any, do: Callable[[Tensor, Any], Tensor]) -> Coordinates:
        if isinstance(other, Coordinates):
            other = other.value
        elif not (isinstance(other, (int, float)) and other == 0):  # sum() starts from it
            raise BadInput(f"coordinates add to coordinates only, not to a {type(other).__name__}")
        return Coordinates(do(self.value, other), self.basis)

    def __add__(self, other: Any) -> Coordinates:
        return self._with(other, torch.add)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Coordinates:
        return self._with(other, torch.sub)

    def __rsub__(self, other: Any) -> Coordinates:
        return -self + other

    def __neg__(self) -> Coordinates:
        return Coordinates(-self.value, self.basis)

    def __mul__(self, number: Any) -> Coordinates:
        if isinstance(number, Coordinates):
            raise BadInput("coordinates multiply by numbers only, not by coordinates")
        if isinstance(number, Tensor) and number.ndim:
            number = self.basis.spread(number, self.value)
        return Coordinates(self.value * number, self.basis)

    __rmul__ = __mul__

    def __truediv__(self, number: Any) -> Coordinates:
        return self * (1 / number)


def dct_matrix(n: int) -> Tensor:
    """The orthonormal DCT-II, (n, n) float64: `C[k, i] = sqrt((2 - [k = 0]) / n) cos(pi k (2 i + 1) / (2 n))`.

    `C @ x` are the coefficients of x, `C.T @ u` is x again.
    """
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * k * (2 * i + 1) / (2 * n)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def _broadcast(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return tuple(torch.broadcast_shapes(one, other))
    except RuntimeError:
        return None
