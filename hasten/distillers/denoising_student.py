"""The denoising student: the teacher's whole sampler as one model evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import BadInput, check_choice
from ..predictions import Flow, spread
from ._pairs import Pairs
from ._relations import relate, related
from ._targets import time_device
from ._task import Distiller, DistillTask, Student

__all__ = ["DenoisingStudent"]

LOSSES = ("l1", "l2")


@dataclass(frozen=True)
class DenoisingStudent(Distiller):
    """A student G of one step that is regressed on the teacher's samples of the same noise.

        L = E | G(z) - F(z) |   or its square,    G(z) = x0(z, t_max),   z ~ N(0, prior_std^2)

    F is a deterministic sampler, so this is plain regression on pairs (z, F(z)), which are generated once and stored.
    The student is the teacher's network with its time fixed at t_max. The output of an eps network, which at t_max
    tells next to nothing about the image, is read as z - x instead, G(z) = z - net(z), as in the paper.

    Paper: 1,024,000 pairs of 100 DDIM steps, quadratic times; l1 on small images; Adam 2e-4, betas (.9, .98).
    Cost: 3 model evaluations a training step and image, and pair_steps a pair, twice that under guidance.

    Figures of the student: `loss` on training pairs and `held_out` on held-out pairs; where the second is much larger,
    more pairs are needed.

    Args:
        pairs: number of pairs.
        pair_steps, sampler, times: of the teacher (names; see `make_pairs`).
        held: fraction of the pairs that is held out to measure the loss on, in (0, 1).
        loss: `"l1"` or `"l2"`, a mean over pixels.
        lr: peak learning rate.

    Raises:
        BadInput: for an unknown loss, fewer than 2 pairs, or `held` out of range.

    References:
        Luhman, Luhman 2021, arXiv:2101.02388.
    """

    pairs: int = 16384
    pair_steps: int = 16
    sampler: str = "unipc"
    times: str = "angle"
    held: float = 0.03
    loss: str = "l1"
    lr: float = 3e-4
    needs_data: ClassVar[bool] = False
    takes_structure: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("loss of denoising_student", self.loss, LOSSES)
        if self.pairs < 2 or not 0 < self.held < 1:
            raise BadInput(
                f"denoising_student needs at least 2 pairs and held in (0, 1), got {self.pairs}, {self.held}"
            )

    @property
    def teacher_steps(self) -> int | None:
        """The teacher is evaluated at the times of the pairs."""
        return self.pair_steps if (self.sampler, self.times) == ("ddim", "trailing") else None

    def distill(self, task: DistillTask) -> Student:
        """Generate the pairs and train the stage `student`."""
        pairs = task.pairs("teacher", self.pairs, steps=self.pair_steps, sampler=self.sampler, times=self.times)
        count = max(1, round(self.held * len(pairs)))
        training, held_out = pairs.subset(0, len(pairs) - count), pairs.subset(len(pairs) - count)
        student = one_step_student(task.student())

        def loss_fn(batch: dict[str, Tensor]) -> Tensor:
            x0 = generate(student, batch["noise"], **task.cond(batch))
            relate(task, batch, x0, x0, batch["x"])
            return regression_error(x0, batch["x"], self.loss)

        modules = related(task, [task.trained_module("student", student, loss_fn, self.lr, betas=(0.9, 0.98))])
        trained: Any = task.fit("student", modules, batches=training.batches(task.batch_size, task.seed))["student"]
        figures: dict[str, Any] = {"pairs": len(pairs), "pair_steps": self.pair_steps}
        figures["loss"] = self.mean_loss(task, trained, training.subset(0, min(count, len(training))))
        figures["held_out"] = self.mean_loss(task, trained, held_out)
        result = Student(trained, "ddim", "trailing", 1, figures=figures)
        task.save_student("student", result)
        return result

    @torch.no_grad()
    def mean_loss(self, task: DistillTask, student: Denoiser, pairs: Pairs, maximum: int = 1024) -> float:
        """The mean loss on at most `maximum` of the pairs."""
        device, total = next(student.parameters()).device, 0.0
        count = min(maximum, len(pairs))
        for first in range(0, count, 128):
            batch = {key: value.to(device) for key, value in pairs[first : min(first + 128, count)].items()}
            x = generate(student, batch["noise"], **task.cond(batch))
            total += float(regression_error(x, batch["x"], self.loss)) * len(x)
        return total / count


def one_step_student(denoiser: Denoiser) -> Denoiser:
    """A denoiser that can be evaluated at t_max: the same, or for an eps network one whose output is read as z - x."""
    return denoiser.replace(prediction=Flow()) if denoiser.prediction.name == "eps" else denoiser


def generate(student: Any, noise: Tensor, **cond: Any) -> Tensor:
    """G(z) (B, *S) for standard normal `noise` (B, *S)."""
    t = torch.full((len(noise),), student.schedule.t_max, dtype=torch.float64, device=time_device(noise))
    return student(noise * spread(student.schedule.prior_std(t), noise), t, **cond)


def regression_error(x: Tensor, target: Tensor, loss: str) -> Tensor:
    """Mean of |x - target|, or of its square, a float32 scalar."""
    error = x.float() - target.float()
    return error.abs().mean() if loss == "l1" else error.square().mean()
