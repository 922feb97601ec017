"""Encoder distillation: a student that inverts the sampler, from the image to its noise, in a few large steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import BadInput
from ..inversion import EpsFn, increasing_times, invert_along, make_eps_fn, teacher_eps_fn
from ._encoding import upward_loss
from ._targets import DeviceTimes, noised
from ._task import Distiller, DistillTask, Loss, Student
from .progressive import check_nested_steps

__all__ = ["Encoder"]


@dataclass(frozen=True)
class Encoder(Distiller):
    """A student of N inversion steps, t to t + 1/N for t = 0 .. (N-1)/N, that lands where N m DDIM inversion steps do.

    From z_t = alpha_t x + sigma_t eps the teacher takes m steps of DDIM up to t + 1/N, and the student is trained
    towards the noise e* whose single step lands there (`distillers._encoding`); then it is the teacher of the next
    stage. Its target is written in the network's output (v, as a rule), which is finite at t = 0 as well, where x0 is
    not. With a student for sampling of the same or of another class it restyles images: `hasten.tasks.style_transfer`.

    A saved encoder is a model like any other, but its steps go from data to noise: it encodes (`hasten restyle`) and
    cannot generate images. The figure `direction: encode` marks it.

    Paper: 16 steps. Cost: m + 3 model evaluations a training step and image; 2 m + 3 in the first stage where its
    teacher is guided by two evaluations.

    Args:
        steps: of the students, decreasing, each a divisor of the one before.
        start: steps of the teacher itself, a multiple of the first (0: twice as many).
        guidance: the scales (low, high) that the students take as an input, uniform in training; None: those that the
            teacher's network takes, or else the one scale of the run is built in.
        lr: peak learning rate of each stage, with a new optimizer.
        weight: of the squared error, see `_targets.prediction_loss`.

    Raises:
        BadInput: for steps that do not nest, and a `guidance` that is no range.

    References:
        Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans 2023, arXiv:2210.03142, on encoders and style transfer.
    """

    steps: tuple[int, ...] = (32, 16)
    start: int = 0
    guidance: tuple[float, float] | None = None
    lr: float = 3e-4
    weight: str = "auto"
    needs_data: ClassVar[bool] = True
    adds_inputs: ClassVar[bool] = True  # the scale, and it draws no images
    direction: ClassVar[str] = "encode"

    def __post_init__(self) -> None:
        check_nested_steps("encoder", self.steps, self.start)
        if self.guidance is not None and not (len(self.guidance) == 2 and self.guidance[0] < self.guidance[1]):
            raise BadInput(f"encoder needs guidance = (low, high) with low < high, got {self.guidance}")

    @property
    def teacher_steps(self) -> int:
        """The teacher is evaluated at the nodes of its own steps alone."""
        return self.start or 2 * self.steps[0]

    def distill(self, task: DistillTask) -> Student:
        """Train the stages `encode32`, `encode16`, ... and return the last student. BadInput for an x0 network."""
        source, teacher_steps, span = task.initial, self.teacher_steps, self.span(task.denoiser)
        increasing_times(task.denoiser, teacher_steps)
        changes = {"guidance": span} if span and not source.net_takes_guidance else {}
        teacher: Denoiser | None = None
        for n in self.steps:
            student = task.student(source, **changes)
            modules = [
                task.trained_module(
                    "student", student, self.loss_fn(task, teacher, student, n, teacher_steps // n), self.lr
                )
            ]
            trained: Any = task.fit(f"encode{n}", modules)["student"]
            teacher = source = trained
            result = Student(source, "ddim", "trailing", n, span, figures={"direction": "encode"})
            task.save_student(f"encode{n}", result)
            teacher_steps, changes = n, {}
        return result

    def span(self, denoiser: Denoiser) -> tuple[float, float] | None:
        """The range of scales that the students take as an input. BadInput where it exceeds the teacher's own."""
        own = denoiser.guidance_range  # two equal numbers for a student with one scale built in
        if self.guidance is None or own is None:
            return self.guidance or (own if denoiser.net_takes_guidance else None)
        if not own[0] <= self.guidance[0] < self.guidance[1] <= own[1]:
            raise BadInput(f"encoder: the teacher takes guidance scales {own[0]:g} to {own[1]:g}, got {self.guidance}")
        return self.guidance

    def loss_fn(self, task: DistillTask, teacher: Denoiser | None, student: Denoiser, n: int, m: int) -> Loss:
        """The loss of the student of n steps whose teacher takes m for each; teacher None: the task's own."""
        grid, span = DeviceTimes(increasing_times(task.denoiser, n * m)), self.span(task.denoiser)
        teacher_eps: EpsFn = (
            make_eps_fn(teacher)
            if teacher is not None
            else (teacher_eps_fn(task.teacher, task.denoiser, task.guidance_scale))
        )

        def loss_fn(batch: dict[str, Tensor]) -> Tensor:
            x, cond, noise_of, inputs = batch["x"], task.cond(batch), teacher_eps, {}
            if span is not None:
                scale = span[0] + (span[1] - span[0]) * torch.rand(len(x), device=x.device)
                noise_of, inputs = make_eps_fn(teacher or task.denoiser, scale), {"guidance": scale}
            nodes = grid.at(x)
            i = m * torch.randint(0, n, (len(x),), device=nodes.device)
            times = [nodes[i + k] for k in range(m + 1)]
            z = noised(task.schedule, x, times[0])
            with torch.no_grad():
                _, target = invert_along(noise_of, task.schedule, z, times, **cond)
            return upward_loss(student, z, times[0], target, self.weight, **cond, **inputs)

        return loss_fn
