"""`Schedule`: the weights of the data and of the noise at a time."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..utils.registry import is_own, path_of


@dataclass(frozen=True)
class Schedule:
    """One family of `(alpha, sigma)`; subclasses define the three curves inside (0, 1) and the inverse of `lam`.

    Subclasses define `_alpha`, `_sigma`, `_lam` (called with 0 < t < 1, or t = 1 where `zero_snr` is False) and `_time`
    (called with finite lam).

    `ordinary`: `x_t = alpha x + sigma eps` is all of the forward process, as in every schedule but a
    `processes.Process`. `bridge`: the far end is an image of a second set, the source, in place of noise.
    """

    ordinary: ClassVar[bool] = True
    bridge: ClassVar[bool] = False

    @property
    def t_min(self) -> float:
        """The smallest time worth a network evaluation: by default the last positive time of a grid."""
        return 1e-3

    @property
    def t_max(self) -> float:
        """The time at which sampling starts: by default the first time of a grid."""
        return 1.0

    @property
    def zero_snr(self) -> bool:
        """Whether alpha(1) = 0 exactly: x_1 is pure noise."""
        return False

    def alpha(self, t: Tensor | float) -> Tensor:
        """Weight of the image at times `t` of any shape, in [0, 1]."""
        t, start, end, inside = self._ends(t)
        return torch.where(start, 1.0, torch.where(end, 0.0, self._alpha(inside)))

    def sigma(self, t: Tensor | float) -> Tensor:
        """Standard deviation of the noise at times `t` of any shape, >= 0."""
        t, start, end, inside = self._ends(t)
        sigma = torch.where(start, 0.0, self._sigma(inside))
        return torch.where(end, 1.0, sigma) if self.zero_snr else sigma

    def lam(self, t: Tensor | float) -> Tensor:
        """`log(alpha / sigma)`, half the log signal-to-noise ratio; +inf at t = 0, -inf where alpha is 0."""
        t, start, end, inside = self._ends(t)
        return torch.where(start, math.inf, torch.where(end, -math.inf, self._lam(inside)))

    def q(self, t: Tensor | float) -> Tensor:
        """Noise level `sigma / alpha = exp(-lam)`, in [0, inf]: the sigma of EDM."""
        return torch.exp(-self.lam(t))

    def time(self, lam: Tensor | float) -> Tensor:
        """The inverse of `lam`; +inf gives 0 and -inf gives 1."""
        lam = _float64(lam)
        finite = torch.isfinite(lam)
        t = self._time(torch.where(finite, lam, 0.0))
        return torch.where(finite, t, (lam < 0).double())

    def prior_std(self, t: Tensor | float) -> Tensor:
        """Standard deviation of `x_t` for data of unit variance, `sqrt(alpha^2 + sigma^2)`: the scale of the initial
        state."""
        return torch.hypot(self.alpha(t), self.sigma(t))

    def begin(self, noise: Tensor, t: Tensor | float, source: Tensor | None = None) -> Tensor:
        """The state at the first time t from standard normal noise (B, *S): `noise` times `prior_std`.

        Args:
            noise: (B, *S).
            t: the first time of the grid.
            source: for the bridges among the processes, see `processes.Process`.
        """
        return noise * float(self.prior_std(t))

    def to_dict(self) -> dict[str, Any]:
        """`{"name": class, field: value, ...}`, ready for JSON; `schedule_from_dict` is the inverse.

        A class that hasten does not define is named with its module, `"my_package.Mine"`.
        """
        name = type(self).__name__ if is_own(type(self)) else path_of(type(self))
        return {"name": name, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}

    def _ends(self, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """t, whether it is the clean end, whether it is pure noise, and t with both replaced by a harmless value."""
        t = _float64(t)
        start = t <= 0
        end = t >= 1 if self.zero_snr else torch.zeros_like(start)
        # the replacement keeps 0 * inf out of the backward pass of torch.where
        return t, start, end, torch.where(start | end, 0.5, t)

    def _alpha(self, t: Tensor) -> Tensor:
        """`alpha` inside (0, 1)."""
        raise NotImplementedError

    def _sigma(self, t: Tensor) -> Tensor:
        """`sigma` inside (0, 1)."""
        raise NotImplementedError

    def _lam(self, t: Tensor) -> Tensor:
        """`lam` inside (0, 1)."""
        return torch.log(self._alpha(t)) - torch.log(self._sigma(t))

    def _time(self, lam: Tensor) -> Tensor:
        """`time` of finite lam."""
        raise NotImplementedError


def _float64(value: Tensor | float) -> Tensor:
    """The value as a float64 tensor."""
    return torch.as_tensor(value, dtype=torch.float64)


def _vp_log_alpha(lam: Tensor) -> Tensor:
    """log alpha where alpha^2 + sigma^2 = 1: `-log(1 + exp(-2 lam)) / 2`."""
    return -0.5 * torch.nn.functional.softplus(-2 * lam, threshold=50.0)
