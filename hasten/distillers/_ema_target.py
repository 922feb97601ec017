"""Modules for a player whose loss needs more than its student: a count of the steps, a copy that follows slowly."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser


class Counted(nn.Module):
    """A student in training and the steps that its loss was asked for, kept as a buffer, so that a resume knows it.

    again: set by the loop where it asks for another part of the same step's batch.
    """

    count: Tensor
    again: bool = False

    def __init__(self, student: Denoiser) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self._read: tuple[Tensor, int, int] | None = None  # the buffer, its version, what it held

    def begun(self) -> int:
        """How many steps were made before this one; ask before `tick`. Reads the device only where others wrote."""
        read = self._read
        if read is None or read[0] is not self.count or read[1] != self.count._version:
            self._read = read = self.count, self.count._version, int(self.count)
        return read[2] - self.again

    def tick(self) -> int:
        """How many steps were made before this one; call it once a loss."""
        done = self.begun()
        self.count.fill_(done + 1)
        self._read = self.count, self.count._version, done + 1
        return done


class EMATarget(Counted):
    """A student in training and a copy that is an average of what the student was, frozen and in eval mode.

    `update` moves it, `copy <- (1 - a) copy + a student`, a = 1 - momentum or, corrected for the short past,
    a = (1 - momentum) / (1 - momentum^n) at the n-th step that was made, with which the first weights leave no trace.
    """

    def __init__(self, student: Denoiser) -> None:
        super().__init__(student)
        self.copy = copy.deepcopy(student).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, momentum: float, corrected: bool = True) -> int:
        """Call it first in a loss, where the student is as the last step left it; the steps made before this one."""
        n = self.tick()
        if n and not self.again:
            follow(self.copy, self.student, (1 - momentum) / (1 - momentum**n) if corrected else 1 - momentum)
        return n

    def train(self, mode: bool = True) -> EMATarget:
        """The copy stays in eval mode."""
        super().train(mode)
        self.copy.eval()
        return self


def follow(copied: nn.Module, student: nn.Module, share: float) -> None:
    """Move the parameters of `copied` by `share` of the way to the student's, at 1 exactly there; copy the buffers."""
    old, new = list(copied.parameters()), list(student.parameters())
    torch._foreach_lerp_(old, [p.detach() for p in new], share)
    for one, other in zip(copied.buffers(), student.buffers(), strict=True):
        one.copy_(other)
