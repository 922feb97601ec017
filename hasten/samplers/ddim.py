"""DDIM, from deterministic to ancestral, and its inversion."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_numbers
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ._exponential import Known, ddim, make_nodes


@dataclass(frozen=True)
class DDIM(SamplerBase):
    """Denoising diffusion implicit models.

        z_s = alpha_s x0 + sqrt(sigma_s^2 - V) eps + sqrt(V) xi,  V = eta^2 (1 - e^{-2h}) sigma_s^2,  h = lam_s - lam_r

    Order 1; NFE = steps.

    Args:
        eta: in [0, 1]: 0 is deterministic, the first-order exponential integrator of the probability-flow equation; 1
            is DDPM with the small variance.

    References:
        Song, Meng, Ermon 2021, arXiv:2010.02502.
    """

    eta: float = 0.0
    linear: ClassVar[bool] = True
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise BadInput(f"DDIM(eta={self.eta}): eta must lie in [0, 1]")
        check_numbers(self)

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        path, z = make_nodes(schedule, times), x
        for r, s in zip(path, path[1:], strict=False):
            known = Known(r, z, (yield Query(z, r.t)))
            if s.clean or self.eta == 0:
                z = ddim(z, known, s)
                continue
            decay = (r.alpha * s.sigma) / (s.alpha * r.sigma)  # e^{-h}, 0 from pure noise
            mean = decay if self.eta == 1 else torch.sqrt((1 - self.eta**2) + (self.eta * decay) ** 2)
            std = self.eta * torch.sqrt((1 - decay) * (1 + decay))
            ratio = s.sigma * mean / r.sigma
            z = ratio * z + (s.alpha - ratio * r.alpha) * known.x0 + (s.sigma * std) * noise()
        return z


@torch.no_grad()
def invert(denoiser: Any, x0: Tensor, times: Tensor, iterations: int = 0, **cond: Any) -> Tensor:
    """The noise z at times[0] from which deterministic DDIM on the grid `times` arrives at `x0` at times[-1].

    With iterations = 0, each inversion step uses the model output at its cleaner end (error of first order, NFE =
    steps). Otherwise each step is solved for z_r such that the DDIM step from z_r lands on z_s, by that many
    fixed-point iterations

        z_r <- (alpha_r/alpha_s) (z_s - sigma_s eps(z_r)) + sigma_r eps(z_r)         if q_r q_s < 1,  q = sigma/alpha,
        z_r <- (sigma_r/sigma_s) (z_s - alpha_s x0(z_r)) + alpha_r x0(z_r)           otherwise,

    (NFE = steps (1 + iterations)), of which the one used contracts for Gaussian data of variance up to 1. At sigma = 0
    there is no noise to predict, so the first inversion step uses its noisier end: exactly one iteration from
    z_r = alpha_r x0, even with iterations = 0.

    Args:
        denoiser: with a `schedule`.
        x0: (B, *S), the samples at times[-1].
        times: (steps + 1,), decreasing, as for sampling.
        iterations: per step, at least 0; 10 to 30 give the inverse to rounding.
        cond: conditions of the denoiser.

    Returns:
        z (B, *S).

    Raises:
        BadInput: for negative iterations, and for a single step from sigma = 0 to alpha = 0.

    References:
        Song, Meng, Ermon 2021, arXiv:2010.02502, section 4.3.
    """
    if iterations < 0:
        raise BadInput(f"invert(iterations={iterations}): must be 0 or more")
    path = make_nodes(denoiser.schedule, times.detach())[::-1]
    z_s = x0
    for s, r in zip(path, path[1:], strict=False):
        z = (r.alpha / s.alpha) * z_s if s.clean else ddim(z_s, Known(s, z_s, denoiser(z_s, s.t, **cond)), r)
        for _ in range(max(iterations, int(s.clean))):
            known = Known(r, z, denoiser(z, r.t, **cond))
            if (s.sigma * r.sigma).item() < (s.alpha * r.alpha).item() or s.clean and not r.pure:
                z = (r.alpha / s.alpha) * z_s + (r.sigma - r.alpha * s.sigma / s.alpha) * known.eps
            elif s.clean:  # one step over the entire schedule
                raise BadInput("invert: a single step from sigma = 0 to alpha = 0 has no inverse; use more steps")
            else:
                ratio = r.sigma / s.sigma
                z = ratio * z_s + (r.alpha - ratio * s.alpha) * known.x0
        z_s = z
    return z_s
