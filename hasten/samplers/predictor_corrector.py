"""Steps of the reverse-time SDE, each followed by Langevin steps at the same time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_choices, check_numbers
from ..predictions import precise
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ._exponential import Node, make_nodes

PREDICTORS = ("reverse_diffusion", "ancestral", "euler_maruyama")


@dataclass(frozen=True)
class PredictorCorrector(SamplerBase):
    """A step of the reverse-time SDE, then `corrections` steps of Langevin dynamics that correct its distribution.

    dz = (f z - g^2 score) dt + g dw with f = (log alpha)', g^2 = (sigma^2)' - 2 f sigma^2 = -2 sigma^2 lam' on any
    schedule; score = -(z - alpha x0) / sigma^2. From r to s, with a = alpha_r / alpha_s, b = sigma_r^2 - a^2 sigma_s^2:

        reverse_diffusion   z_s = (2 - a) z_r + b score + sqrt(b) xi
        ancestral           z_s = (z_r + b score) / a + sqrt(V) xi,    V = b sigma_s^2 / sigma_r^2 or b
        euler_maruyama      z_s = z_r - (t_r - t_s) (f z_r - g^2 score) + sqrt(t_r - t_s) g xi

    and then at s, unless it is the last time, with s' the time after it and the norm of one sample alone,

        z <- z + e score + sqrt(2 e) xi,      e = 2 (alpha_s / alpha_s')^2 (snr sqrt(d) / |score|)^2,  d entries.

    The paper uses the means of |xi| and |score| over the batch, so that an image depends on the others in its batch;
    that is not offered. sqrt(d) is already the mean of |xi|. The norm of one sample's score varies by 1/sqrt(2 d), and
    as the step follows it, the corrector widens the distribution by a fraction of about 4 / d: negligible for images,
    but 40 % in 8 dimensions. The paper's rules for VP, sub-VP and VE are these with their alpha and sigma. Without
    corrections, ancestral is DDPM.

    The step into sigma = 0 gives x0 itself: the mean, without noise. From alpha = 0, where f is infinite, every
    predictor uses the exact posterior alpha_s x0 + sigma_s xi. euler_maruyama uses the schedule's own time, and needs
    (t_r - t_s) f well below 1: it is not for few steps, nor for a cosine schedule that starts close to alpha = 0.

    Linear only without corrections, whose step follows the norm of the output. Order 1 in law up to the corrector's own
    bias (it vanishes with snr); NFE = steps + corrections (steps - 1).

    Args:
        predictor: "reverse_diffusion", "ancestral" or "euler_maruyama".
        corrections: per step, at least 0.
        snr: signal-to-noise ratio of a correction, > 0.
        variance: of the ancestral predictor: "small" is the paper's rule for VE, "large" the one for VP.

    References:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole 2021, arXiv:2011.13456, algorithms 1, 4 and 5, appendices D, E
        (on VP and sub-VP, snr .16, one correction).
    """

    predictor: str = "reverse_diffusion"
    corrections: int = 1
    snr: float = 0.16
    variance: str = "small"
    order: ClassVar[int] = 1
    why: ClassVar[str] = "the step of a correction follows the norm of the output"

    def __post_init__(self) -> None:
        check_choices(self, predictor=PREDICTORS, variance=("small", "large"))
        if self.corrections < 0 or not self.snr > 0:
            raise BadInput(f"{self}: corrections must not be negative, and snr must be positive")
        check_numbers(self)

    @property
    def linear(self) -> bool:
        """Whether there are no corrections."""
        return self.corrections == 0

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps + self.corrections * (steps - 1)

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        path, z = make_nodes(schedule, times), x
        for k, (r, s) in enumerate(zip(path, path[1:], strict=False)):
            x0 = yield Query(z, r.t)
            if s.clean:
                return s.alpha * x0
            z = s.alpha * x0 + s.sigma * noise() if r.pure else self._predict(schedule, r, s, z, x0, noise())
            after = path[min(k + 2, len(path) - 1)]
            for _ in range(self.corrections if after is not s else 0):
                z = self._correct(s, after, z, (yield Query(z, s.t)), noise())
        return z

    def _predict(self, schedule: Schedule, r: Node, s: Node, z: Any, x0: Any, xi: Any) -> Any:
        """scale z + gain score + std xi, score = -(z - alpha_r x0) / sigma_r^2."""
        if self.predictor == "euler_maruyama":
            step = r.t - s.t
            f, g2 = _rates(schedule, r.t)
            scale, gain, std = 1 - step * f, step * g2, torch.sqrt(step * g2)
        else:
            a = r.alpha / s.alpha
            b = r.sigma**2 - (a * s.sigma) ** 2
            if self.predictor == "reverse_diffusion":
                scale, gain, std = 2 - a, b, torch.sqrt(b)
            else:
                small = self.variance == "small"
                scale, gain, std = 1 / a, b / a, torch.sqrt(b) * (s.sigma / r.sigma if small else 1.0)
        gain = gain / r.sigma**2
        return (scale - gain) * z + (gain * r.alpha) * x0 + std * xi

    def _correct(self, s: Node, after: Node, z: Tensor, x0: Tensor, xi: Tensor) -> Tensor:
        """One step of Langevin dynamics."""
        score = (s.alpha * x0 - z) / s.sigma**2
        mean_square = precise(score).flatten(1).square().mean(1)
        e = 2 * (self.snr * float(s.alpha / after.alpha)) ** 2 / mean_square
        step, std = (v.to(z.dtype).reshape(-1, *[1] * (z.ndim - 1)) for v in (e, torch.sqrt(2 * e)))
        return z + step * score + std * xi


def _rates(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """f = (log alpha)' and g^2 = -2 sigma^2 lam' at a time inside the schedule, by automatic differentiation; both are
    differentiable in `t` where it requires a gradient.
    """
    with torch.inference_mode(False), torch.enable_grad():
        tracked = t.requires_grad
        at = t if tracked else torch.tensor(float(t), dtype=torch.float64, requires_grad=True)
        log_alpha, lam = torch.log(schedule.alpha(at)), schedule.lam(at)
        slopes = [
            torch.autograd.grad(curve, at, create_graph=tracked, allow_unused=True)[0] if curve.requires_grad else None
            for curve in (log_alpha, lam)
        ]
    f, rate = (torch.zeros_like(t) if slope is None else slope for slope in slopes)
    return f, -2 * schedule.sigma(t) ** 2 * rate
