"""Train the network that takes the first step from pure noise."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_numbers
from ..nets.first_step import FirstStepNet
from ..utils.devices import as_float64, float64_device
from ..utils.random import global_seed, make_generator
from ._task import Tuned, Tuner, TuningTask

__all__ = ["FirstStep"]


@dataclass(frozen=True)
class FirstStep(Tuner):
    """The part "first_step" of a model, x1(z, c), for the start `singdiffusion`, by the loss

        E || x - x1(e, c) ||^2,   e ~ N(0, I) independent of the image x of class c

    which is the usual loss at alpha = 0. Its minimum is E[x | c], independent of e. For classes that is a table of
    means, computed exactly in one pass over the images; the row of "no class" is the mean of all. With `widths` the
    paper's network, a U-Net without time, is added and trained with AdamW; its weights are averaged.

    `task.n` images are used, by default 10,000; the last tenth is held out. Without labels every class gets the mean of
    all. Figures: the held-out loss per dimension of the table and of the network, and `distance`, the root mean square
    of x1 minus the means of the held-out classes.

    Args:
        widths, blocks, patch: of the U-Net (`UNet`); () for the table alone.
        table: False leaves the table at zero, so that the U-Net learns everything, as in the paper.
        minutes: training ends after this time or after `steps`, whichever comes first.
        steps: of training.
        batch_size: images per step.
        lr: learning rate, with cosine decay.
        label_drop: fraction of labels replaced by "no class" in training, in [0, 1].

    Raises:
        BadInput: for options out of range.

    References:
        Zhang, Yin, Li, Xie 2024, arXiv:2403.08381.
    """

    widths: tuple[int, ...] = ()
    blocks: int = 1
    patch: int = 2
    table: bool = True
    minutes: float = 2.0
    steps: int = 2000
    batch_size: int = 128
    lr: float = 1e-3
    label_drop: float = 0.1
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.minutes > 0 or self.steps < 1 or self.batch_size < 1 or not self.lr > 0:
            raise BadInput("first_step needs minutes, steps, batch_size and lr above 0")
        if not 0 <= self.label_drop <= 1:
            raise BadInput(f"first_step: label_drop must be in [0, 1], found {self.label_drop}")
        if not self.table and not self.widths:
            raise BadInput("first_step without a table needs widths, such as widths=(32,64)")
        check_numbers(self)

    def tune(self, task: TuningTask) -> Tuned:
        """Train the part "first_step".

        Raises:
            BadInput: without images, or for images that the U-Net does not take.
        """
        if task.images is None:
            raise BadInput("first_step learns from images: give --data, a folder of them")
        x, label = task.images(task.n or 10_000)
        if len(x) < 10:
            raise BadInput(f"first_step needs at least 10 images, found {len(x)}")
        classes = task.classes
        labelled = classes and label is not None
        label = label.cpu() if labelled and label is not None else torch.full((len(x),), classes, dtype=torch.long)
        x, held = x.float().cpu(), max(len(x) // 10, 1)
        try:
            with global_seed(task.seed):
                net = FirstStepNet(task.shape, classes, self.widths, self.blocks, self.patch if self.widths else 1)
        except ValueError as e:
            raise BadInput(f"first_step: {e}") from e
        means = class_means(x[:-held], label[:-held], classes)
        if self.table:
            net.mean.data.copy_(means)
        table = FirstStepNet(task.shape, classes)
        table.mean.data.copy_(means)
        figures: dict[str, Any] = {"images": len(x) - held, "loss_table": loss_on(table, x[-held:], label[-held:])}
        if self.widths:
            net, figures["steps"] = self._train(net, x[:-held], label[:-held], task)
            figures["loss"] = loss_on(net, x[-held:], label[-held:])
            figures["distance"] = distance_to_means(net, class_means(x[-held:], label[-held:], classes))
        figures["distance_table"] = distance_to_means(table, class_means(x[-held:], label[-held:], classes))
        return Tuned(parts={"first_step": net.eval().requires_grad_(False)}, figures=figures)

    def _train(self, net: FirstStepNet, x: Tensor, label: Tensor, task: TuningTask) -> tuple[FirstStepNet, int]:
        """Train; returns the averaged network and the number of steps."""
        device = task.device
        net, x, label = net.to(device).train(), x.to(device), label.to(device)
        averaged = copy.deepcopy(net)
        optimiser = torch.optim.AdamW(net.parameters(), self.lr, betas=(0.9, 0.99))
        generator, start, step, done = make_generator(task.seed), time.monotonic(), 0, 0.0
        while done < 1:
            rows = torch.randint(len(x), (self.batch_size,), generator=generator).to(device)
            noise = torch.randn(self.batch_size, *task.shape, generator=generator).to(device)
            dropped = (torch.rand(self.batch_size, generator=generator) < self.label_drop).to(device)
            loss = (net(noise, torch.where(dropped, net.classes, label[rows])) - x[rows]).square().mean()
            optimiser.param_groups[0]["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * done))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            step += 1
            decay = min(1 - 1 / step, 0.99)
            with torch.no_grad():
                for old, new in zip(averaged.parameters(), net.parameters()):
                    old.lerp_(new, 1 - decay)
            done = min(max(step / self.steps, (time.monotonic() - start) / (60 * self.minutes)), 1.0)
            if step % 20 == 0 or done >= 1:
                task.tick("first step", min(round(done * self.steps), self.steps), self.steps, float(loss.detach()))
        return averaged.cpu(), step


def class_means(x: Tensor, label: Tensor, classes: int) -> Tensor:
    """The mean of each class and, last, of all images: (classes + 1, *S), in the dtype of x (n, *S).

    A class without images gets the mean of all.
    """
    exact, label = as_float64(x), label.to(float64_device(x.device))
    total = exact.mean(0)
    rows = [exact[label == c].mean(0) if bool((label == c).any()) else total for c in range(classes)]
    return torch.stack([*rows, total]).to(x.dtype).to(x.device)


@torch.no_grad()
def loss_on(net: FirstStepNet, x: Tensor, label: Tensor, seed: int = 0) -> float:
    """The mean over images and dimensions of (x - x1(e, c))^2, with one noise per image, drawn with `seed`."""
    generator, total = make_generator(seed), 0.0
    net = net.eval()
    for first in range(0, len(x), 256):
        batch = x[first : first + 256]
        noise = torch.randn(batch.shape, generator=generator)
        total += float((net(noise, label[first : first + 256]) - batch).square().sum())
    return total / x.numel()


@torch.no_grad()
def distance_to_means(net: nn.Module, means: Tensor, draws: int = 16, seed: int = 0) -> float:
    """Root mean square of x1(e, c) minus the mean of class c, over `draws` noises, all classes and "no class"."""
    generator = make_generator(seed)
    label = torch.arange(len(means)).repeat_interleave(draws)
    noise = torch.randn(len(label), *means.shape[1:], generator=generator)
    return float((net(noise, label) - means[label]).square().mean().sqrt())
