"""Schedules defined by a table of `alphas_cumprod`, as for DDPM and Stable Diffusion networks; see `schedules`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import BadInput, check_choices, check_int
from .base import Schedule, _vp_log_alpha

CONVENTIONS = ("log_alpha", "log_q")


@dataclass(frozen=True)
class Discrete(Schedule):
    """A variance-preserving table `alphas_cumprod[i] = alpha^2`, i = 0 .. N-1, interpolated at any time.

    Entry i is at `t = (i + 1) / N`, so t = 0 is the clean image and t = 1 the last entry. Where the interpolated
    quantity is not finite (the last entry of a zero-terminal-SNR table, and for log_q the interval from entry 0 to the
    clean image) alpha, respectively q, is linear instead.

    Args:
        alphas_cumprod: N >= 2 numbers in (0, 1), strictly decreasing; the last may be 0.
        convention: the quantity that is linear in t between the entries: `"log_alpha"` (as in DPM-Solver's code) or
            `"log_q"`, q = sigma / alpha (as in k-diffusion and diffusers).

    Raises:
        BadInput: for an invalid table or convention.
    """

    alphas_cumprod: tuple[float, ...] = ()
    convention: str = "log_alpha"

    def __post_init__(self) -> None:
        try:
            table = tuple(float(a) for a in self.alphas_cumprod)
        except (TypeError, ValueError):
            raise BadInput(f"alphas_cumprod must be a list of numbers, found {_shown(self.alphas_cumprod)}") from None
        object.__setattr__(self, "alphas_cumprod", table)
        check_choices(self, convention=CONVENTIONS)
        if len(table) < 2:
            raise BadInput(f"Discrete needs at least 2 entries in alphas_cumprod, found {len(table)}")
        for i, (before, now) in enumerate(zip((1.0, *table), table)):
            if not 0 <= now < before:
                raise BadInput(
                    f"alphas_cumprod must fall from below 1 to 0 or more: entry {i} is {now}, before it {before}"
                )

    @classmethod
    def from_betas(cls, betas: Iterable[float] | Tensor, convention: str = "log_alpha") -> Discrete:
        """The table `cumprod(1 - beta)`, in float64.

        Args:
            betas: numbers in (0, 1], one per step.
            convention: as for the class.

        Raises:
            BadInput: for other betas.
        """
        try:
            betas = torch.as_tensor(betas if isinstance(betas, Tensor) else list(betas), dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise BadInput(f"betas must be a list of numbers, found {_shown(betas)}") from None
        wrong = (~((betas > 0) & (betas <= 1))).nonzero().flatten().tolist()
        if betas.ndim != 1 or wrong:
            at = f"entry {wrong[0]} is {float(betas.flatten()[wrong[0]]):g}" if wrong else f"shape {tuple(betas.shape)}"
            raise BadInput(f"betas must be numbers in (0, 1], one a step, found {at}")
        return cls(tuple(torch.cumprod(1 - betas, 0).tolist()), convention)

    @classmethod
    def linear(
        cls, steps: int = 1000, first: float = 1e-4, last: float = 0.02, convention: str = "log_alpha"
    ) -> Discrete:
        """DDPM's betas, equally spaced.

        Args:
            steps: N, at least 2.
            first, last: the first and the last beta.
            convention: as for the class.

        References:
            Ho, Jain, Abbeel 2020, arXiv:2006.11239.
        """
        return cls.from_betas(
            torch.linspace(first, last, check_int("steps", steps, 2), dtype=torch.float64), convention
        )

    @classmethod
    def scaled_linear(
        cls, steps: int = 1000, first: float = 0.00085, last: float = 0.012, convention: str = "log_alpha"
    ) -> Discrete:
        """Stable Diffusion's betas: the square roots are equally spaced.

        Args:
            steps: N, at least 2.
            first, last: the first and the last beta.
            convention: as for the class.

        References:
            Rombach et al. 2022, arXiv:2112.10752.
        """
        return cls.from_betas(
            torch.linspace(first**0.5, last**0.5, check_int("steps", steps, 2), dtype=torch.float64) ** 2, convention
        )

    @classmethod
    def cosine(
        cls, steps: int = 1000, offset: float = 0.008, largest: float = 0.999, convention: str = "log_alpha"
    ) -> Discrete:
        """Improved DDPM's cosine, with clipped betas.

        Args:
            steps: N, at least 2.
            offset: of the cosine.
            largest: maximum beta.
            convention: as for the class.

        References:
            Nichol, Dhariwal 2021, arXiv:2102.09672.
        """
        steps = check_int("steps", steps, 2)
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.cos((t + offset) / (1 + offset) * (math.pi / 2)) ** 2
        return cls.from_betas((1 - f[1:] / f[:-1]).clamp(max=largest), convention)

    @property
    def t_min(self) -> float:
        return 1 / len(self.alphas_cumprod)

    @property
    def zero_snr(self) -> bool:
        return self.alphas_cumprod[-1] == 0.0

    def index(self, t: Tensor | float) -> Tensor:
        """The fractional table index `N t - 1`, at least 0: the time input of networks trained on the table."""
        size = len(self.alphas_cumprod)
        return (torch.as_tensor(t, dtype=torch.float64) * size - 1).clamp(0, size - 1)

    @cached_property
    def _nodes(self) -> tuple[Tensor, Tensor]:
        """log alpha and lam at t = 0, 1/N, ..., 1 (the first lam is +inf, the last of each may be -inf)."""
        with torch.inference_mode(False):  # cached values may be used under autograd later
            table = torch.tensor((1.0, *self.alphas_cumprod), dtype=torch.float64)
            log_alpha = 0.5 * torch.log(table)
            return log_alpha, log_alpha - 0.5 * torch.log1p(-table)

    @cached_property
    def _copies(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        """The nodes by device."""
        return {}

    def _nodes_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The nodes on a device, cached."""
        if device.type == "cpu":
            return self._nodes
        if device not in self._copies:
            log_alphas, lams = self._nodes
            self._copies[device] = log_alphas.to(device), lams.to(device)
        return self._copies[device]

    def _pieces(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log alpha and lam, each by the rule of the interval that t lies in."""
        size = len(self.alphas_cumprod)
        log_alphas, lams = self._nodes_on(t.device)
        k = (torch.ceil(t.detach() * size).long() - 1).clamp(0, size - 1)
        w = t * size - k
        if self.convention == "log_alpha":
            log_alpha = log_alphas[k] + w * self._steps(log_alphas)[k]
            lam = None
        else:
            lam = lams[k.clamp(min=1)] + w * self._steps(lams)[k]
            lam = torch.where(k == 0, lams[1] - torch.log(torch.where(k == 0, w, 1.0)), lam)
            log_alpha = _vp_log_alpha(lam)
        if self.zero_snr:
            last = k == size - 1
            log_alpha = torch.where(last, log_alphas[-2] + torch.log1p(torch.where(last, -w, 0.0)), log_alpha)
            lam = None if lam is None else torch.where(last, _vp_lam(log_alpha), lam)
        return log_alpha, _vp_lam(log_alpha) if lam is None else lam

    @staticmethod
    def _steps(nodes: Tensor) -> Tensor:
        # an infinite step is never used, but must not put NaN into the backward pass of torch.where
        """Differences of the nodes."""
        return torch.nan_to_num(nodes[1:] - nodes[:-1], nan=1.0, posinf=1.0, neginf=1.0)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._pieces(t)[0])

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._pieces(t)[0]))

    def _lam(self, t: Tensor) -> Tensor:
        return self._pieces(t)[1]

    def _time(self, lam: Tensor) -> Tensor:
        size = len(self.alphas_cumprod)
        log_alphas, lams = self._nodes_on(lam.device)
        k = (torch.searchsorted(-lams, -lam.detach().contiguous()) - 1).clamp(0, size - 1)
        log_alpha = _vp_log_alpha(lam)
        if self.convention == "log_alpha":
            w = (log_alpha - log_alphas[k]) / self._steps(log_alphas)[k]
        else:
            w = torch.where(k == 0, torch.exp(lams[1] - lam), (lam - lams[k.clamp(min=1)]) / self._steps(lams)[k])
        if self.zero_snr:
            w = torch.where(k == size - 1, -torch.expm1(log_alpha - log_alphas[-2]), w)
        return (k + w.clamp(0, 1)) / size


def rescale_zero_snr(schedule: Discrete) -> Discrete:
    """The table shifted and scaled in alpha so that its last entry is exactly 0 and its first one unchanged.

    `A'_i = (A_i - A_{N-1}) A_0 / (A_0 - A_{N-1})`, `A = sqrt(alphas_cumprod)`. The output of a network that predicts
    eps does not determine the image at the last entry; that of v-, x0- and flow-prediction does.

    Args:
        schedule: the table.

    Raises:
        BadInput: for another schedule.

    References:
        Lin, Liu, Li, Yang 2023, arXiv:2305.08891.
    """
    if not isinstance(schedule, Discrete):
        raise BadInput(f"rescale_zero_snr needs a Discrete table, found {type(schedule).__name__}")
    table = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64)
    alpha = table.sqrt()
    scaled = ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2
    scaled[0] = table[0]  # exactly, whatever the rounding
    return replace(schedule, alphas_cumprod=tuple(scaled.tolist()))


def _vp_lam(log_alpha: Tensor) -> Tensor:
    """lam of a variance-preserving log alpha."""
    return log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))


def _shown(value: object) -> str:
    """A value in a message, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
