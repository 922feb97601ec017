"""The denoising student: the teacher's whole sampler as one evaluation of the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import BadInput, nearest
from ..predictions import Flow, spread
from ._pairs import Pairs
from ._task import Student, Task

__all__ = ["DenoisingStudent"]

LOSSES = ("l1", "l2")


@dataclass(frozen=True)
class DenoisingStudent:
    """A student G of one step that is drawn to where the teacher takes the same noise.

        L = E | G(z) - F(z) |   or its square,    G(z) = x0(z, t_max),   z ~ N(0, prior_std^2)

    F is a deterministic sampler, so this is plain regression on pairs (z, F(z)), which are made once and kept. The
    student is the teacher's network with its time held at t_max. One that says eps, which at t_max tells next to
    nothing about the image, is read as saying z - x instead, G(z) = z - net(z), which is the paper's own way.

    pairs: how many, of which `held` (a share) are kept out of training to measure the loss on. pair_steps, sampler,
        times: of the teacher (names; see `_pairs.make`). loss: "l1" or "l2", mean over pixels. lr: peak rate.

    Paper: 1,024,000 pairs of 100 DDIM steps, quadratic times; l1 on small images; Adam 2e-4, betas (.9, .98).
    Cost: 3 evaluations a step of training and image, and pair_steps a pair, twice that under guidance.

    Figures of the student: `loss` on pairs that it was trained on and `held_out` on those that it was not; where the
    second is much larger, more pairs are needed.

    Reference: Luhman, Luhman 2021, arXiv:2101.02388.
    """

    pairs: int = 16384
    pair_steps: int = 16
    sampler: str = "unipc"
    times: str = "angle"
    held: float = 0.03
    loss: str = "l1"
    lr: float = 3e-4
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise BadInput(f"denoising_student has no loss {self.loss!r}: {nearest(self.loss, LOSSES)}")
        if self.pairs < 2 or not 0 < self.held < 1:
            raise BadInput(f"denoising_student needs 2 pairs or more and held in (0, 1), got {self.pairs}, {self.held}")

    @property
    def teacher_steps(self) -> int | None:
        """It asks its teacher at the times of the pairs."""
        return self.pair_steps if (self.sampler, self.times) == ("ddim", "trailing") else None

    def distill(self, task: Task) -> Student:
        """Make the pairs, train the stage `student`."""
        pairs = task.pairs("teacher", self.pairs, steps=self.pair_steps, sampler=self.sampler, times=self.times)
        held = max(1, round(self.held * len(pairs)))
        seen, unseen = pairs.part(0, len(pairs) - held), pairs.part(len(pairs) - held)
        student = one_jump(task.student())

        def lesson(batch: dict[str, Tensor]) -> Tensor:
            return distance(generate(student, batch["noise"], **task.cond(batch)), batch["x"], self.loss)

        players = [task.player("student", student, lesson, self.lr, betas=(0.9, 0.98))]
        trained: Any = task.fit("student", players, batches=seen.batches(task.batch_size, task.seed))["student"]
        figures = {"pairs": len(pairs), "pair_steps": self.pair_steps}
        for name, part in (("loss", seen.part(0, min(held, len(seen)))), ("held_out", unseen)):
            figures[name] = self.measure(task, trained, part)
        made = Student(trained, "ddim", "trailing", 1, figures=figures)
        task.keep("student", made)
        return made

    @torch.no_grad()
    def measure(self, task: Task, student: Denoiser, pairs: Pairs, most: int = 1024) -> float:
        """The mean loss on at most `most` of the pairs."""
        device, total = next(student.parameters()).device, 0.0
        count = min(most, len(pairs))
        for first in range(0, count, 128):
            batch = {key: value.to(device) for key, value in pairs[first : min(first + 128, count)].items()}
            x = generate(student, batch["noise"], **task.cond(batch))
            total += float(distance(x, batch["x"], self.loss)) * len(x)
        return total / count


def one_jump(denoiser: Denoiser) -> Denoiser:
    """A denoiser that can be asked at t_max: the same, or the same network read as z - x where it says eps."""
    return denoiser.replace(prediction=Flow()) if denoiser.prediction.name == "eps" else denoiser


def generate(student: Any, noise: Tensor, **cond: Any) -> Tensor:
    """G(z) (B, *S) for standard normal `noise` (B, *S)."""
    t = torch.full((len(noise),), student.schedule.t_max, dtype=torch.float64, device=noise.device)
    return student(noise * spread(student.schedule.prior_std(t), noise), t, **cond)


def distance(x: Tensor, target: Tensor, loss: str) -> Tensor:
    """Mean of |x - target|, or of its square, a float32 scalar."""
    error = x.float() - target.float()
    return error.abs().mean() if loss == "l1" else error.square().mean()
