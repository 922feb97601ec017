"""Denoising losses: the distribution of times, the target of the network, and the weight of each time.

The error of the clean sample and that of the raw output differ by the prediction's own factor,
`x0_hat - x = c_out (F - target)`, so a weight `w` on `||x0_hat - x||^2` is a weight `w c_out^2` on `||F - target||^2`.
Every weight below is applied in this form, which never divides by a small number. With SNR = alpha^2 / sigma^2,
the unweighted error of the raw output has these weights on the squared error of x: eps SNR; v 1 + SNR (variance
preserving); x0 1; flow (alpha + sigma)^2 / sigma^2; edm (q^2 + s^2) / (q s)^2 with q = sigma / alpha (times alpha^-2
where alpha is not 1, s = sigma_data).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import BadInput, check_choice
from ..schedules.base import Schedule
from ..utils.devices import float64_device, has_float64

__all__ = [
    "DenoisingLoss",
    "EDMWeight",
    "LikelihoodWeight",
    "LogNormal",
    "LogitNormal",
    "MinSNR",
    "Uniform",
    "UniformLogSNR",
    "snr_weight",
    "stratified",
    "truncated_snr_weight",
    "v_weight",
    "x0_weight",
]

Weight = Callable[[Tensor, Tensor], Tensor]


def stratified(n: int, device: torch.device | str = "cpu") -> Tensor:
    """`n` numbers in [0, 1), one in each of `n` equal strata, in random order.

    One shared offset `u` gives `(i + u) / n`, which lowers the variance of a loss averaged over times.

    Args:
        n: number of strata.
        device: of the result; the CPU in place of MPS, which has no float64.

    Returns:
        float64 (n,).

    References:
        Kingma et al. 2021, arXiv:2107.00630, section I.1.
    """
    exact = float64_device(device)
    grid = (torch.arange(n, dtype=torch.float64, device=exact) + torch.rand((), dtype=torch.float64, device=exact)) / n
    return grid[torch.randperm(n, device=exact)]


def cast_to_device(value: Tensor, device: torch.device) -> Tensor:
    """A float64 tensor on the device; cast to float32 first for a device without float64 (MPS)."""
    return (value.float() if value.dtype == torch.float64 and not has_float64(device) else value).to(device)


# ---- distributions of times ----


@dataclass(frozen=True)
class Uniform:
    """Times uniform between the schedule's `t_min` and `t_max`."""

    def __call__(self, schedule: Schedule, u: Tensor) -> Tensor:
        """Times of the quantiles `u`, float64 (B,) in [0, 1)."""
        return schedule.t_min + (schedule.t_max - schedule.t_min) * u


@dataclass(frozen=True)
class LogitNormal:
    """`t = sigmoid(mean + std z)`, z standard normal, clamped to `t_min` and `t_max`: most times are in the middle.

    Args:
        mean: of logit(t).
        std: of logit(t).

    References:
        Esser et al. 2024, arXiv:2403.03206, section 3.1 (theirs: mean 0, std 1, for flow).
    """

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, schedule: Schedule, u: Tensor) -> Tensor:
        """Times of the quantiles `u`, float64 (B,) in [0, 1)."""
        return torch.sigmoid(self.mean + self.std * normal_quantile(u)).clamp(schedule.t_min, schedule.t_max)


@dataclass(frozen=True)
class LogNormal:
    """`ln(sigma / alpha) = mean + std z`, z standard normal, clamped to the schedule's `t_min` and `t_max`.

    Args:
        mean: of ln(sigma / alpha).
        std: of ln(sigma / alpha).

    References:
        Karras et al. 2022, arXiv:2206.00364, table 1 (theirs: mean -1.2, std 1.2, for images in [-1, 1]).
    """

    mean: float = -1.2
    std: float = 1.2

    def __call__(self, schedule: Schedule, u: Tensor) -> Tensor:
        """Times of the quantiles `u`, float64 (B,) in [0, 1)."""
        t = schedule.time(-(self.mean + self.std * normal_quantile(u)))
        return t.clamp(schedule.t_min, schedule.t_max)


@dataclass(frozen=True)
class UniformLogSNR:
    """Times at which log SNR is uniform between the schedule's `t_min` and `t_max`; with `snr_weight` the loss is then
    the likelihood weighting, by importance sampling, up to a factor.

    Args:
        lowest: of lam = log(alpha / sigma), where a schedule ends at pure noise.

    References:
        Song, Durkan, Murray, Ermon 2021, arXiv:2101.09258, section 4.2.
    """

    lowest: float = -10.0

    def range(self, schedule: Schedule) -> tuple[float, float]:
        """The highest and lowest lam."""
        high, low = (float(schedule.lam(t)) for t in (schedule.t_min, schedule.t_max))
        return high, max(low, self.lowest)

    def __call__(self, schedule: Schedule, u: Tensor) -> Tensor:
        """Times of the quantiles `u`, float64 (B,) in [0, 1)."""
        high, low = self.range(schedule)
        return schedule.time(high + (low - high) * u).clamp(schedule.t_min, schedule.t_max)


def normal_quantile(u: Tensor) -> Tensor:
    """The standard normal quantile of `u`, finite at 0 and 1 too."""
    return torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))


# ---- weights on ||x0_hat - x||^2 as functions of (alpha, sigma), float64 (B,) ----


def x0_weight(alpha: Tensor, sigma: Tensor) -> Tensor:
    """1: equal weights of the error in x."""
    return torch.ones_like(alpha)


def snr_weight(alpha: Tensor, sigma: Tensor) -> Tensor:
    """`SNR`: equal weights of the error in eps (Ho et al. 2020, arXiv:2006.11239, equation 14)."""
    return (alpha / sigma) ** 2


def v_weight(alpha: Tensor, sigma: Tensor) -> Tensor:
    """`1 + SNR`: equal weights of the error in v (Salimans, Ho 2022, arXiv:2202.00512, section 4)."""
    return 1 + (alpha / sigma) ** 2


def truncated_snr_weight(alpha: Tensor, sigma: Tensor) -> Tensor:
    """`max(SNR, 1)` (Salimans, Ho 2022, arXiv:2202.00512, section 4)."""
    return ((alpha / sigma) ** 2).clamp_min(1.0)


@dataclass(frozen=True)
class MinSNR:
    """`min(SNR, gamma)`, so that almost clean samples do not dominate.

    Args:
        gamma: maximum weight.

    References:
        Hang et al. 2023, arXiv:2303.09556, section 3.4.
    """

    gamma: float = 5.0

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The weights, float64 (B,)."""
        return ((alpha / sigma) ** 2).clamp_max(self.gamma)


@dataclass(frozen=True)
class EDMWeight:
    """`(q^2 + s^2) / (q s)^2` with q = sigma / alpha and s = sigma_data.

    Args:
        sigma_data: standard deviation of the data.

    References:
        Karras et al. 2022, arXiv:2206.00364, table 1.
    """

    sigma_data: float = 0.5

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The weights, float64 (B,)."""
        q = sigma / alpha
        return (q**2 + self.sigma_data**2) / (q * self.sigma_data) ** 2


@dataclass(frozen=True)
class LikelihoodWeight:
    """`SNR (-d log SNR / dt)` over its mean over uniform times: with `Uniform` times the loss is the variational bound,
    up to a factor and what does not depend on the network. `UniformLogSNR` with `snr_weight` has the same mean, and
    less variance.

    References:
        Song, Durkan, Murray, Ermon 2021, arXiv:2101.09258, theorem 1; Kingma et al. 2021, arXiv:2107.00630.
    """

    def at(self, schedule: Schedule, t: Tensor) -> Tensor:
        """The weights on the squared error of x at times `t`, float64 (B,)."""
        with torch.enable_grad():
            t = t.detach().requires_grad_(True)
            lam = schedule.lam(t)
            (slope,) = torch.autograd.grad(lam.sum(), t)
        high, low = UniformLogSNR().range(schedule)
        return torch.exp(2 * lam.detach()) * -slope * (schedule.t_max - schedule.t_min) / (high - low)


# ---- the loss ----


@dataclass(frozen=True)
class Evaluation:
    """A loss of a batch and the network's evaluation that it was computed from.

    Args:
        loss: a scalar.
        x_t: noisy samples (B, *S).
        t: their times (B,), float64.
        raw: the network's output (B, *S).
        dropped: which samples lost their conditions, bool (B,); None: none can.
    """

    loss: Tensor
    x_t: Tensor
    t: Tensor
    raw: Tensor
    dropped: Tensor | None = None


@dataclass(frozen=True)
class DenoisingLoss:
    """Weighted mean squared (or absolute) error of the network's raw output against its prediction target.

    `L = E_{t, eps} w(t) c_out(t)^2 || F(c_in (alpha x + sigma eps), t) - target(x, eps, t) ||^2 / d`, where `w` weights
    the squared error of x. Without a weight the factor `w c_out^2` is 1: for v-prediction, `w = 1 + SNR`.

    Args:
        label_drop: probability that the conditions of a sample (its label, its text) are replaced by those of the
            unconditional branch, all at once, for classifier-free guidance; in [0, 1].
        times: the distribution of t, `Uniform`, `LogitNormal` or `LogNormal`.
        weight: on the squared error of x, a function of (alpha, sigma): `x0_weight`, `snr_weight`, `v_weight`,
            `truncated_snr_weight`, `MinSNR(gamma)`, `EDMWeight(sigma_data)`, or `LikelihoodWeight()`, of the time; None
            for the prediction's own.
        spread: stratify the times over the batch; otherwise they are independent.
        norm: "l2", the squared error, or "l1", the absolute one.
        null_conditions: `null_NAME` (1, ...) replaces the condition NAME of a sample that is dropped, where the batch
            has no `null_NAME` (B, ...) itself. Labels are replaced by the denoiser's null label.
        conditions: names of the conditions in a batch that the network gets; what else is in it is for other losses.

    Raises:
        BadInput: if `label_drop` is out of range, and for another norm.

    References:
        Ho, Salimans 2022, arXiv:2207.12598 (label dropout).
    """

    label_drop: float = 0.1
    times: Callable[[Schedule, Tensor], Tensor] = field(default_factory=Uniform)
    weight: Weight | LikelihoodWeight | None = None
    spread: bool = True
    null_conditions: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    conditions: tuple[str, ...] = ("label", "text", "text_mask", "added_text_embeds", "added_time_ids", "source")
    norm: str = "l2"

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ("l2", "l1"))
        if not 0 <= self.label_drop <= 1:
            raise BadInput(f"label_drop is a fraction in [0, 1], got {self.label_drop}")

    def __call__(self, denoiser: Denoiser, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch.

        Args:
            denoiser: whose network is trained.
            batch: `{"x": (B, *S)}` and `conditions`, each (B, ...) where it is there: `"label"` int64, `"text"`, ...

        Returns:
            A scalar, float32.

        Raises:
            BadInput: if conditions are to be dropped and there is nothing to replace them by.
        """
        return self.evaluate(denoiser, batch).loss

    def evaluate(self, denoiser: Denoiser, batch: dict[str, Tensor]) -> Evaluation:
        """The loss of a batch and what it was computed from. Args and Raises as for a call."""
        x = batch["x"]
        cond, dropped = self._drop(batch, denoiser.null_label)
        n = len(x)
        exact = float64_device(x.device)
        u = stratified(n, exact) if self.spread else torch.rand(n, dtype=torch.float64, device=exact)
        t = self.times(denoiser.schedule, u)
        eps = torch.randn_like(x)
        alpha, sigma = (
            cast_to_device(each(t), x.device) for each in (denoiser.schedule.alpha, denoiser.schedule.sigma)
        )
        shape = (-1,) + (1,) * (x.ndim - 1)
        x_t = (alpha.view(shape) * x + sigma.view(shape) * eps).to(x.dtype)
        raw = denoiser.raw(x_t, t, **cond)
        difference = raw.float() - denoiser.prediction.target(x, eps, alpha, sigma).float()
        error = difference.abs() if self.norm == "l1" else difference.square()
        if self.weight is None:
            return Evaluation(error.mean(), x_t, t, raw, dropped)
        factor = self.factor(denoiser, t)
        loss = (factor.float().to(x.device) * error.flatten(1).mean(1)).mean()
        return Evaluation(loss, x_t, t, raw, dropped)

    def drop(self, batch: Mapping[str, Tensor], null_label: int | None) -> dict[str, Tensor]:
        """The conditions of a batch, those of each sample replaced by the null ones with probability `label_drop`."""
        return self._drop(batch, null_label)[0]

    def _drop(self, batch: Mapping[str, Tensor], null_label: int | None) -> tuple[dict[str, Tensor], Tensor | None]:
        """The conditions, and which samples lost theirs, bool (B,); None where none can."""
        cond = {name: batch[name] for name in self.conditions if name in batch}
        if not self.label_drop or not cond:
            return cond, None
        known = {**(self.null_conditions or {}), **batch}
        nulls = {name: known[f"null_{name}"] for name in cond if f"null_{name}" in known}
        if "label" in cond and "label" not in nulls:
            if null_label is None:
                raise BadInput(
                    "labels can be dropped only where the denoiser has a null label: give it one, or label_drop=0"
                )
            nulls["label"] = torch.full_like(cond["label"][:1], null_label)
        if not nulls:
            names = ", ".join(f"null_{name}" for name in cond)
            raise BadInput(f"conditions can be dropped only with {names}: give null_conditions, or label_drop=0")
        first = next(iter(cond.values()))
        dropped = torch.rand(len(first), device=first.device) < self.label_drop
        for name, null in nulls.items():
            value = cond[name]
            where = dropped.view(-1, *[1] * (value.ndim - 1))
            cond[name] = torch.where(where, null.to(value.device, value.dtype), value)
        return cond, dropped

    def factor(self, denoiser: Denoiser, t: Tensor) -> Tensor:
        """`w c_out^2`, float64 (B,): the weight of the squared error of the raw output at the times `t` (B,)."""
        if self.weight is None:
            return torch.ones_like(t, dtype=torch.float64)
        # At t_min a weight may be infinite and c_out zero; just inside, their product is close to its limit.
        width = denoiser.schedule.t_max - denoiser.schedule.t_min
        inside = t.clamp(denoiser.schedule.t_min + 1e-6 * width, denoiser.schedule.t_max - 1e-6 * width)
        alpha, sigma = denoiser.schedule.alpha(inside), denoiser.schedule.sigma(inside)
        _, _, c_out = denoiser.prediction.coefficients(alpha, sigma)
        if isinstance(self.weight, LikelihoodWeight):
            return self.weight.at(denoiser.schedule, inside) * c_out**2
        return self.weight(alpha, sigma) * c_out**2
