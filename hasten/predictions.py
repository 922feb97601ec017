"""Prediction types: what a network's raw output means.

With `x_t = alpha x + sigma eps`, each prediction type is three numbers at every (alpha, sigma):

    net input = c_in x_t,        x0 = c_skip x_t + c_out raw

and the training target `raw` that they imply. All hold for any (alpha, sigma), variance-preserving or not.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import BadInput, check_field, plain_numbers
from .utils.devices import has_float64
from .utils.registry import family, is_own, path_of

__all__ = [
    "EDM", "V", "X0", "Anchored", "Eps", "Flow", "Prediction", "ResidualPrediction", "precise", "prediction_from",
    "spread",
]  # fmt: skip

ALIASES = {
    "epsilon": "eps", "noise": "eps", "sample": "x0", "x_start": "x0", "start_x": "x0", "v_prediction": "v",
    "flow_prediction": "flow", "rectified_flow": "flow", "vprediction": "v", "v_pred": "v", "eps_prediction": "eps",
    "x_0": "x0", "pred_x0": "x0", **{name: name for name in ("eps", "x0", "v", "flow", "edm", "anchored")},
    "residual": "residual",
}  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """One meaning of the raw output. Immutable and equal by value."""

    name: ClassVar[str] = ""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(c_in, c_skip, c_out)`, each of the shape of `alpha` and `sigma`."""
        raise NotImplementedError

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The raw output (B, *S) that is the training target for this pair of clean sample and noise.

        Args:
            x0: clean samples (B, *S).
            eps: their noise (B, *S).
            alpha, sigma: coefficients, () or (B,).
        """
        return self._target(x0, eps, spread(alpha, x0), spread(sigma, x0))

    def to_dict(self) -> dict[str, Any]:
        """`{"name": ..., field: value}`, ready for JSON; `prediction_from` is the inverse."""
        name = self.name if is_own(type(self)) else path_of(type(self))
        return {"name": name, **dataclasses.asdict(self)}

    def _target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """`target` with coefficients that broadcast to the samples."""
        raise NotImplementedError


@dataclass(frozen=True)
class Eps(Prediction):
    """The noise: `x0 = (x_t - sigma eps) / alpha`, which at alpha = 0 does not determine x0.

    References:
        Ho, Jain, Abbeel 2020, arXiv:2006.11239.
    """

    name: ClassVar[str] = "eps"

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ones_like(alpha), 1 / alpha, -sigma / alpha

    def _target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps


@dataclass(frozen=True)
class X0(Prediction):
    """The clean sample itself."""

    name: ClassVar[str] = "x0"

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ones_like(alpha), torch.zeros_like(alpha), torch.ones_like(alpha)

    def _target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0


@dataclass(frozen=True)
class V(Prediction):
    """The v-prediction `v = alpha eps - sigma x`, `x0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2)`.

    References:
        Salimans, Ho 2022, arXiv:2202.00512.
    """

    name: ClassVar[str] = "v"

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        norm = alpha**2 + sigma**2
        return torch.ones_like(alpha), alpha / norm, -sigma / norm

    def _target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * eps - sigma * x0


@dataclass(frozen=True)
class Flow(Prediction):
    """The velocity `u = eps - x` of the straight path, `x0 = (x_t - sigma u) / (alpha + sigma)`.

    References:
        Lipman et al. 2022, arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003.
    """

    name: ClassVar[str] = "flow"

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ones_like(alpha), 1 / (alpha + sigma), -sigma / (alpha + sigma)

    def _target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps - x0


@dataclass(frozen=True)
class EDM(Prediction):
    """EDM's preconditioning: input and target of unit variance at every level for data of std `sigma_data`.

    With q = sigma / alpha and y = x_t / alpha: `x0 = s^2 / (s^2 + q^2) y + q s / sqrt(s^2 + q^2) raw`, input
    `y / sqrt(s^2 + q^2)`, s = sigma_data; written here so that alpha = 0 and sigma = 0 are finite.

    Args:
        sigma_data: standard deviation of the data, > 0.

    References:
        Karras, Aittala, Aila, Laine 2022, arXiv:2206.00364, table 1.
    """

    name: ClassVar[str] = "edm"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        plain_numbers(self)
        if not self.sigma_data > 0:
            raise BadInput(f"edm prediction needs sigma_data > 0, found {self.sigma_data}")

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        root = torch.hypot(sigma, alpha * self.sigma_data)
        return 1 / root, alpha * self.sigma_data**2 / root**2, sigma * self.sigma_data / root

    def _target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        root = torch.hypot(sigma, alpha * self.sigma_data)
        return (sigma * x0 - alpha * self.sigma_data**2 * eps) / (self.sigma_data * root)


@dataclass(frozen=True)
class Anchored(Prediction):
    """The clean sample, anchored to the input where there is no noise: `x0 = w x_t / alpha + (1 - w) raw`,
    w = width^2 / (width^2 + q^2), q = sigma / alpha.

    At t = 0 it is x_t whatever the network's output, as for v, flow, edm and eps; above q = width it is nearly the
    output of a network that predicts x0. It is the boundary condition of consistency models for such networks.

    Args:
        width: q below which x0 is mostly the input, > 0.

    References:
        Song, Dhariwal, Chen, Sutskever 2023, arXiv:2303.01469.
    """

    name: ClassVar[str] = "anchored"
    width: float = 0.01

    def __post_init__(self) -> None:
        plain_numbers(self)
        if not self.width > 0:
            raise BadInput(f"anchored prediction needs width > 0, found {self.width}")

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = (self.width * alpha) ** 2 + sigma**2
        return torch.ones_like(alpha), self.width**2 * alpha / total, sigma**2 / total

    def _target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0 - (self.width**2 * alpha / sigma) * eps


@dataclass(frozen=True)
class ResidualPrediction(Prediction):
    """What the input lacks, `x0 = x_t + raw`: for processes whose states are images with little noise.

    References:
        Daras, Delbracio, Talebi, Dimakis, Milanfar 2022, arXiv:2209.05442.
    """

    name: ClassVar[str] = "residual"

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ones_like(alpha), torch.ones_like(alpha), torch.ones_like(alpha)

    def _target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (1 - alpha) * x0 - sigma * eps


def prediction_from(spec: str | dict[str, Any] | Prediction) -> Prediction:
    """The prediction type that a name or a dict specifies.

    Args:
        spec: a name (`"eps"`, `"x0"`, `"v"`, `"flow"`, `"edm"`, `"anchored"`, `"residual"`, or one of diffusers:
            `"epsilon"`, `"sample"`, `"v_prediction"`, `"flow_prediction"`), what `Prediction.to_dict`
            returns, or a prediction type.

    Raises:
        BadInput: for an unknown name or field.
    """
    if isinstance(spec, Prediction):
        return spec
    fields = dict(spec) if isinstance(spec, dict) else {"name": spec}
    name = fields.pop("name", None)
    normalized = re.sub(r"[\s_-]+", "_", str(name).strip().lower())
    cls = family("prediction", Prediction, ALIASES.get(normalized, name), lambda kind: str(kind.name))
    known = [f.name for f in dataclasses.fields(cls)]
    for key in fields:
        check_field(f"prediction {name}", key, known)
    return cls(**fields)


def precise(value: Tensor) -> Tensor:
    """The values in float64 on their own device, or in float32 where that has no float64 (MPS)."""
    return value.double() if has_float64(value.device) else value.float()


def spread(coefficient: Tensor | float, like: Tensor) -> Tensor:
    """A coefficient broadcast to samples.

    Args:
        coefficient: () or (B,).
        like: samples (B, *S).

    Returns:
        a tensor of shape () or (B, 1, ...) that multiplies `like`, in its dtype; of (B,) on its device.
    """
    coefficient = torch.as_tensor(coefficient)
    here = coefficient.device.type == "cpu" and not (coefficient.requires_grad and not has_float64(like.device))
    if coefficient.ndim == 0 and here:
        return coefficient.to(like.dtype)  # multiplies on any device, without a copy
    coefficient = coefficient.to(like.dtype).to(like.device)  # in this order gradients return too: MPS has no float64
    return coefficient.reshape(-1, *[1] * (like.ndim - 1)) if coefficient.ndim == 1 else coefficient
