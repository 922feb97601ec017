"""Train the network that estimates the noise level of a state."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BadInput, check_numbers
from ..nets.noise_level import NoiseLevelNet
from ..utils.devices import as_float64
from ..utils.random import global_seed, make_generator
from ._task import Tuned, Tuner, TuningTask

__all__ = ["NoiseLevel"]

LOWEST, HIGHEST = -4.6, 4.6  # of lam = log(abar / (1 - abar)) / 2: abar from 1e-4 to .9999


@dataclass(frozen=True)
class NoiseLevel(Tuner):
    """The part "noise_level" of a model, abar^ = P(z), for the sampler `noise_level`, by the loss

        E (log(1 - abar) - log(1 - P(z)))^2,    z = sqrt(abar) x + sqrt(1 - abar) e,    x an image of the data

    with a level for each image, uniform in lam = log(abar / (1 - abar)) / 2 from -4.6 to 4.6. It does not depend on the
    model or its schedule: the sampler passes states scaled to alpha^2 + sigma^2 = 1. Trained with AdamW and cosine
    decay; the weights are averaged.

    Figures, on held-out images: `loss`; `error_log_sigma2`, the root mean square error of log(1 - abar) where
    abar >= .5; `error_abar`, the root mean square error of abar.

    Args:
        minutes: training ends after this time or after `steps`, whichever comes first.
        steps: of training.
        images: how many of the data if the task has no `n`; the last tenth is held out.
        batch_size: images per step.
        lr: learning rate.
        width: of `NoiseLevelNet`.

    Raises:
        BadInput: for options out of range.

    References:
        San Roman, Nachmani, Wolf 2021, arXiv:2104.02600 (with another network).
    """

    needs_data: ClassVar[bool] = True
    minutes: float = 4.0
    steps: int = 6000
    images: int = 20_000
    batch_size: int = 128
    lr: float = 2e-3
    width: int = 16

    def __post_init__(self) -> None:
        if not self.minutes > 0 or self.steps < 1 or self.batch_size < 1 or not self.lr > 0 or self.width < 1:
            raise BadInput(f"noise_level needs minutes, steps, batch_size, lr and width above 0, found {self}")
        check_numbers(self)

    def tune(self, task: TuningTask) -> Tuned:
        """Train the part "noise_level".

        Raises:
            BadInput: without images, or for samples that are not images (C, H, W).
        """
        if task.images is None:
            raise BadInput("noise_level learns from images: give --data, a folder of them")
        if len(task.shape) != 3:
            raise BadInput(f"noise_level needs samples of shape (C, H, W), found {tuple(task.shape)}")
        x = task.images(task.n or self.images)[0].float().to(task.device)
        if len(x) < 10:
            raise BadInput(f"noise_level needs at least 10 images, found {len(x)}")
        x, held = x[: -max(len(x) // 10, 1)], x[-max(len(x) // 10, 1) :]
        with global_seed(task.seed):
            net = NoiseLevelNet(task.shape[0], self.width).to(task.device)
        net, steps = self._train(net, x, task)
        figures: dict[str, Any] = {
            "images": len(x),
            "steps": steps,
            "weights": sum(p.numel() for p in net.parameters()),
        }
        figures |= {key: float(f"{value:.4g}") for key, value in errors(net, held, task.seed).items()}
        return Tuned(parts={"noise_level": net.cpu().eval().requires_grad_(False)}, figures=figures)

    def _train(self, net: NoiseLevelNet, x: Tensor, task: TuningTask) -> tuple[NoiseLevelNet, int]:
        """Train; returns the averaged network and the number of steps."""
        averaged = copy.deepcopy(net)
        optimiser = torch.optim.AdamW(net.parameters(), self.lr, betas=(0.9, 0.99))
        generator, start, step, done = make_generator(task.seed), time.monotonic(), 0, 0.0
        while done < 1:
            rows = torch.randint(len(x), (self.batch_size,), generator=generator)
            z, lam = noisy(x[rows.to(x.device)], generator)
            loss = (log_sigma2(net, z) - F.logsigmoid(-2 * lam)).square().mean()
            warmup = min(1.0, (step + 1) / 100)
            optimiser.param_groups[0]["lr"] = self.lr * warmup * 0.5 * (1 + math.cos(math.pi * done))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            step += 1
            with torch.no_grad():
                for old, new in zip(averaged.parameters(), net.parameters()):
                    old.lerp_(new, 1 - min(1 - 1 / step, 0.995))
            done = min(max(step / self.steps, (time.monotonic() - start) / (60 * self.minutes)), 1.0)
            if step % 20 == 0 or done >= 1:
                task.tick("noise level", min(round(done * self.steps), self.steps), self.steps, float(loss.detach()))
        return averaged, step


def noisy(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy images z (B, C, H, W) of x at random levels, and these levels lam (B,), uniform; drawn on the CPU."""
    lam = LOWEST + (HIGHEST - LOWEST) * torch.rand(len(x), generator=generator)
    e = torch.randn(x.shape, generator=generator).to(x.device)
    lam = lam.to(x.device)
    alpha, sigma = (torch.sigmoid(sign * 2 * lam).sqrt()[:, None, None, None] for sign in (1, -1))
    return alpha * x + sigma * e, lam


def log_sigma2(net: NoiseLevelNet, z: Tensor) -> Tensor:
    """log(1 - P(z)), (B,)."""
    return F.logsigmoid(-net.logit(z))


@torch.no_grad()
def errors(net: NoiseLevelNet, x: Tensor, seed: int) -> dict[str, float]:
    """The figures of `NoiseLevel` on images x, with four levels per image."""
    generator = make_generator(seed + 1)
    predictions, targets = [], []
    for batch in x.repeat(4, 1, 1, 1).split(256):
        z, lam = noisy(batch, generator)
        predictions.append(log_sigma2(net, z))
        targets.append(F.logsigmoid(-2 * lam))
    predicted, true = as_float64(torch.cat(predictions)), as_float64(torch.cat(targets))
    squares, low_noise = (predicted - true).square(), true <= math.log(0.5)
    return {
        "loss": float(squares.mean()),
        "error_log_sigma2": float(squares[low_noise].mean().sqrt()),
        "error_abar": float((torch.exp(predicted) - torch.exp(true)).square().mean().sqrt()),
    }
