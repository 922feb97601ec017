"""Distillation of a guided model: first the two branches into one network, then many steps into few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import BadInput, nearest
from ..times import Trailing
from ..train.losses import stratified
from ._ema_target import EMATarget
from ._targets import Nodes, clock, factor, finer_path, grid, loss, noised, path
from ._task import Student, Task
from .progressive import check, check_order, halving

__all__ = ["Guided"]

KINDS = ("deterministic", "stochastic")


@dataclass(frozen=True)
class Guided:
    """One student for a range of guidance scales s, then students of it that need few steps.

    Stage one, the stage `guidance`: the student, a copy of the conditional network with s as a further input, is drawn
    to `x0 = x0_uncond + s (x0_cond - x0_uncond)` at all times, s uniform in the range, one for each sample. It halves
    the cost at any number of steps, with any sampler.

    Stage two, a stage for each entry N of `steps`, from the student before, with s an input of both:
    - "deterministic": as progressive distillation: at t = i/N, i = 1..N, the student's x0 is drawn to the x* whose one
      step of DDIM lands at (i-1)/N where m steps of its teacher land. Sampled by DDIM with N steps.
    - "stochastic": from t = i/N, i = 2..N, it lands where its teacher lands after two steps of 1/N, at (i-2)/N; at
      t = 1/N it is drawn to its teacher's own answer. Sampled by N steps that jump two nodes and add the noise of one
      (`stochastic_distilled`).

    steps: falling, each a divisor of the one before. start: steps of the student of stage one that the first of them
        learns from, a multiple of the first (0: twice as many). guidance: the scales (low, high), papers' w is s - 1.
        kind: as above. lr, weight, order: as in `progressive`.
        first: how many times the training of another stage that of stage one gets; last: likewise those of 2 steps
        and 1 (with `shared`: how many times the images of another count).

    shared: one network for all the counts of `steps`, which it is told as one more input, in one stage, `shared`: each
        image of a batch has one of the counts, and the teacher of a count is an average of the student itself at the
        count before (momentum .9; of the first count, stage one's student). As large as one student, and all steps
        train it. Deterministic only.

    A model that takes the scale as an input already, such as what stage one left, begins with stage two.
    Paper: scales 1 to 5 for pixels, N from 1024. Cost: 5 evaluations a step of training and image, m + 3 in stage two.
    Raises BadInput for a model without a null label, and for steps that do not nest.

    References: Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans 2023, arXiv:2210.03142; `shared` is ours, after Frans,
    Hafner, Levine, Abbeel 2025, arXiv:2410.12557.
    """

    steps: tuple[int, ...] = (16, 8, 4, 2, 1)
    start: int = 0
    guidance: tuple[float, float] = (1.0, 5.0)
    kind: str = "deterministic"
    lr: float = 1e-3
    weight: str = "auto"
    first: float = 1.0
    last: float = 2.0
    shared: bool = False
    order: int = 1
    needs_data: ClassVar[bool] = True
    ranged: ClassVar[bool] = True  # it keeps a range of guidance scales
    adds_inputs: ClassVar[bool] = True  # the scale

    def __post_init__(self) -> None:
        check("guided", self.steps, self.start)
        check_order("guided", self.order)
        if self.kind not in KINDS:
            raise BadInput(f"guided: unknown kind {self.kind!r}: {nearest(self.kind, KINDS)}")
        if self.shared and self.kind != "deterministic":
            raise BadInput("guided: one network for all counts of steps is made for kind=deterministic only")
        if not self.guidance[0] < self.guidance[1]:
            raise BadInput(f"guided needs guidance=(low,high) with low < high, got {self.guidance}")

    @property
    def teacher_steps(self) -> int:
        """It asks its teacher at the nodes of the teacher's own steps alone."""
        return self.start or 2 * self.steps[0]

    def distill(self, task: Task) -> Student:
        """Train the stages `guidance`, `steps16`, ...; the last student."""
        teacher, many = self.merged(task), self.start or 2 * self.steps[0]
        span = teacher.guidance_range
        assert span is not None
        if self.shared:
            return self.for_all(task, teacher, many)
        sampler = "ddim" if self.kind == "deterministic" else "stochastic_distilled"
        lesson = self.jumps if self.kind == "deterministic" else self.double_jumps
        for n in self.steps:
            student = self.beginning(task, teacher)
            players = [task.player("student", student, lesson(task, teacher, student, n, many // n), self.lr)]
            teacher = task.fit(f"steps{n}", players, share=self.share(n))["student"]  # type: ignore[assignment]
            made = Student(teacher, sampler, "trailing", n, guidance=span)
            task.keep(f"steps{n}", made)
            many = n
        return made

    def merged(self, task: Task) -> Denoiser:
        """Stage one; nothing to do for a model that takes the scale as its input."""
        if task.denoiser.net_takes_guidance:
            return task.denoiser
        if task.denoiser.null_label is None:
            raise BadInput(
                "guided needs a model with a null label, one that was trained with label dropout: "
                "what works without one is progressive, tract or consistency"
            )
        student = task.student(guidance=self.guidance)
        players = [task.player("student", student, self.merging(task, student), self.lr)]
        trained = task.fit("guidance", players, share=self.first)["student"]
        assert isinstance(trained, Denoiser)
        task.keep("guidance", Student(trained, "unipc", "angle", 16, guidance=self.guidance, any_time=True))
        return trained

    def beginning(self, task: Task, teacher: Denoiser, **inputs: Any) -> Denoiser:
        """What a student of `teacher` begins as: its copy, or the task's `init` with the teacher's range of scales."""
        if task.init is None or teacher is not task.denoiser:
            return task.student(teacher, **inputs)
        return task.student(task.init, guidance=teacher.guidance_range, **inputs)

    def merging(self, task: Task, student: Denoiser) -> Callable[[dict[str, Tensor]], Tensor]:
        """The loss of stage one."""
        low, high = self.guidance

        def lesson(batch: dict[str, Tensor]) -> Tensor:
            x, label = batch["x"], batch["label"]
            t = task.schedule.t_max * stratified(len(x), clock(x)).clamp_min(task.schedule.t_min)
            z = noised(task.schedule, x, t)
            scale = low + (high - low) * torch.rand(len(x), device=x.device)
            with torch.no_grad():
                both = torch.cat([label, torch.full_like(label, task.denoiser.null_label)])  # type: ignore[arg-type]
                of_class, of_all = task.denoiser.raw(torch.cat([z, z]), torch.cat([t, t]), label=both).chunk(2)
                target = of_all + scale.view(-1, *[1] * (z.ndim - 1)).to(z.dtype) * (of_class - of_all)
            raw = student.raw(z, t, label=label, guidance=scale)
            error = (raw - target).float().square().flatten(1).mean(1)
            return (factor(student, t, self.weight).to(x.device, torch.float32) * error).mean()

        return lesson

    def scales(self, teacher: Denoiser, x: Tensor) -> Tensor:
        """A scale for each sample, uniform in the range, (B,) float32."""
        low, high = teacher.guidance_range  # type: ignore[misc]
        return low + (high - low) * torch.rand(len(x), device=x.device)

    def way(self, first: bool) -> Any:
        """How a teacher goes from node to node: by steps of second order where it is not a student of few steps."""
        return finer_path if first and self.order == 2 else path

    def jumps(self, task: Task, teacher: Denoiser, student: Denoiser, n: int, m: int) -> Any:
        """The loss of the deterministic student of n steps whose teacher makes m for each."""
        way = self.way(first=n == self.steps[0])
        return halving(task, teacher, student, n, m, way, self.weight, lambda x: {"guidance": self.scales(teacher, x)})

    def share(self, n: int) -> float:
        """The share of the training that n steps get."""
        return self.last if n <= 2 else 1.0

    def dealt(self, n: int) -> Tensor:
        """Which count of steps each of n images is a lesson for (n,), in proportion to their shares."""
        parts = torch.tensor([self.share(count) for count in self.steps]).cumsum(0)
        return torch.searchsorted(parts, parts[-1] * stratified(n).float()).clamp_max(len(parts) - 1)

    def for_all(self, task: Task, merged: Denoiser, many: int) -> Student:
        """The stage `shared`: one network for all counts of steps."""
        both = EMATarget(self.beginning(task, merged, steps=self.steps))
        counts, each = self.steps, [a // b for a, b in zip((many, *self.steps), self.steps, strict=False)]
        times_of = [Nodes(grid(Trailing(), task.schedule, n * m)) for n, m in zip(counts, each, strict=True)]

        def lesson(batch: dict[str, Tensor]) -> Tensor:
            both.update(0.9)
            x, told = batch["x"], {**task.cond(batch), "guidance": self.scales(merged, batch["x"])}
            which = self.dealt(len(x))
            # the rows of one count after those of another: sorted here, so that no one waits for their numbers
            order, amounts = which.argsort(stable=True).to(x.device), torch.bincount(which, minlength=len(counts))
            noise, z, target = torch.randn_like(x), torch.empty_like(x), torch.empty_like(x)
            t = torch.empty(len(x), dtype=torch.float64, device=clock(x))
            own = torch.empty(len(x), dtype=torch.long, device=x.device)
            for k, (n, m, rows) in enumerate(zip(counts, each, order.split(amounts.tolist()), strict=True)):
                if not len(rows):
                    continue
                nodes = times_of[k].at(x)
                i = m * torch.randint(1, n + 1, (len(rows),), device=nodes.device)
                times = [nodes[i - j] for j in range(m + 1)]
                cond = {key: value[rows] for key, value in told.items()}
                own[rows] = n
                if k:
                    cond["steps"] = torch.full((len(rows),), counts[k - 1], device=x.device)
                t[rows.to(t.device)] = times[0]
                z[rows] = noised(task.schedule, x[rows], times[0], noise[rows])
                with torch.no_grad():
                    teacher = both.copy if k else merged
                    way = self.way(first=k == 0)
                    target[rows] = way(teacher, task.schedule, z[rows], times, **cond)[1].to(x.dtype)
            told["steps"] = own
            return loss(both.student, z, t, target, self.weight, **told)

        players = [task.player("student", both, lesson, self.lr)]
        trained = task.fit("shared", players, share=sum(map(self.share, counts)))["student"].student
        assert isinstance(trained, Denoiser)
        few = 4 if 4 in counts else counts[-1]
        made = Student(trained, "ddim", "trailing", few, guidance=merged.guidance_range)
        task.keep("shared", made)
        return made

    def double_jumps(self, task: Task, teacher: Denoiser, student: Denoiser, n: int, m: int) -> Any:
        """The loss of the stochastic student of n steps, whose teacher has m nodes for each of its own.

        A stochastic student jumps two of its nodes at a time; stage one's student, who is at home at all times, one.
        """
        times_of = Nodes(grid(Trailing(), task.schedule, n * m))
        stride = 1 if m * n == (self.start or 2 * self.steps[0]) else 2
        way = self.way(first=stride == 1)
        jumps, last = 2 * m // stride, -(-m // stride)  # from the last node of the student fewer are left

        def lesson(batch: dict[str, Tensor]) -> Tensor:
            x, cond = batch["x"], {**task.cond(batch), "guidance": self.scales(teacher, batch["x"])}
            nodes = times_of.at(x)
            i = m * torch.randint(1, n + 1, (len(x),), device=nodes.device)
            made = [torch.where(i > m, k, max(k - (jumps - last), 0)) for k in range(jumps + 1)]
            times = [nodes[(i - stride * k).clamp_min(0)] for k in made]
            z = noised(task.schedule, x, times[0])
            with torch.no_grad():
                _, target = way(teacher, task.schedule, z, times, **cond)
            return loss(student, z, times[0], target, self.weight, **cond)

        return lesson
