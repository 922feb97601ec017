"""Distillation of a guided model: first both branches into one network, then many steps into few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import BadInput, check_choice
from ..times import Trailing
from ..train.losses import stratified
from ..train.sadm import clean_samples
from ..utils.deprecation import renamed
from ._ema_target import EMATarget
from ._relations import relate, related, relation_recorder
from ._targets import (
    DeviceTimes,
    ddim_path,
    midpoint_path,
    noised,
    output_weight,
    prediction_loss,
    time_device,
    time_nodes,
)
from ._task import Distiller, DistillTask, Loss, Student
from .progressive import check_nested_steps, check_order, halving_loss

__all__ = ["GuidedDistillation"]

KINDS = ("deterministic", "stochastic")


@dataclass(frozen=True)
class GuidedDistillation(Distiller):
    """One student for a range of guidance scales s, or for one, then students of it that need few steps.

    Stage one, `guidance`: the student, a copy of the conditional network with s as a further input, is trained towards
    `x0 = x0_uncond + s (x0_cond - x0_uncond)` at all times, s uniform in the range, one for each sample. It halves the
    cost at any number of steps, with any sampler. With `guidance=none` s is the run's scale and no input.

    Stage two, one stage for each entry N of `steps`, from the student before, with s an input of both:

    - "deterministic": as progressive distillation: at t = i/N, i = 1..N, the student's x0 is trained towards the x*
    whose
      one step of DDIM lands at (i-1)/N where m steps of its teacher land. Sampled by DDIM with N steps.
    - "stochastic": from t = i/N, i = 2..N, it lands where its teacher lands after two steps of 1/N, at (i-2)/N; at
      t = 1/N the target is its teacher's own prediction. Sampled by N steps that skip a node each and add the noise of
      one (`stochastic_distilled`).

    A model that takes the scale as an input already, such as the student of stage one, begins with stage two.
    Paper: scales 1 to 5 for pixels, 2 to 14 for text, N from 1024. Cost: 5 model evaluations a training step
    and image, m + 3 in stage two.

    Args:
        steps: decreasing, each a divisor of the one before.
        start: steps of the student of stage one that the first of them learns from, a multiple of the first (0: twice
            as many).
        guidance: the scales (low, high); the papers' w is s - 1. None: the run's scale (`guidance_scale`) alone, in a
            network without that input.
        kind: `"deterministic"` or `"stochastic"`.
        lr, weight, order: as in `progressive`.
        first: training of stage one, relative to another stage's.
        last: training of the stages of 2 steps and 1, relative to another stage's (with `shared`: of their images).
        shared: one network for all the counts of `steps`, which is one more input, in one stage, `shared`: each image
            of a batch has one of the counts, and the teacher of a count is an average of the student itself at the
            count before (momentum .9; of the first count, stage one's student). As large as one student, and all steps
            train it. Deterministic only.

    Raises:
        BadInput: for a model without a null label or prompt, steps that do not nest, options that do not go together.

    References:
        Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans 2023, arXiv:2210.03142.
        `shared` is ours, after Frans, Hafner, Levine, Abbeel 2025, arXiv:2410.12557.
    """

    steps: tuple[int, ...] = (16, 8, 4, 2, 1)
    start: int = 0
    guidance: tuple[float, float] | None = (1.0, 5.0)
    kind: str = "deterministic"
    lr: float = 1e-3
    weight: str = "auto"
    first: float = 1.0
    last: float = 2.0
    shared: bool = False
    order: int = 1
    needs_data: ClassVar[bool] = True
    takes_structure: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_nested_steps("guided", self.steps, self.start)
        check_order("guided", self.order)
        check_choice("kind of guided", self.kind, KINDS)
        if self.shared and self.kind != "deterministic":
            raise BadInput("guided: shared=true, one network for all step counts, needs kind=deterministic")
        if self.guidance is not None and not self.guidance[0] < self.guidance[1]:
            raise BadInput(
                f"guided needs guidance=(low,high) with low < high, or none for one scale, got {self.guidance}"
            )

    @property
    def keeps_guidance_range(self) -> bool:
        """The scale is an input, unless it is built in."""
        return self.guidance is not None

    @property
    def adds_inputs(self) -> bool:
        """The scale, and with `shared` the number of steps."""
        return self.guidance is not None or self.shared

    @property
    def adds_guidance_only(self) -> bool:
        """All but `shared`."""
        return not self.shared

    @property
    def teacher_steps(self) -> int:
        """The teacher is evaluated at the nodes of its own steps alone."""
        return self.start or 2 * self.steps[0]

    def distill(self, task: DistillTask) -> Student:
        """Train the stages `guidance`, `steps16`, ... and return the last student."""
        teacher, teacher_steps = self.merged(task), self.teacher_steps
        span = teacher.guidance_range or (task.guidance_scale, task.guidance_scale)
        if self.shared:
            return self.train_shared(task, teacher, teacher_steps)
        sampler = "ddim" if self.kind == "deterministic" else "stochastic_distilled"
        loss_fn = self.deterministic_loss if self.kind == "deterministic" else self.stochastic_loss
        for n in self.steps:
            student = self.initial_student(task, teacher)
            loss = loss_fn(task, teacher, student, n, teacher_steps // n)
            modules = related(task, [task.trained_module("student", student, loss, self.lr)])
            trained: Any = task.fit(f"steps{n}", modules, budget_weight=self.budget_weight(n))["student"]
            teacher = trained
            result = Student(teacher, sampler, "trailing", n, guidance=span)
            task.save_student(f"steps{n}", result)
            teacher_steps = n
        return result

    def merged(self, task: DistillTask) -> Denoiser:
        """The student of stage one; the model itself where the scale is its input, or built in."""
        if task.denoiser.guidance_range is not None:
            return task.denoiser
        if not task.guidable:
            raise BadInput(
                "guided needs a model with a null label, that is, trained with label dropout: progressive, tract and "
                "consistency work without one"
            )
        student = task.student() if self.guidance is None else task.student(guidance=self.guidance)
        modules = related(task, [task.trained_module("student", student, self.guidance_loss(task, student), self.lr)])
        trained = task.fit("guidance", modules, budget_weight=self.first)["student"]
        assert isinstance(trained, Denoiser)
        task.save_student("guidance", Student(trained, "unipc", "angle", 16, guidance=self.guidance, any_time=True))
        return trained

    def initial_student(self, task: DistillTask, teacher: Denoiser, **inputs: Any) -> Denoiser:
        """The initial student of `teacher`: its copy, or the task's `init` with the teacher's range of scales."""
        if task.init is None or teacher is not task.denoiser:
            return task.student(teacher, **inputs)
        if not teacher.net_takes_guidance:
            return task.student(task.init, **inputs)
        return task.student(task.init, guidance=teacher.guidance_range, **inputs)

    def guidance_loss(self, task: DistillTask, student: Denoiser) -> Loss:
        """The loss of stage one."""
        low, high = self.guidance or (task.guidance_scale, task.guidance_scale)

        def loss_fn(batch: dict[str, Tensor]) -> Tensor:
            x, cond = batch["x"], task.cond(batch)
            t = task.schedule.t_max * stratified(len(x), time_device(x)).clamp_min(task.schedule.t_min)
            z = noised(task.schedule, x, t)
            scale = low + (high - low) * torch.rand(len(x), device=x.device)
            with torch.no_grad():
                conditional, unconditional = task.branches(task.denoiser.raw, z, t, **cond)
                target = unconditional + scale.view(-1, *[1] * (z.ndim - 1)).to(z.dtype) * (conditional - unconditional)
            raw = student.raw(z, t, **cond, **({"guidance": scale} if student.net_takes_guidance else {}))
            if task.structure is not None:
                x0, x0_target = (clean_samples(student, z, t, each) for each in (raw, target))
                relate(task, batch, raw, x0, x0_target, t)
            error = (raw - target).float().square().flatten(1).mean(1)
            return (output_weight(student, t, self.weight).to(x.device, torch.float32) * error).mean()

        return loss_fn

    def sample_scales(self, teacher: Denoiser, x: Tensor) -> dict[str, Tensor]:
        """The input `guidance`: a random scale for each sample, uniform in the range, (B,) float32; {} if built in."""
        low, high = teacher.guidance_range or (1.0, 1.0)
        if low == high:
            return {}
        return {"guidance": low + (high - low) * torch.rand(len(x), device=x.device)}

    def path(self, first: bool) -> Any:
        """The teacher's steps from node to node: of second order where it is not a student of few steps."""
        return midpoint_path if first and self.order == 2 else ddim_path

    def deterministic_loss(self, task: DistillTask, teacher: Denoiser, student: Denoiser, n: int, m: int) -> Loss:
        """The loss of the deterministic student of n steps whose teacher takes m for each."""
        path = self.path(first=n == self.steps[0])
        return halving_loss(task, teacher, student, n, m, path, self.weight, lambda x: self.sample_scales(teacher, x))

    def budget_weight(self, n: int) -> float:
        """The training of the student of n steps, relative to another stage's."""
        return self.last if n <= 2 else 1.0

    def assign_counts(self, n: int) -> Tensor:
        """The index of the step count of each of n images (n,), in proportion to the counts' weights."""
        bounds = torch.tensor([self.budget_weight(count) for count in self.steps]).cumsum(0)
        return torch.searchsorted(bounds, bounds[-1] * stratified(n).float()).clamp_max(len(bounds) - 1)

    def train_shared(self, task: DistillTask, merged: Denoiser, teacher_steps: int) -> Student:
        """The stage `shared`: one network for all step counts."""
        module = EMATarget(self.initial_student(task, merged, steps=self.steps))
        counts = self.steps
        ratios = [a // b for a, b in zip((teacher_steps, *counts), counts, strict=False)]
        grids = [DeviceTimes(time_nodes(Trailing(), task.schedule, n * m)) for n, m in zip(counts, ratios, strict=True)]

        def loss_fn(batch: dict[str, Tensor]) -> Tensor:
            module.update(0.9)
            x, inputs = batch["x"], {**task.cond(batch), **self.sample_scales(merged, batch["x"])}
            which = self.assign_counts(len(x))
            # rows sorted by count on the CPU, so that nothing waits for their numbers
            order, amounts = which.argsort(stable=True).to(x.device), torch.bincount(which, minlength=len(counts))
            noise, z, target = torch.randn_like(x), torch.empty_like(x), torch.empty_like(x)
            t = torch.empty(len(x), dtype=torch.float64, device=time_device(x))
            own = torch.empty(len(x), dtype=torch.long, device=x.device)
            for k, (n, m, rows) in enumerate(zip(counts, ratios, order.split(amounts.tolist()), strict=True)):
                if not len(rows):
                    continue
                nodes = grids[k].at(x)
                i = m * torch.randint(1, n + 1, (len(rows),), device=nodes.device)
                times = [nodes[i - j] for j in range(m + 1)]
                cond = {key: value[rows] for key, value in inputs.items()}
                own[rows] = n
                if k:
                    cond["steps"] = torch.full((len(rows),), counts[k - 1], device=x.device)
                t[rows.to(t.device)] = times[0]
                z[rows] = noised(task.schedule, x[rows], times[0], noise[rows])
                with torch.no_grad():
                    teacher = module.copy if k else merged
                    path = self.path(first=k == 0)
                    target[rows] = path(teacher, task.schedule, z[rows], times, **cond)[1].to(x.dtype)
            inputs["steps"] = own
            record = relation_recorder(task, batch, module.student, z, t, target)
            return prediction_loss(module.student, z, t, target, self.weight, record, **inputs)

        modules = related(task, [task.trained_module("student", module, loss_fn, self.lr)])
        fitted: Any = task.fit("shared", modules, budget_weight=sum(map(self.budget_weight, counts)))["student"]
        steps = 4 if 4 in counts else counts[-1]
        result = Student(fitted.student, "ddim", "trailing", steps, guidance=merged.guidance_range)
        task.save_student("shared", result)
        return result

    def stochastic_loss(self, task: DistillTask, teacher: Denoiser, student: Denoiser, n: int, m: int) -> Loss:
        """The loss of the stochastic student of n steps, whose teacher has m nodes for each of its own.

        A stochastic student steps two of its nodes at a time; stage one's student, which is a denoiser at all times,
        one.
        """
        grid = DeviceTimes(time_nodes(Trailing(), task.schedule, n * m))
        stride = 1 if m * n == (self.start or 2 * self.steps[0]) else 2
        path = self.path(first=stride == 1)
        jumps, last = 2 * m // stride, -(-m // stride)  # fewer from the last node of the student

        def loss_fn(batch: dict[str, Tensor]) -> Tensor:
            x, cond = batch["x"], {**task.cond(batch), **self.sample_scales(teacher, batch["x"])}
            nodes = grid.at(x)
            i = m * torch.randint(1, n + 1, (len(x),), device=nodes.device)
            moves = [torch.where(i > m, k, max(k - (jumps - last), 0)) for k in range(jumps + 1)]
            times = [nodes[(i - stride * k).clamp_min(0)] for k in moves]
            z = noised(task.schedule, x, times[0])
            with torch.no_grad():
                _, target = path(teacher, task.schedule, z, times, **cond)
            record = relation_recorder(task, batch, student, z, times[0], target)
            return prediction_loss(student, z, times[0], target, self.weight, record, **cond)

        return loss_fn


__getattr__ = renamed(__name__, {"Guided": "GuidedDistillation"})
