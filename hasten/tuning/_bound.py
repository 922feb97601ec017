"""The variational bound of a chain of denoising steps, from the denoiser's squared error at each time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import BadInput, check_choice
from ..schedules.base import Schedule
from ..times import check_times
from ._task import Tuned, Tuner, TuningTask
from .moments import Moments

__all__ = ["BITS", "Bits", "Bound", "edge_costs", "variational_bound"]

BITS = 1 / math.log(2)  # nats to bits
LEVEL = 2 / 255  # width of one of 256 grey levels in [-1, 1]
VARIANCES = ("small", "large", "analytic")


def edge_costs(
    schedule: Schedule,
    times: Tensor,
    mse: Tensor,
    variance: str = "small",
    *,
    decoder: float | None = None,
    width: float = LEVEL,
) -> Tensor:
    """The cost of each possible step of a chain, (T + 1, T + 1) float64, row s, column r, in nats per dimension.

    The negative evidence lower bound of a chain 0 = t_0 < t_i < ... < t_T is the sum of the costs of its steps (plus a
    constant of the prior, see `variational_bound`). The step from r down to s >= 1 costs the divergence between the
    posterior of z_s and the model's step, whose mean has the weight g = alpha_s f on x0. With
    f = 1 - e^(2 (lam_r - lam_s)), bt = sigma_s^2 f and step variance V,

        L(s, r) = (bt / V - log(bt / V) - 1 + g^2 MSE_r / V) / 2
                = f e^(2 lam_s) MSE_r / 2              V = bt                    "small"
                = log(1 + f e^(2 lam_s) MSE_r) / 2     V = bt + g^2 MSE_r        "analytic", the minimum over V
        and without simplification with                V = sigma_r^2 f           "large"

    and the step into s = 0 costs the log likelihood of a Gaussian decoder of variance D around x0,

        L(0, r) = (log(2 pi D) + (MSE_r + width^2 / 12) / D) / 2 - log width,

    an upper bound, by Jensen's inequality, of that of the decoder integrated over bins of this width; for width = 0 the
    density itself, without the last term. D is decoder^2, or the best D for each r where decoder is None. Entries with
    s >= r are +inf.

    Args:
        schedule: of the diffusion.
        times: (T + 1,), ascending, times[0] = 0.
        mse: (T + 1,), E||x - x0(z_t)||^2 per dimension at each time; mse[0] is not used.
        variance: "small", "large" or "analytic".
        decoder: standard deviation of the decoder. Default: the best one for each r.
        width: of the bins of the data; 2/255 for images of 256 levels in [-1, 1].

    Raises:
        BadInput: for times or errors of another form, or an unknown variance.

    References:
        Watson, Ho, Norouzi, Chan 2021, arXiv:2106.03802, section 3; variances: Ho, Jain, Abbeel 2020, arXiv:2006.11239;
        Bao, Li, Zhu, Zhang 2022, arXiv:2201.06503.
    """
    check_choice("edge_costs variance", variance, VARIANCES)
    times, mse = times.double(), mse.double()
    if times.ndim != 1 or len(times) < 2 or times[0] != 0 or not bool((times[1:] > times[:-1]).all()):
        raise BadInput("edge_costs needs two or more ascending times, the first 0")
    if mse.shape != times.shape or not bool((mse[1:] > 0).all()):
        raise BadInput(f"edge_costs needs one squared error > 0 for each of {len(times)} times")
    lam, log_sigma2 = schedule.lam(times), 2 * torch.log(schedule.sigma(times))
    f = -torch.expm1(2 * (lam[None, 1:] - lam[1:, None]))  # row s, column r
    noise = f * torch.exp(2 * lam[1:, None]) * mse[None, 1:]  # g^2 MSE / bt
    if variance == "small":
        inner = 0.5 * noise
    elif variance == "analytic":
        inner = 0.5 * torch.log1p(noise)
    else:
        log_ratio = log_sigma2[1:, None] - log_sigma2[None, 1:]
        inner = 0.5 * (torch.expm1(log_ratio) - log_ratio + torch.exp(log_ratio) * noise)
    costs = torch.full((len(times), len(times)), math.inf, dtype=torch.float64)
    below = torch.ones_like(inner).triu(1).bool()
    costs[1:, 1:] = torch.where(below, inner, math.inf)
    costs[0, 1:] = decoder_cost(mse[1:], decoder, width)
    return costs


def decoder_cost(mse: Tensor, decoder: float | None, width: float) -> Tensor:
    """`L(0, r)` of `edge_costs`, nats per dimension, for any shape of squared errors."""
    if width < 0 or (decoder is not None and decoder <= 0):
        raise BadInput(f"a decoder needs a width >= 0 and a deviation > 0, found {width} and {decoder}")
    spread = mse + width**2 / 12
    D = spread if decoder is None else torch.full_like(mse, decoder**2)
    return 0.5 * (torch.log(2 * math.pi * D) + spread / D) - (math.log(width) if width else 0.0)


@dataclass(frozen=True)
class Bound(Tuner):
    """A measurement, not a tuning: the likelihood bound of the chain on this sampler's grid, on real images.

    Figures, bits per dimension: `small`, `large` and `analytic`, the bounds with DDPM's variances and with the best one
    for each step, with the denoiser's squared errors at the times of the grid; and `sampler`, that of the sampler's own
    variances if it has them (`analytic` with form=ddpm).

    Args:
        images: how many if the task has no `n`.
        width: of the data's grey levels.

    References:
        Watson, Ho, Norouzi, Chan 2021, arXiv:2106.03802; Bao, Li, Zhu, Zhang 2022, arXiv:2201.06503.
    """

    needs_data: ClassVar[bool] = True
    images: int = 1000
    width: float = LEVEL

    @torch.no_grad()
    def tune(self, task: TuningTask) -> Tuned:
        """Measure the bounds; raises BadInput without images."""
        if task.images is None:
            raise BadInput("bound needs real images: name their folder with --data")
        x, labels = task.images(max(task.n or self.images, 16))
        x, labels = x.cpu(), None if task.labels(1) is None else labels
        moments, errors = Moments(precision="fp32"), []
        for k, t in enumerate(task.times[:-1]):
            errors.append(moments.measure(task, t, x, labels, x.double().mean(0))[1])
            task.tick("bound", k + 1, task.steps, errors[-1])
        mse, power = torch.tensor(errors, dtype=torch.float64), float(x.double().square().mean())
        variances: dict[str, str | Tensor] = {name: name for name in VARIANCES}
        if hasattr(task.sampler, "variances") and task.sampler.form == "ddpm":
            variances["sampler"] = task.sampler.variances(task.schedule, task.times)
        figures = {
            name: variational_bound(task.schedule, task.times, mse, variance, power=power, width=self.width).total
            for name, variance in variances.items()
        }
        return Tuned(figures=figures)


class Bits(NamedTuple):
    """The terms of a bound on the negative log likelihood, in bits per dimension.

    Args:
        prior: of the noisiest time.
        steps: of the steps between noisy times, noisiest first.
        decoder: of the last step.
    """

    prior: float
    steps: tuple[float, ...]
    decoder: float

    @property
    def total(self) -> float:
        """The bound."""
        return self.prior + sum(self.steps) + self.decoder


def variational_bound(
    schedule: Schedule,
    times: Tensor,
    mse: Tensor,
    variance: str | Tensor = "small",
    *,
    power: float = 1.0,
    decoder: float | None = None,
    width: float = LEVEL,
) -> Bits:
    """The evidence lower bound of the chain that samples on this grid, in bits per dimension.

        bound = KL(q(z_T | x) | N(0, alpha_T^2 + sigma_T^2)) + sum of L(s, r) over the grid's steps,

    with L of `edge_costs`. Smaller is better; with an exact denoiser and `"analytic"` it is the minimum over Gaussian
    chains on these times, and for Gaussian data with equal variances the entropy itself.

    Args:
        schedule: of the diffusion.
        times: (K + 1,), descending, ending at 0: the grid that `Model.sample` uses.
        mse: (K,), E||x - x0(z_t)||^2 per dimension at times[:-1].
        variance: "small", "large", "analytic", or the variances V of the K - 1 noisy steps, noisiest first, (K - 1,) or
            (K - 1, *S), all > 0. "analytic" is computed from `mse`; for a sampler that uses another estimate pass its
            variances.
        power: E||x||^2 per dimension, for the prior.
        decoder, width: see `edge_costs`; the decoder is the same for all variances, so that a difference between them
            comes from the noisy steps.

    Raises:
        BadInput: for a chain that does not end at 0, or errors or variances of another number.
    """
    times = check_times(times).double()
    if times[-1] != 0:
        raise BadInput(f"a bound needs a chain that ends at t = 0, found {float(times[-1]):g}")
    if mse.shape != times[:-1].shape:
        raise BadInput(f"a bound needs one squared error for each of {len(times) - 1} steps, found {tuple(mse.shape)}")
    up = times.flip(0)
    errors = torch.cat([torch.zeros(1, dtype=torch.float64), mse.double().flip(0)])
    alpha2, sigma2 = (float(f(times[0])) ** 2 for f in (schedule.alpha, schedule.sigma))
    total = alpha2 + sigma2
    prior = 0.5 * ((sigma2 + alpha2 * power) / total - 1 + math.log(total / sigma2))
    if isinstance(variance, str):
        costs = edge_costs(schedule, up, errors, variance, decoder=decoder, width=width)
        steps = torch.diagonal(costs, 1)[1:].flip(0)
    else:
        steps = step_costs(schedule, times, mse.double(), variance.double())
    last = decoder_cost(mse[-1].double(), decoder, width)
    return Bits(prior * BITS, tuple((steps * BITS).tolist()), float(last) * BITS)


def step_costs(schedule: Schedule, times: Tensor, mse: Tensor, variance: Tensor) -> Tensor:
    """`L(s, r)` of the steps between noisy times of a descending grid for given variances, nats per dimension.

    Args:
        schedule: of the diffusion.
        times: (K + 1,), descending.
        mse: (K,) or (K, *S).
        variance: (K - 1,) or (K - 1, *S), then averaged over S.

    Returns:
        (K - 1,).
    """
    K = len(times) - 1
    if len(variance) != K - 1 or not bool((variance > 0).all()):
        raise BadInput(f"this chain has {K - 1} noisy steps: give that many variances > 0, found {len(variance)}")
    lam, sigma2 = schedule.lam(times), schedule.sigma(times) ** 2
    f = -torch.expm1(2 * (lam[:-2] - lam[1:-1]))
    bt, g2 = sigma2[1:-1] * f, (schedule.alpha(times[1:-1]) * f) ** 2
    shape = (-1, *[1] * (max(variance.ndim, mse.ndim) - 1))
    variance, mse = (value if value.ndim == len(shape) else value.reshape(shape) for value in (variance, mse))
    bt, g2 = bt.reshape(shape), g2.reshape(shape)
    cost = 0.5 * (bt / variance - torch.log(bt / variance) - 1 + g2 * mse[:-1] / variance)
    return cost.flatten(1).mean(1) if cost.ndim > 1 else cost
