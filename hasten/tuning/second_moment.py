"""Train the network that predicts the uncertainty of each pixel of a denoiser's output."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_numbers
from ..nets.second_moment import SecondMoment as Net
from ..predictions import spread
from ..times import MAX_Q
from ..utils.deprecation import renamed
from ..utils.devices import float64_device
from ..utils.random import global_seed, make_generator
from ._task import Tuned, Tuner, TuningTask
from .moments import unwrap_denoiser

FLOOR = (2 / 255) ** 2 / 12  # the variance within a grey level, a lower bound of the error


@dataclass(frozen=True)
class SecondMomentTuner(Tuner):
    """The part "second_moment" of the sampler `sn`: the variance C of each pixel given x_t, with the denoiser frozen.

    A convolutional network with inputs x_t, x0 and lam predicts g = C / q^2 (see `nets.second_moment`). It minimises
    the cost of a step to the level rho q in the bound, up to terms that do not depend on C,

        E [ ((x - x0)^2 + k) / (C + k) + log(C + k) ] / 2,     k = q^2 rho^2 / (1 - rho^2),   C = q^2 g,

    for real x, x_t = alpha x + sigma e, angles atan(q) stratified and rho from .05 to .7. The minimum is
    C = E[(x - x0)^2 | x_t]: for the exact denoiser that is q^2 (E[eps^2 | x_t] - eps^2), for another it includes its
    errors, as in the paper's NPR. Regression of e^2 itself, as in the paper's SN, has cancellation at high noise.

    Figures: `nats`, the loss per dimension on held-out images at rho = .4 (ten steps), and `nats_scalar`, that of the
    best single C for each of 16 bins of noise: the difference is the gain of a variance per pixel.

    Args:
        steps, batch, rate: of AdamW, with cosine decay.
        images: of the data; an eighth of them (at most 512) is held out.
        width, blocks, patch: of the network.
        minutes: training ends after this time at the latest (the rate then decays with time).

    Raises:
        BadInput: for options out of range.

    References:
        Bao, Li, Sun, Zhu, Zhang 2022, arXiv:2206.07309.
    """

    needs_data: ClassVar[bool] = True
    steps: int = 1000
    batch: int = 64
    rate: float = 3e-3
    images: int = 20_000
    width: int = 48
    blocks: int = 3
    patch: int = 2
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.rate > 0 or self.images < 32:
            raise BadInput(f"second_moment needs steps, batch >= 1, rate > 0 and images >= 32, found {self}")
        if self.minutes is not None and not self.minutes > 0:
            raise BadInput(f"second_moment: minutes must be more than 0, found {self.minutes}")
        check_numbers(self)

    def tune(self, task: TuningTask) -> Tuned:
        """Train the part "second_moment"; raises BadInput without images, or for sides that `patch` does not divide."""
        if task.images is None:
            raise BadInput("second_moment needs real images: name their folder with --data")
        if len(task.shape) != 3 or task.shape[1] % self.patch or task.shape[2] % self.patch:
            raise BadInput(f"second_moment needs images with sides divisible by {self.patch}, found shape {task.shape}")
        x, labels = task.images(max(task.n or self.images, 32))
        labels = None if task.labels(1) is None else labels
        held = min(512, len(x) // 8)
        with global_seed(task.seed):
            net = Net(task.shape[0], self.width, self.blocks, self.patch, float(x.std())).to(task.device)
        generator = make_generator(task.seed)
        optimiser = torch.optim.AdamW(net.parameters(), lr=self.rate, weight_decay=0.01)
        start, k = time.monotonic(), 0
        while k < self.steps:
            done = k / self.steps
            if self.minutes is not None:
                done = max(done, (time.monotonic() - start) / (60 * self.minutes))
                if done >= 1:
                    break
            for group in optimiser.param_groups:
                group["lr"] = self.rate * min((k + 1) / 50, 0.5 * (1 + math.cos(math.pi * done)))
            rows = torch.randint(len(x) - held, (self.batch,), generator=generator)
            g, q2, square = self._predict(task, net, x, labels, rows, generator)
            loss = nats(
                square, q2 * g, added_noise(q2, 0.05 + 0.65 * spread(torch.rand(len(rows), generator=generator), q2))
            )
            loss = loss.mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            torch.clear_autocast_cache()  # autocast would use the cached weights of the last step
            k += 1
            task.tick("second_moment", k, self.steps, float(loss.detach()))
        net.eval().requires_grad_(False)
        figures = {"steps": k, **self._held_out(task, net, x, labels, torch.arange(len(x) - held, len(x)))}
        return Tuned(parts={"second_moment": net}, figures=figures)

    def _predict(
        self,
        task: TuningTask,
        net: nn.Module,
        x: Tensor,
        labels: Tensor | None,
        rows: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """g, q^2 and (x - x0)^2 + FLOOR of these images with new noise, at stratified angles atan(q)."""
        schedule, count = task.schedule, len(rows)
        low = math.atan(float(schedule.q(schedule.t_min)))
        high = math.atan(min(float(schedule.q(schedule.t_max)), MAX_Q))
        fraction = (torch.randperm(count, generator=generator) + torch.rand(1, generator=generator).item()) / count
        lam = -torch.log(torch.tan(low + fraction.double() * (high - low)))
        clean, e = x[rows].cpu(), torch.randn(x[rows].shape, generator=generator)
        t = schedule.time(lam)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        z = (spread(alpha, clean) * clean + spread(sigma, clean) * e).to(task.device)
        cond = {} if labels is None else {"label": labels[rows].to(task.device)}
        with torch.no_grad():
            x0 = unwrap_denoiser(task.denoiser)(z, t.to(float64_device(task.device)), **cond)
        g = net(z * spread(1 / torch.hypot(alpha, sigma), z), x0, lam)
        square = (clean.to(task.device) - x0).square() + FLOOR
        return g, spread(torch.exp(-2 * lam), z), square

    @torch.no_grad()
    def _held_out(
        self, task: TuningTask, net: nn.Module, x: Tensor, labels: Tensor | None, rows: Tensor
    ) -> dict[str, float]:
        """The loss on held-out images, and that of the best single variance for each of 16 noise bins."""
        generator = make_generator(task.seed + 1)
        losses, squares, levels = [], [], []
        for batch in rows.repeat(2).split(64):
            g, q2, square = self._predict(task, net, x, labels, batch, generator)
            losses.append(nats(square, q2 * g, added_noise(q2, 0.4)).flatten(1).mean(1))
            squares.append(square.flatten(1).mean(1))
            levels.append(q2.flatten())
        level, order = torch.cat(levels), torch.cat(levels).argsort()
        bins = zip(torch.cat(squares)[order].tensor_split(16), level[order].tensor_split(16), strict=True)
        scalar = torch.cat([nats(part, part.mean() - FLOOR, added_noise(q2, 0.4)) for part, q2 in bins]).mean()
        return {"nats": float(torch.cat(losses).mean()), "nats_scalar": float(scalar)}


def added_noise(q2: Tensor, rho: Tensor | float) -> Tensor:
    """k of a step from q to rho q: the noise that the step adds."""
    return q2 * rho**2 / (1 - rho**2)


def nats(square: Tensor, C: Tensor, k: Tensor | float = 0.0) -> Tensor:
    """`((r^2 + k) / (C + k) + log(C + k)) / 2`, the Gaussian negative log likelihood of an error plus noise.

    Args:
        square: r^2 + FLOOR.
        C: the variance.
        k: the variance of the added noise.
    """
    return 0.5 * ((square + k) / (C + FLOOR + k) + torch.log(C + FLOOR + k))


__getattr__ = renamed(__name__, {"SecondMoment": "SecondMomentTuner"})
