"""Start from a degraded image: the last part of the reverse process is enough to restore it."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..denoiser import Wrapper
from ..errors import BadInput, HastenError, check_choice, check_choices, check_numbers
from ..predictions import spread
from ..sampling import Noise
from ..schedules.base import Schedule
from ._base import Start

__all__ = ["CCDF", "Consistent", "contraction", "down", "remaining", "smallest_time", "up"]

Task = Literal["super_resolution", "inpainting", "restoration"]


@dataclass(frozen=True)
class CCDF(Start):
    """Come-closer-diffuse-faster: from a cheap estimate x_init of the image, noised to the time t0 < 1,

        x_t0 = alpha x_init + sigma e,   e ~ N(0, I),   then the usual sampler from t0, with x0 made consistent.

    Each reverse step contracts the error of x_init (`contraction`), so the smallest t0 that removes enough of it is the
    best (`smallest_time`); the evaluations are those of a grid that begins at t0. NFE: 0 in addition to the sampler's.

    The paper makes x_t itself consistent with y noised to the same level. For deterministic samplers that is
    equivalent: with x0 consistent at every evaluation, the known part of x_t is alpha y + sigma e, with the initial e,
    at all times.

    Args:
        time: t0 in (0, 1), at which the grid begins.
        factor: of super-resolution, at least 2.
        task: "super_resolution": `images` are smaller by `factor`, each pixel the mean of factor x factor. x_init is
            their bicubic enlargement, made consistent. Consistency is `x0 <- x0 + up(y - down(x0))` with down the mean
            over squares and up their repetition: an exact projection, hence non-expansive. "inpainting": `images` of
                full size
            with NaN where unknown; x_init has the mean of the image's known pixels there, and x0 is set to what is
            known. "restoration": `images` of full size, x_init themselves; nothing is known exactly (stroke and sketch
            editing is the same: SDEdit, arXiv:2108.01073).

    References:
        Chung, Sim, Ye 2022, arXiv:2112.05146.
    """

    time: float = 0.5
    factor: int = 4
    task: Task = "super_resolution"
    nfe: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not 0 < self.time < 1:
            raise BadInput(f"ccdf needs 0 < time < 1, found {self.time}")
        check_choices(self, task=typing.get_args(Task))
        if self.task == "super_resolution" and self.factor < 2:
            raise BadInput(f"ccdf: super_resolution needs a factor of at least 2, found {self.factor}")
        check_numbers(self)

    def begin(self, denoiser: nn.Module, noise: Noise, t: Tensor, images: Tensor | None = None, **cond: Any) -> Tensor:
        """x_t (B, *S) at time t.

        Args:
            denoiser: with a `schedule`.
            noise: of the samples.
            t: the first time of the grid.
            images: (B, C, H, W) in [-1, 1], or (B, C, H / factor, W / factor).
            cond: not used.

        Raises:
            BadInput: without images, or for images of another shape.
        """
        schedule: Any = denoiser.schedule
        e = noise.initial()
        x_init = self.initial(images, e.shape).to(e)
        return float(schedule.alpha(t)) * x_init + float(schedule.sigma(t)) * e

    def initial(self, images: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """x_init (B, *S).

        Args:
            images: as for `begin`.
            shape: (B, *S).
        """
        y = self._checked(images, shape)
        if self.task == "super_resolution":
            x = F.interpolate(y, scale_factor=float(self.factor), mode="bicubic", align_corners=False)
            return x + up(y - down(x, self.factor), self.factor)
        if self.task == "inpainting":
            dims = tuple(range(1, y.ndim))
            return torch.where(y.isnan(), torch.nanmean(y, dims, keepdim=True), y)
        return y

    def wrap(self, denoiser: nn.Module, images: Tensor | None = None) -> nn.Module:
        """The denoiser whose x0 is consistent with `images`.

        Raises:
            BadInput: without images.
        """
        if images is None:
            raise BadInput(f"ccdf begins from images, found none: give those for {self.task} (images=)")
        if self.task == "restoration":
            return denoiser
        return Consistent(denoiser, images, self.factor if self.task == "super_resolution" else 1)

    def _checked(self, images: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """The images in float32, their shape and values checked."""
        if images is None:
            raise BadInput(f"ccdf begins from images, found none: give those for {self.task} (images=)")
        expected = tuple(shape)
        if self.task == "super_resolution":
            if len(shape) != 4 or shape[2] % self.factor or shape[3] % self.factor:
                raise BadInput(f"super_resolution needs sides that {self.factor} divides, found samples {expected[1:]}")
            expected = (*shape[:2], shape[2] // self.factor, shape[3] // self.factor)
        if tuple(images.shape) != expected:
            raise BadInput(f"{self.task} needs images of shape {expected}, found {tuple(images.shape)}")
        if self.task == "inpainting":
            if bool(images.isnan().flatten(1).all(1).any()):
                raise BadInput("inpainting needs at least one known pixel in every image")
        elif not bool(torch.isfinite(images).all()):
            raise BadInput(f"{self.task} needs finite images (NaN marks what is unknown for task=inpainting only)")
        return images.float()


class Consistent(Wrapper):
    """`x0 <- x0 + up(y - down(x0))`, y (B, C, h, w); with factor 1, `x0 <- y` where y is not NaN.

    An evaluation of some samples only has `rows` (R,), integers.

    Args:
        denoiser: the inner one.
        y: the known images.
        factor: of `down` and `up`.
    """

    takes_rows: ClassVar[bool] = True

    def __init__(self, denoiser: nn.Module, y: Tensor, factor: int) -> None:
        super().__init__(denoiser)
        self.register_buffer("y", y, persistent=False)
        self.factor = factor

    def forward(self, x_t: Tensor, t: Tensor | float, *, rows: Tensor | None = None, **cond: Any) -> Tensor:
        """The inner denoiser's x0 (B, *S), made consistent."""
        x0 = self.denoiser(x_t, t, **cond)
        return self._consistent(x0, self._known(x0, rows))

    def moments(
        self, x_t: Tensor, t: Tensor | float, *, rows: Tensor | None = None, **cond: Any
    ) -> tuple[Tensor, Tensor]:
        """x0 (B, *S) made consistent and E[eps^2 | x_t] (B, *S) around it.

        Known pixels have no variance; nor has the mean over a square of n = factor^2 pixels, so that a pixel of
        variance C_i has the variance (1 - 2 / n) C_i + mean(C) / n where the pixels are independent.
        """
        x0, second = self.denoiser.moments(x_t, t, **cond)
        y = self._known(x0, rows)
        consistent = self._consistent(x0, y)
        before, after = (self._eps(x_t, t, x0.to(second)), self._eps(x_t, t, consistent.to(second)))
        variance = (second - before**2).clamp(min=0)
        if self.factor == 1:
            variance = torch.where(y.isnan().to(variance.device), variance, 0.0)
        else:
            n = self.factor**2
            variance = (1 - 2 / n) * variance + up(down(variance, self.factor), self.factor) / n
        return consistent, after**2 + variance

    def _eps(self, x_t: Tensor, t: Tensor | float, x0: Tensor) -> Tensor:
        """The noise in x_t for this x0."""
        schedule: Schedule = self.denoiser.schedule
        return (x_t.to(x0) - spread(schedule.alpha(t), x0) * x0) / spread(schedule.sigma(t), x0)

    def _known(self, x0: Tensor, rows: Tensor | None) -> Tensor:
        """y of the samples of x0."""
        if rows is not None:
            return self.y.to(x0)[rows.to(x0.device)]
        repeats, rest = divmod(len(x0), len(self.y))
        if rest or not repeats:
            raise HastenError(
                f"this sampler evaluates {len(x0)} of {len(self.y)} samples, and consistency cannot know which: "
                "use one that evaluates all"
            )
        return self.y.to(x0).repeat(repeats, *[1] * (x0.ndim - 1))

    def _consistent(self, x0: Tensor, y: Tensor) -> Tensor:
        """x0, made consistent with y."""
        return torch.where(y.isnan(), x0, y) if self.factor == 1 else x0 + up(y - down(x0, self.factor), self.factor)


def down(x: Tensor, factor: int) -> Tensor:
    """Means over squares: (B, C, H, W) -> (B, C, H / factor, W / factor)."""
    return F.avg_pool2d(x, factor)


def up(y: Tensor, factor: int) -> Tensor:
    """Each pixel repeated in a square: `down(up(y)) = y`, and `up(down(x))` is an orthogonal projection."""
    return y.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def contraction(schedule: Schedule, times: Tensor, variance: Tensor | float, sampler: str = "ddpm") -> Tensor:
    """The factor by which each step of a grid multiplies the difference of two trajectories with the same noise:
    (steps, *V).

    For Gaussian data of `variance` v (*V), from r = times[k] down to s = times[k + 1]:

        "ddpm"   a_{r|s} s_s^2 / s_r^2 + (a_s s_{r|s}^2 / s_r^2) g,     g = a_r v / (a_r^2 v + s_r^2)
        "ddim"   s_s / s_r + (a_s - a_r s_s / s_r) g

    with a_{r|s} = a_r / a_s, s_{r|s}^2 = s_r^2 - a_{r|s}^2 s_s^2; in the paper the first is at most lambda < 1.

    Args:
        schedule: of the denoiser.
        times: (steps + 1,), decreasing.
        variance: (*V), of the data.
        sampler: "ddpm" or "ddim".
    """
    check_choice("sampler", sampler, ("ddpm", "ddim"))
    v = torch.as_tensor(variance, dtype=torch.float64)
    a, s = (f(times).reshape(-1, *[1] * v.ndim) for f in (schedule.alpha, schedule.sigma))
    a_r, a_s, s_r, s_s = a[:-1], a[1:], s[:-1], s[1:]
    g = a_r * v / (a_r**2 * v + s_r**2)
    if sampler == "ddim":
        return s_s / s_r + (a_s - a_r * s_s / s_r) * g
    ratio = a_r / a_s
    return ratio * (s_s / s_r) ** 2 + a_s * (1 - (ratio * s_s / s_r) ** 2) * g


def remaining(schedule: Schedule, t: Tensor | float, variance: Tensor | float, sampler: str = "ddpm") -> Tensor:
    """The remaining fraction of an error in x_init after the reverse process from t, in the limit of many steps: (*V).

    alpha times the product of `contraction`: v / (v + q^2) for "ddpm", the weight of x_init in E[x | x_t];
    sqrt(v / (v + q^2)) for "ddim", the probability-flow ODE. q = sigma / alpha at t.

    Args:
        schedule: of the denoiser.
        t: the time.
        variance: (*V), of the data.
        sampler: "ddpm" or "ddim".
    """
    v = torch.as_tensor(variance, dtype=torch.float64)
    check_choice("sampler", sampler, ("ddpm", "ddim"))
    fraction = v / (v + schedule.q(t) ** 2)
    return fraction if sampler == "ddpm" else fraction.sqrt()


def smallest_time(
    schedule: Schedule, variance: Tensor | float, error: Tensor | float, fraction: float, sampler: str = "ddpm"
) -> float:
    """The smallest t0 from which the squared error of x_init falls to a fraction of itself: the paper's theorem 2,
    exact for Gaussian data.

        sum_j remaining_j(t0)^2 error_j = fraction sum_j error_j

    Args:
        schedule: of the denoiser.
        variance, error: (D,) of the data, and the mean square of x - x_init, along the same directions (principal ones
            of what consistency does not fix).
        fraction: in (0, 1): to make the error of x_init equal to another one that does not fall, that other one divided
            by the error of x_init.
        sampler: "ddpm" or "ddim".

    Returns:
        t0; the latest time of the schedule where no earlier one is enough.
    """
    if not 0 < fraction < 1:
        raise BadInput(f"smallest_time needs a fraction in (0, 1), found {fraction}")
    v, e = (torch.as_tensor(x, dtype=torch.float64) for x in (variance, error))
    if not bool((v > 0).all()) or bool((e < 0).any()) or not float(e.sum()) > 0:
        raise BadInput("smallest_time needs variance > 0 and error >= 0, not all 0")

    def error_left(t: float) -> float:
        left = remaining(schedule, t, v, sampler) ** 2
        return float((left * e).sum() / (torch.ones_like(left) * e).sum())

    low, high = 0.0, schedule.t_max
    if error_left(high) > fraction:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if error_left(middle) <= fraction else (middle, high)
    return high
