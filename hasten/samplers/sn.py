"""SN-DPM: the best variance of every step for each coordinate of each sample, from the second moment of the noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Wrapper
from ..errors import BadInput, check_choices, check_numbers
from ..predictions import precise, spread
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ..utils.devices import as_float64
from ._exponential import Node, make_node, make_nodes
from .analytic import FAR, output_bound, weights


@dataclass(frozen=True)
class SNDPM(SamplerBase):
    """SN-DPM: Analytic-DPM with a variance for each coordinate, learned as the second moment of the noise.

        z_s = alpha_s x0 + sqrt(sigma_s^2 - L) eps + sqrt(V) xi,
        V = L + (alpha_s - alpha_r sqrt(sigma_s^2 - L) / sigma_r)^2 C,
        C = (sigma_r^2 / alpha_r^2) (E[eps^2 | z_r] - eps(z_r)^2)    elementwise,

    It needs the pair (x0, E[eps^2 | z]), which `wrap` adds to the denoiser by the network "second_moment"; a denoiser
    with its own method `moments` is used as it is. From pure noise, where the second moment carries no information, it
    is evaluated at q = 1000 instead. On a Gaussian with independent coordinates, whatever their variances, the
    distribution of every z_s is exact at any number of steps. Order 1 in law; NFE = steps.

    Args:
        form: "ddpm" or "ddim", which sets L as in `AnalyticDPM`.
        half_range, pixels: bounds of C and V, as in `AnalyticDPM`.
        net: the network "second_moment", set by `bind`.

    References:
        Bao, Li, Sun, Zhu, Zhang 2022, arXiv:2206.07309.
    """

    form: str = "ddpm"
    half_range: float = 1.0
    pixels: float | None = None
    net: nn.Module | None = field(default=None, repr=False, metadata={"bound": True})
    linear: ClassVar[bool] = False
    why: ClassVar[str] = "its variance depends on the sample"
    order: ClassVar[int] = 1
    needs: ClassVar[str] = "second_moment"

    def __post_init__(self) -> None:
        check_choices(self, form=("ddpm", "ddim"))
        if not self.half_range > 0 or (self.pixels is not None and not self.pixels >= 0):
            raise BadInput(f"SNDPM needs half_range > 0 and pixels >= 0, found {self.half_range}, {self.pixels}")
        check_numbers(self)

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def bind(self, statistics: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> SNDPM:
        """The sampler with the model's network of second moments.

        Raises:
            BadInput: where none was trained.
        """
        if self.net is not None:
            return self
        if "second_moment" not in parts:
            raise BadInput(
                "sn needs the model's network of second moments: "
                "run hasten tune MODEL --method second_moment --data IMAGES"
            )
        return replace(self, net=parts["second_moment"])

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """The denoiser with a method `moments`."""
        if callable(getattr(denoiser, "moments", None)):
            return denoiser
        if self.net is None:
            raise BadInput("sn needs a denoiser with second moments: bind it to a model that has them")
        return WithMoments(denoiser, self.net)

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        path, z = make_nodes(schedule, times), x
        for k, (r, s) in enumerate(zip(path, path[1:], strict=False)):
            at = make_node(schedule, schedule.time(-math.log(FAR))) if r.pure and not s.clean else r
            if s.clean:
                z = s.alpha * (yield Query(z, r.t))
                continue
            x0, m2 = yield Query(z, at.t, moments=True)
            scale, gain, L = weights(r, s, self.form)
            V = L + gain**2 * self.variance(at, z, x0, m2)
            if k + 2 < len(path) and path[k + 2].clean:
                V = output_bound(V, s, self.form, self.pixels)
            z = scale * z + gain * x0 + torch.sqrt(V).to(z.dtype) * noise()
        return z

    def variance(self, r: Node, z: Tensor, x0: Tensor, m2: Tensor) -> Tensor:
        """C of each coordinate, (B, *S) float64, within its bounds."""
        eps = (precise(z) - r.alpha * precise(x0)) / r.sigma
        return (r.q**2 * (precise(m2) - eps**2).clamp(0, 1)).clamp(max=self.half_range**2)


class WithMoments(Wrapper):
    """A denoiser with E[eps^2 | x_t], by a network that predicts g = (variance of x given x_t) / q^2.

    Args:
        denoiser: the inner one.
        net: `net(x (B, *S), x0 (B, *S), lam (B,)) -> g (B, *S)`.
    """

    def __init__(self, denoiser: nn.Module, net: nn.Module) -> None:
        super().__init__(denoiser)
        self.net = net

    def moments(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> tuple[Tensor, Tensor]:
        """(x0 (B, *S), E[eps^2 | x_t] (B, *S) float64), the second as eps^2 + g."""
        x0 = self.denoiser(x_t, t, **cond)
        t = as_float64(torch.as_tensor(t))
        schedule: Schedule = self.denoiser.schedule
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        scaled = x_t.float() * spread(1 / torch.hypot(alpha, sigma), x_t.float())
        lam = schedule.lam(t)
        if lam.ndim == 0 and lam.device.type == "cpu":  # filled in where it is needed, not copied there
            lam = torch.full((len(x_t),), float(lam), device=x_t.device)
        g = self.net(scaled, x0.float(), lam.expand(len(x_t)))
        wide = precise(x_t)
        eps = (wide - spread(alpha, wide) * precise(x0)) / spread(sigma, wide)
        return x0, eps**2 + precise(g)
