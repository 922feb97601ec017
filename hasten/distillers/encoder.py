"""Encoder distillation: a student that runs the sampler backwards, from the image to its noise, in a few jumps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import BadInput
from ..inversion import EpsFn, increasing_times, invert_along, make_eps_fn, teacher_eps_fn
from ._encoding import upward_loss
from ._targets import Nodes, noised
from ._task import Student, Task
from .progressive import check

__all__ = ["Encoder"]


@dataclass(frozen=True)
class Encoder:
    """A student of N jumps upwards, t to t + 1/N for t = 0 .. (N-1)/N, that lands where N m steps of DDIM upwards land.

    From z_t = alpha_t x + sigma_t eps the teacher makes m steps of DDIM up to t + 1/N, and the student is drawn to the
    noise e* whose single step lands there (`distillers._upward`); then it is the teacher of the next stage. Its target
    is written in what its network says (v, as a rule), which is finite at t = 0 as well, where x0 is not. With a
    student for sampling of the same or of another class it restyles images: `hasten.tasks.style_transfer`.

    What is saved is a model like any other, but its jumps go up: it encodes (`hasten restyle`) and cannot draw images.
    The figure `direction: encode` says so.

    steps: of the students, falling, each a divisor of the one before. start: steps of the teacher itself, a multiple
        of the first (0: twice as many). guidance: the scales (low, high) that the students take as an input, drawn
        evenly in training; None: those that the teacher's network takes, or else the one scale of the run is built in.
    lr: peak rate of each stage, whose optimiser starts afresh. weight: of the squared error, see `_targets.loss`.

    Paper: 16 jumps. Cost: m + 3 evaluations a step of training and image; 2 m + 3 in the first stage where its teacher
    is guided by two.

    Reference: Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans 2023, arXiv:2210.03142, on encoders and style transfer.
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
        check("encoder", self.steps, self.start)
        if self.guidance is not None and not (len(self.guidance) == 2 and self.guidance[0] < self.guidance[1]):
            raise BadInput(f"encoder needs guidance = (low, high) with low < high, found {self.guidance}")

    @property
    def teacher_steps(self) -> int:
        """It asks its teacher at the nodes of the teacher's own steps alone."""
        return self.start or 2 * self.steps[0]

    def distill(self, task: Task) -> Student:
        """Train the stages `encode32`, `encode16`, ...; the last student. BadInput for a network that predicts x0."""
        source, many, span = task.initial, self.start or 2 * self.steps[0], self.span(task.denoiser)
        increasing_times(task.denoiser, many)
        changes = {"guidance": span} if span and not source.net_takes_guidance else {}
        teacher: Denoiser | None = None
        for n in self.steps:
            student = task.student(source, **changes)
            players = [task.player("student", student, self.lesson(task, teacher, student, n, many // n), self.lr)]
            teacher = source = task.fit(f"encode{n}", players)["student"]  # type: ignore[assignment]
            made = Student(source, "ddim", "trailing", n, span, figures={"direction": "encode"})
            task.keep(f"encode{n}", made)
            many, changes = n, {}
        return made

    def span(self, denoiser: Denoiser) -> tuple[float, float] | None:
        """The range of scales that the students take as an input. BadInput for more than the teacher's own."""
        own = denoiser.guidance_range  # of a student, which may have one scale built in
        if self.guidance is None or own is None:
            return self.guidance or (own if denoiser.net_takes_guidance else None)
        if not own[0] <= self.guidance[0] < self.guidance[1] <= own[1]:
            raise BadInput(
                f"encoder: the teacher gives guidance scales {own[0]:g} to {own[1]:g}, asked for {self.guidance}"
            )
        return self.guidance

    def lesson(self, task: Task, teacher: Denoiser | None, student: Denoiser, n: int, m: int) -> Any:
        """The loss of the student of n jumps whose teacher makes m steps for each. teacher: None for the task's own."""
        times_of, span = Nodes(increasing_times(task.denoiser, n * m)), self.span(task.denoiser)
        fixed: EpsFn = (
            teacher_eps_fn(task.teacher, task.denoiser, task.guidance_scale)
            if teacher is None
            else make_eps_fn(teacher)
        )

        def lesson(batch: dict[str, Tensor]) -> Tensor:
            x, cond, noise_of, told = batch["x"], task.cond(batch), fixed, {}
            if span is not None:
                scale = span[0] + (span[1] - span[0]) * torch.rand(len(x), device=x.device)
                noise_of, told = make_eps_fn(teacher or task.denoiser, scale), {"guidance": scale}
            nodes = times_of.at(x)
            i = m * torch.randint(0, n, (len(x),), device=nodes.device)
            times = [nodes[i + k] for k in range(m + 1)]
            z = noised(task.schedule, x, times[0])
            with torch.no_grad():
                _, target = invert_along(noise_of, task.schedule, z, times, **cond)
            return upward_loss(student, z, times[0], target, self.weight, **cond, **told)

        return lesson
