"""Train Improved DDPM: learned variances."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import BadInput, check_choices, check_numbers
from ..likelihood import AncestralBound, gaussian_bin_log_probability
from ..likelihood._base import level_indices
from ..likelihood._learned_variance import x0_and_variance
from ..model.model import Model
from ..nets.variance_unet import VarianceUNet
from ..predictions import prediction_from, spread
from ..schedules.discrete import Discrete
from ..train.losses import DenoisingLoss, stratified
from ..train.sources import Data
from ..train.trained_module import TrainedModule
from ._base import MakeUNet, TrainProcess, TrainSettings

HISTORY = 10  # values of the loss at each time that importance sampling keeps
UNIFORM = 0.001  # share of uniform times in it


@dataclass(frozen=True)
class ImprovedDDPM(TrainProcess):
    """A network that also predicts the variance of each reverse step, on the cosine table, for few steps and lower
    bits/dim: `L = ||raw - target||^2 + .001 L_vlb`, where L_vlb trains the variance alone.

    The model samples with `ddpm:variance=learned`.

    Args:
        loss: "hybrid"; or "vlb", the bound alone, with times drawn in proportion to the root mean square of their last
            ten losses: for bits/dim, not for images.
        timesteps: entries N of the table; the paper has 4000.
        prediction: "v", or "eps" as in the paper: at the last entries of this table, alpha = 5e-5, samplers that do not
            clip x0 need v.
        levels: K, the number of values of a pixel.

    References:
        Nichol, Dhariwal 2021, arXiv:2102.09672.
    """

    loss: str = "hybrid"
    timesteps: int = 1000
    prediction: str = "v"
    levels: int = 256

    def __post_init__(self) -> None:
        check_choices(self, loss=("hybrid", "vlb"), prediction=("v", "eps"))
        if self.timesteps < 2 or self.levels < 2:
            raise BadInput(f"improved_ddpm needs timesteps and levels of at least 2, found {self}")
        check_numbers(self)

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        net: Any = VarianceUNet(**unet().config)  # type: ignore[arg-type]
        if self.loss == "vlb":
            net = WithHistory(net, self.timesteps)
        return Denoiser(net, cosine_table(self.timesteps), prediction_from(self.prediction))

    def modules(self, denoiser: Denoiser, data: Data, settings: TrainSettings) -> list[TrainedModule]:
        loss = VarianceLoss(self.loss, self.levels, settings.label_drop)
        return [
            TrainedModule(
                "model", denoiser, lambda batch: loss(denoiser, batch), lr=settings.lr, optimiser=settings.optimizer
            )
        ]

    def finish(self, averaged: Mapping[str, nn.Module], model: Model) -> Model:
        net: Any = model.denoiser.net
        denoiser = model.denoiser.replace(net=net.net) if isinstance(net, WithHistory) else model.denoiser
        card = {**model.card, "levels": self.levels}
        return replace(model, denoiser=denoiser, card=card, sampler="ddpm:variance=learned", times="uniform", steps=50)


@dataclass(frozen=True)
class VarianceLoss:
    """`L_simple + .001 L_vlb`, L_vlb in bits/dim with its gradient stopped at the mean; or L_vlb alone.

    Args:
        kind: "hybrid" or "vlb".
        levels: K of the data.
        label_drop: probability that the label of a sample is dropped.
        share: of L_vlb in the hybrid loss.
    """

    kind: str = "hybrid"
    levels: int = 256
    label_drop: float = 0.0
    share: float = 1e-3

    def __call__(self, denoiser: Denoiser, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch `x` (B, C, H, W) in [-1, 1], a scalar."""
        schedule: Any = denoiser.schedule
        x, N = batch["x"].float(), len(schedule.alphas_cumprod)
        cond = DenoisingLoss(label_drop=self.label_drop).drop(batch, denoiser.null_label)
        history: Any = denoiser.net if isinstance(denoiser.net, WithHistory) else None
        u = stratified(len(x))
        i, weight = (u * N).floor() + 1, torch.ones_like(u)
        if history is not None:
            i, weight = history.draw(u)
        eps = torch.randn_like(x)
        t = i / N
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x_t = spread(alpha, x) * x + spread(sigma, x) * eps
        x0, v = x0_and_variance(denoiser, x_t, t, **cond)
        if self.kind == "hybrid":
            # the raw output again, from x0: the target's error is that of x0 over c_out
            _, _, c_out = denoiser.prediction.coefficients(alpha, sigma)
            simple = ((x0.float() - x) / spread(c_out, x)).square().flatten(1).mean(1)
            return (simple + self.share * N * self.bound(schedule, x, x0.detach().float(), v, i)).mean()
        terms = N * self.bound(schedule, x, x0.float(), v, i)
        history.update(i, terms.detach())
        return (weight.to(terms) * terms).mean()

    def bound(self, schedule: Discrete, x: Tensor, x0: Tensor, v: Tensor, i: Tensor) -> Tensor:
        """The term of the bound at each step i (B,), in bits/dim, (B,)."""
        method = AncestralBound(steps=len(schedule.alphas_cumprod), variance="learned")
        kl = method.kl(schedule, x, x0, v, i.clamp(min=2), 1.0)
        first = (i == 1).to(x.device)
        if bool(first.any()):
            rows = first.nonzero()[:, 0]
            log_v = method.log_variance(schedule, v[rows], torch.ones(len(rows), dtype=torch.float64), 1.0)
            k = level_indices(x[rows], self.levels)
            log_p = gaussian_bin_log_probability(x0[rows], torch.exp(0.5 * log_v).double(), k, self.levels)
            kl = kl.index_put((rows,), -log_p.to(kl))
        return kl.flatten(1).mean(1) / math.log(2)


class WithHistory(nn.Module):
    """A network with the last losses at each of N times, from which times are drawn by importance.

    On several processes each keeps the losses of its own part of the batches.

    Args:
        net: the network.
        timesteps: N.
    """

    history: Tensor
    counts: Tensor

    def __init__(self, net: VarianceUNet, timesteps: int) -> None:
        super().__init__()
        self.net, self.config = net, net.config
        self.classes, self.null_label, self.multiple = net.classes, net.null_label, net.multiple
        self.register_buffer("history", torch.zeros(timesteps, HISTORY))
        self.register_buffer("counts", torch.zeros(timesteps))

    def with_learned_variance(self, *inputs: Any, **cond: Any) -> tuple[Tensor, Tensor]:
        """Those of the network."""
        return self.net.with_learned_variance(*inputs, **cond)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """The raw output of the network."""
        result: Tensor = self.net(x, time, label)
        return result

    def probabilities(self) -> Tensor:
        """p_i ~ sqrt(E L_i^2) with a share of uniform ones; uniform until every time has its values; (N,) float64."""
        N = len(self.counts)
        if bool((self.counts < HISTORY).any()):
            return torch.full((N,), 1 / N, dtype=torch.float64)
        p = self.history.double().cpu().square().mean(1).sqrt()
        return (1 - UNIFORM) * p / p.sum() + UNIFORM / N

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Times i (B,) from 1 to N of the quantiles `u` (B,) in [0, 1), and their weights 1 / (N p_i)."""
        p = self.probabilities()
        i = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1)
        return (i + 1).double(), 1 / (len(p) * p[i])

    @torch.no_grad()
    def update(self, i: Tensor, losses: Tensor) -> None:
        """Keep the losses (B,) at the times i (B,), in place of the oldest ones."""
        for row, loss in zip((i.long() - 1).tolist(), losses.to(self.history)):
            self.history[row] = torch.cat([self.history[row, 1:], loss[None]])
            self.counts[row] += 1


def cosine_table(timesteps: int) -> Discrete:
    """`alpha^2 = f(t) / f(0)`, `f = cos^2((t + .008) / 1.008 pi / 2)`, with beta at most .999, in `timesteps` steps."""
    f = torch.cos((torch.arange(timesteps + 1, dtype=torch.float64) / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
    return Discrete.from_betas((1 - f[1:] / f[:-1]).clamp(max=0.999))
