"""Modules for losses that need more than the student: a step counter, and an EMA target network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..train.ema import copy_for_average, update_ema


class StepCounter(nn.Module):
    """A student in training and the number of times that its loss was computed, in a buffer, so that a resume knows it.

    Args:
        student: in training.

    Attributes:
        again: set by the training loop where it computes the loss of a further part of the same step's batch.
    """

    count: Tensor
    again: bool = False

    def __init__(self, student: Denoiser) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self._cached: tuple[Tensor, int, int] | None = None  # the buffer, its version, its value

    def completed_steps(self) -> int:
        """The number of steps before this one; to be called before `advance`.

        The device is read only where others wrote the buffer.
        """
        cached = self._cached
        if cached is None or cached[0] is not self.count or cached[1] != self.count._version:
            self._cached = cached = self.count, self.count._version, int(self.count)
        return cached[2] - self.again

    def advance(self) -> int:
        """Count a step and return the number of steps before it; to be called once a loss."""
        done = self.completed_steps()
        self.count.fill_(done + 1)
        self._cached = self.count, self.count._version, done + 1
        return done


class EMATarget(StepCounter):
    """A student in training and an exponential moving average of it, frozen and in eval mode: the EMA target.

    `update` moves it, `copy <- (1 - a) copy + a student`, with a = 1 - momentum or, bias-corrected,
    a = (1 - momentum) / (1 - momentum^n) at step n, with which the initial weights have no influence.

    Args:
        student: in training.
    """

    def __init__(self, student: Denoiser) -> None:
        super().__init__(student)
        self.copy = copy_for_average(student)

    @torch.no_grad()
    def update(self, momentum: float, corrected: bool = True) -> int:
        """Update the average; to be called first in a loss, where the student is as the last step left it.

        Args:
            momentum: of the average, in [0, 1).
            corrected: correct the bias towards the initial weights.

        Returns:
            The number of steps before this one.
        """
        n = self.advance()
        if n and not self.again:
            ema_update(self.copy, self.student, (1 - momentum) / (1 - momentum**n) if corrected else 1 - momentum)
        return n

    def train(self, mode: bool = True) -> EMATarget:
        """Set the student's mode; the average stays in eval mode."""
        super().train(mode)
        self.copy.eval()
        return self


def ema_update(average: nn.Module, student: nn.Module, fraction: float) -> None:
    """Move the parameters of `average` by a fraction of the way to the student's (1: all of it); copy the buffers."""
    update_ema(average, student, 1 - fraction)
