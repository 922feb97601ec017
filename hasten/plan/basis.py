"""Coordinates in which the data are uncorrelated, for samplers with coefficients for each direction."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput, check_choice
from ..utils.dct import dct_matrix

__all__ = ["Basis", "Coordinates", "dct_matrix"]

KINDS = ("identity", "dct", "matrix")


@dataclass(frozen=True, eq=False)
class Basis:
    """An orthogonal change of coordinates U of one sample, and the data's mean and variances in it:

        u = U^T (x - alpha m),     x = alpha m + U u,     Var[u_j] = v_j for the data themselves (alpha = 1)

    Coefficients may differ between directions only where the variances do: directions of equal v_j form one group, of G
    in total, and the coefficients of a sampler in this basis are tensors (G,), in the order of `values`.

    The states and queries of a sampler are pixels as always; between `u = basis.to(x, alpha)` and
    `basis.back(u, alpha)` it adds, and multiplies by numbers and by tensors (G,). While such a sampler is traced to a
    `Plan`, `to` and `back` return the symbols unchanged: the plan's tables are in these coordinates. Bases with equal
    numbers are equal.

    Args:
        mean: m, of the shape S of a sample, float64; 0-d for kind "identity" where samples may be of any shape.
        variance: v > 0, broadcastable to S, one for each coordinate of u. Any unit, that of x squared.
        kind: "identity": the pixels. "dct": orthonormal two-dimensional cosine transform (DCT-II) of the last two axes,
            variance[..., i, j] of i half waves down and j across. "matrix": u = matrix^T flatten(x - alpha m).
        matrix: (D, D) orthogonal, the directions in its columns; for kind "matrix" only.

    Raises:
        BadInput: for an unknown kind, shapes that do not fit, variances that are not positive, and a matrix that is not
            orthogonal.
    """

    mean: Tensor
    variance: Tensor
    kind: str = "identity"
    matrix: Tensor | None = None

    def __post_init__(self) -> None:
        check_choice("kind of basis", self.kind, KINDS)
        for name in ("mean", "variance", "matrix"):
            value = getattr(self, name)
            if value is None:
                continue
            with torch.inference_mode(False):  # a basis may be used under autograd later
                value = torch.as_tensor(value)
                value = value.clone() if value.is_inference() else value
                value = value.detach().to("cpu").to(torch.float64)
            if not bool(torch.isfinite(value).all()):
                raise BadInput(f"basis: {name} holds a number that is not finite")
            object.__setattr__(self, name, value)
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
        """G, the number of different variances."""
        return len(self.values)

    @cached_property
    def values(self) -> Tensor:
        """(G,) float64, the variances, each once, ascending."""
        with torch.inference_mode(False):
            values: Tensor = torch.unique(self.variance)
            return values

    @cached_property
    def index(self) -> Tensor:
        """The group of each coordinate of u: int64 below G, of shape S (0-d where G is 1)."""
        if self.groups == 1:
            with torch.inference_mode(False):
                return torch.zeros((), dtype=torch.long)
        with torch.inference_mode(False):
            return torch.searchsorted(self.values, self.variance.contiguous()).expand(self.mean.shape).contiguous()

    def to(self, x: Any, alpha: Tensor | float = 1.0) -> Any:
        """u = U^T (x - alpha m) of pixels x (B, *S), as `Coordinates`. alpha = 0 for what has no mean: noise."""
        return Coordinates(self.coordinates(x, alpha), self) if isinstance(x, Tensor) else x

    def back(self, u: Any, alpha: Tensor | float = 1.0) -> Any:
        """x = alpha m + U u, pixels (B, *S), of `Coordinates`; other values are returned unchanged."""
        return self.pixels(u.value, alpha) if isinstance(u, Coordinates) else u

    def coordinates(self, x: Tensor, alpha: Tensor | float = 1.0) -> Tensor:
        """u = U^T (x - alpha m) as a tensor (B, *S), in the dtype of x.

        Raises:
            BadInput: for samples of another shape than the basis.
        """
        self._check_shape(x)
        if self._centred:
            x = x - self._shift(alpha, x)
        return self._transform(x, back=False)

    def pixels(self, u: Tensor, alpha: Tensor | float = 1.0) -> Tensor:
        """x = alpha m + U u (B, *S), in the dtype of u."""
        x = self._transform(u, back=True)
        return x + self._shift(alpha, x) if self._centred else x

    def spread(self, number: Tensor, like: Tensor) -> Tensor:
        """Numbers (G,), one for each group, as a tensor that multiplies coordinates (B, *S) such as `like`."""
        number = number.to(like.dtype).to(like.device)  # its gradient comes back in this order: MPS has no float64
        return number.reshape(()) if self.groups == 1 else number[self._cached("index", like)]

    def grouped(self, maximum: int) -> Basis:
        """The basis with at most `maximum` different variances: where there are more, those in each of as many equal
        intervals of log v are replaced by their geometric mean."""
        if self.groups <= maximum:
            return self
        low, high = self.values[0].log(), self.values[-1].log()
        group = ((self.variance.log() - low) / (high - low) * maximum).long().clamp(max=maximum - 1).flatten()
        logs = self.variance.log().flatten()
        sums = torch.zeros(maximum, dtype=torch.float64).index_add(0, group, logs)
        counts = torch.zeros(maximum, dtype=torch.float64).index_add(0, group, torch.ones_like(logs))
        variance = (sums / counts.clamp(min=1)).exp()[group].reshape(self.variance.shape)
        return Basis(self.mean, variance, self.kind, self.matrix)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with all bits of every number; `from_dict` is the inverse."""
        values = {"kind": self.kind, "mean": self.mean.tolist(), "variance": self.variance.tolist()}
        return values if self.matrix is None else {**values, "matrix": self.matrix.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Basis:
        """The basis that `to_dict` wrote.

        Raises:
            BadInput: for other values, with the first error in them.
        """
        try:
            arrays = {
                name: torch.tensor(values[name], dtype=torch.float64)
                for name in ("mean", "variance", "matrix")
                if name != "matrix" or name in values
            }
            kind = str(values["kind"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"basis: cannot be read: {error}") from error
        return cls(**arrays, kind=kind)

    @cached_property
    def _key(self) -> str:
        """A hash of all numbers."""
        digest = hashlib.sha256(self.kind.encode())
        for array in (self.mean, self.variance, self.matrix):
            digest.update(b"-" if array is None else str(tuple(array.shape)).encode() + array.numpy().tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Basis) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        low, high = float(self.values[0]), float(self.values[-1])
        return f"Basis({self.kind}, {tuple(self.mean.shape)}, variance {low:.3g} .. {high:.3g})"

    @cached_property
    def _centred(self) -> bool:
        """Whether the mean is not zero."""
        return bool((self.mean != 0).any())

    @cached_property
    def _matrices(self) -> dict[Any, tuple[Tensor, ...]]:
        """Copies of the matrices, the mean and the index, by device and dtype."""
        return {}

    def _check_shape(self, x: Tensor) -> None:
        """Raise BadInput for samples of another shape."""
        S = tuple(self.mean.shape)
        if S and tuple(x.shape[1:]) != S:
            raise BadInput(f"samples of shape {tuple(x.shape[1:])} in a basis that was made for {S}")

    def _shift(self, alpha: Tensor | float, like: Tensor) -> Tensor:
        """alpha m, for pixels such as `like`."""
        if like.device.type == "cpu":
            return (self.mean * alpha).to(like.dtype)
        return self._cached("mean", like) * alpha  # a number on the CPU, which is not copied

    def _cached(self, name: str, like: Tensor) -> Tensor:
        """The mean, in the dtype of `like`, or the index, on its device; cached."""
        key = (name, like.device, like.dtype)
        if key not in self._matrices:
            with torch.inference_mode(False):
                value = getattr(self, name)
                value = value.to(like.dtype) if name == "mean" else value  # before it moves: not all have float64
                self._matrices[key] = (value.to(like.device),)
        return self._matrices[key][0]

    def _transform(self, x: Tensor, back: bool) -> Tensor:
        """U^T x, or U x where `back`."""
        if self.kind == "identity":
            return x
        key = (x.device, x.dtype)
        if key not in self._matrices:
            with torch.inference_mode(False):  # cached values may be used under autograd later
                exact = [self.matrix] if self.matrix is not None else [dct_matrix(n).T for n in self.mean.shape[-2:]]
                self._matrices[key] = tuple(matrix.to(x.dtype).to(x.device) for matrix in exact)
        matrices = self._matrices[key]
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 coordinates are too coarse for images
            if self.kind == "matrix":
                return (x.flatten(1) @ (matrices[0].T if back else matrices[0])).reshape(x.shape)
            rows, columns = matrices
            return rows @ x @ columns.T if back else rows.T @ x @ columns


class Coordinates:
    """A batch (B, *S) in the coordinates of a basis. Supports addition, and multiplication and division by numbers and
    tensors (G,).

    Args:
        value: the coordinates (B, *S).
        basis: they are in.
    """

    __slots__ = ("basis", "value")

    def __init__(self, value: Tensor, basis: Basis) -> None:
        self.value, self.basis = value, basis

    def _with(self, other: Any, operation: Callable[[Tensor, Any], Tensor]) -> Coordinates:
        """The operation on the values of both."""
        if isinstance(other, Coordinates):
            other = other.value
        elif not (isinstance(other, (int, float)) and other == 0):  # sum() starts from it
            raise BadInput(f"coordinates add to coordinates only, not to a {type(other).__name__}")
        return Coordinates(operation(self.value, other), self.basis)

    def __add__(self, other: Any) -> Coordinates:
        return self._with(other, torch.add)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Coordinates:
        return self._with(other, torch.sub)

    def __rsub__(self, other: Any) -> Coordinates:
        return (-self)._with(other, torch.add)

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
        return self.__mul__(1 / number)


def _broadcast(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
    """The broadcast shape, or None where there is none."""
    try:
        return tuple(torch.broadcast_shapes(one, other))
    except RuntimeError:
        return None
