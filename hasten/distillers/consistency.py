"""Consistency models: a student that predicts, anywhere on a path, the end of the path."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import BadInput, check_choice
from ..predictions import X0, Anchored, spread
from ..train.losses import LogNormal
from ._consistency import (
    SOLVERS,
    TIME_GRIDS,
    doubling_count,
    ect_lower,
    grid_levels,
    level,
    lognormal_probabilities,
    pair_distance,
    root_count,
    root_momentum,
)
from ._ema_target import EMATarget, StepCounter
from ._relations import relate, related
from ._targets import noised, time_device
from ._task import Distiller, DistillTask, Student

__all__ = ["Consistency"]

CHOICES = {
    "mode": ("distillation", "training"),
    "curriculum": ("fixed", "root", "doubling", "ect"),
    "solver": tuple(SOLVERS),
    "metric": ("huber", "l2", "l1"),
    "weight": ("one", "gap"),
    "levels": ("uniform", "lognormal"),
    "grid": tuple(TIME_GRIDS),
}


@dataclass(frozen=True)
class Consistency(Distiller):
    """A student f(z_t, t) that is constant along a path, with f(x, 0) = x: so it predicts the path's clean end.

        E[ lambda d( f(z_t, t), f-(z_s, s) ) ],   s < t neighbours, z_t = alpha_t x + sigma_t eps, f- without gradient

    In mode "distillation" z_s is where one solver step of the teacher takes z_t. In mode "training" z_s is alpha_s x +
    sigma_s eps, the same x and eps; the teacher only provides initial weights, so no guidance is learnt. f is the
    network's x0, which at t = 0 is its input for v, flow, edm and eps networks; one that predicts x0 is anchored to
    have it. Sampled by `consistency`: predict, noise again, predict again.

    Levels are q = sigma / alpha, those of z / alpha. The nodes are N levels of the time grid `grid` from the schedule's
    t_min to its t_max, and the clean end below them, so that no smallest level remains. A start at pure noise, where q
    is infinite, stays a node of its own and counts as q = 150 in grids and weights.

    LCM (text): nodes=50, grid=trailing, solver=euler, guidance=(2,14), momentum=.95.
    CD: momentum=0 (32 pixels) or nodes=40, momentum=.95 (64 pixels). CT: mode=training, curriculum=root, first=2,
    nodes=150, momentum=.9. Improved CT: mode=training, curriculum=doubling, nodes=1280, weight=gap, levels=lognormal,
    momentum=0. ECT: mode=training, curriculum=ect, weight=gap, momentum=0. All papers evaluate an average of the
    weights. Cost: 6 model evaluations a training step and image with Heun's step, 5 with Euler's, 4 in mode "training".

    Args:
        mode: `"distillation"` or `"training"`.
        curriculum: of N: `"fixed"` N = nodes; `"root"` grows as a square root from `first`; `"doubling"` from `first`
            by factors of 2; `"ect"` has no nodes: t is log-normal and the gap to s halves `stages` times, training
            only.
        nodes, first: N at the end and at the beginning.
        stages: of `"ect"`.
        solver: `"heun"` or `"euler"`.
        metric: `"huber"` sqrt(|a - b|^2 + C^2) - C of the whole sample, C = c sqrt(dimension); `"l2"`; `"l1"`.
        c: of `"huber"`.
        weight: lambda, `"one"` or `"gap"`, 1 / (q_t - q_s).
        levels: distribution of the pairs, `"uniform"` or `"lognormal"` in q by `noise`.
        noise: mean and standard deviation of log q.
        momentum: of f-, an EMA of the student; 0 for the student itself, which is less stable in short runs; `"root"`
            moves it towards 1 as N grows.
        grid: `"karras"` (rho 7), `"angle"`, or `"trailing"`, equally spaced in time, on which the sampler runs too.
        guidance: the guidance scales (low, high) that the student takes as an input, uniform in training; None: the
            run's scale is built in.
        lr: peak learning rate.
        steps: of the recommended sampler.

    Raises:
        BadInput: for options that are out of range or do not go together.

    References:
        Song, Dhariwal, Chen, Sutskever 2023, arXiv:2303.01469.
        Song, Dhariwal 2024, arXiv:2310.14189.
        Geng, Pokle, Luo, Lin, Kolter 2024, arXiv:2406.14548.
        Luo, Tan, Huang, Li, Zhao 2023, arXiv:2310.04378 (LCM).
    """

    mode: str = "distillation"
    curriculum: str = "fixed"
    nodes: int = 18
    first: int = 10
    stages: int = 8
    solver: str = "heun"
    metric: str = "huber"
    c: float = 0.00054
    weight: str = "one"
    levels: str = "uniform"
    noise: tuple[float, float] = (-1.1, 2.0)
    momentum: float = 0.9
    grid: str = "karras"
    guidance: tuple[float, float] | None = None
    lr: float = 3e-4
    steps: int = 2
    needs_data: ClassVar[bool] = True
    takes_structure: ClassVar[bool] = True
    compares_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            check_choice(f"{name} of consistency", getattr(self, name), choices)
        if self.curriculum == "ect" and self.mode != "training":
            raise BadInput("consistency: curriculum=ect has gaps too wide for a step of the teacher: use mode=training")
        if min(self.nodes, self.stages, self.steps) < 1 or not self.first >= 2:
            raise BadInput("consistency needs nodes, stages and steps of at least 1, and first of at least 2")
        if self.curriculum in ("root", "doubling") and self.first > self.nodes:
            raise BadInput(
                f"consistency: nodes increase from first={self.first} to nodes={self.nodes}, which is smaller"
            )
        if not 0 <= self.momentum < 1 or not self.c >= 0 or not self.noise[1] > 0:
            raise BadInput("consistency needs momentum in [0, 1), c of at least 0, and a deviation of noise above 0")
        if self.guidance is not None and (self.mode == "training" or not self.guidance[0] < self.guidance[1]):
            raise BadInput(
                f"consistency needs guidance=(low,high) with low < high, and a teacher to learn it from "
                f"(mode=distillation), got {self.guidance} and mode={self.mode}"
            )

    @property
    def teacher_steps(self) -> int | None:
        """In mode "training" the teacher only provides initial weights."""
        return 0 if self.mode == "training" else None

    @property
    def keeps_guidance_range(self) -> bool:
        """The scale is an input where there is a range."""
        return self.guidance is not None

    @property
    def adds_inputs(self) -> bool:
        """The scale, where there is a range."""
        return self.guidance is not None

    @property
    def adds_guidance_only(self) -> bool:
        """The scale is the only further input."""
        return True

    def distill(self, task: DistillTask) -> Student:
        """Train the one stage `consistency` and return its student."""
        student = anchored(self.initial_student(task))
        module: StepCounter = EMATarget(student) if self.momentum else StepCounter(student)
        # weights by the gap span orders of magnitude, which clipping would undo
        clip = 1.0 if self.weight == "one" else None
        modules = related(task, [task.trained_module("student", module, self.loss_fn(task, module), self.lr)])
        trained: Any = task.fit("consistency", modules, clip=clip)["student"]
        guidance = (1.0, 1.0) if self.mode == "training" else None
        times = "trailing" if self.grid == "trailing" else "angle"
        result = Student(trained.student, "consistency", times, self.steps, guidance=guidance)
        task.save_student("consistency", result)
        return result

    def initial_student(self, task: DistillTask) -> Denoiser:
        """A copy of the network, with the scale as an input where there is a range."""
        if self.guidance is None:
            return task.student()
        if task.denoiser.guidance_range is None and not task.guidable:
            raise BadInput(
                "consistency: guidance=(low,high) needs a model with a null label or prompt, that is, trained with "
                "label dropout: leave guidance out"
            )
        return task.student(guidance=task.denoiser.guidance_range or self.guidance)

    def loss_fn(
        self, task: DistillTask, module: StepCounter, name: str = "consistency"
    ) -> Callable[[dict[str, Tensor]], Tensor]:
        """The loss of the stage `name`; the progress of the run follows from the step count of `module`."""
        schedule, student = task.schedule, module.student
        stochastic = has_dropout(student)

        def loss_fn(batch: dict[str, Tensor]) -> Tensor:
            k = module.completed_steps()
            total = max(planned_steps(task, name), k + 1)
            if isinstance(module, EMATarget):
                module.update(self.momentum_at(k, total), corrected=False)
            else:
                module.advance()
            x, cond = batch["x"], task.cond(batch)
            t, s = self.sample_times(schedule, len(x), k, total, time_device(x))
            eps = torch.randn_like(x)
            z = noised(schedule, x, t, eps)
            teacher: Callable[..., Tensor] = task.teacher
            inputs = cond
            if getattr(student, "net_takes_guidance", False):
                low, high = student.guidance_range or (1.0, 1.0)
                scale = low + (high - low) * torch.rand(len(x), device=x.device)
                teacher, inputs = task.teacher_at(scale), {**cond, "guidance": scale}
            seed = int(torch.randint(2**62, ())) if stochastic else None
            with same_dropout(seed):
                prediction = student(z, t, **inputs)
            with torch.no_grad(), same_dropout(seed):
                if self.mode == "training":
                    z_s = noised(schedule, x, s, eps)
                else:
                    z_s = SOLVERS[self.solver](teacher, schedule, z, t, s, **cond)
                target_model = module.copy if isinstance(module, EMATarget) else student
                # at the clean end f is the identity by definition, free of rounding
                target = torch.where(spread((s == 0).double(), z) > 0, z_s, target_model(z_s, s, **inputs))
            relate(task, batch, prediction, prediction, target, t)
            distances = pair_distance(prediction, target, self.metric, self.c)
            if self.weight == "one":
                return distances.mean()
            gap = level(schedule, t) - level(schedule, s)
            return (distances / gap.to(distances.device, torch.float32)).mean()

        return loss_fn

    def node_count(self, k: int, total: int) -> int:
        """N at step k of `total`."""
        if self.curriculum == "root":
            return root_count(k / total, self.first, self.nodes)
        if self.curriculum == "doubling":
            return doubling_count(k, total, self.first, self.nodes)
        return self.nodes

    def momentum_at(self, k: int, total: int) -> float:
        """The momentum of f- at step k of `total`."""
        if self.curriculum == "root":
            return root_momentum(self.node_count(k, total), self.first, self.momentum)
        return self.momentum

    def sample_times(
        self, schedule: Any, n: int, k: int, total: int, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """The upper and lower times (n,) of n random pairs at step k of `total`."""
        if self.curriculum == "ect":
            t = LogNormal(*self.noise)(schedule, torch.rand(n, dtype=torch.float64, device=device))
            return t, schedule.time(-torch.log(ect_lower(level(schedule, t), k * self.stages // total)))
        times, levels = grid_levels(self.grid, schedule, self.node_count(k, total), str(device))
        if self.levels == "lognormal":
            i = torch.multinomial(lognormal_probabilities(levels, *self.noise), n, replacement=True)
        else:
            i = torch.randint(len(times) - 1, (n,), device=device)
        return times[i + 1], times[i]


def anchored(student: Denoiser) -> Denoiser:
    """The student itself, or, where its network predicts x0, one whose x0 at t = 0 is x_t in any case."""
    if not isinstance(student.prediction, X0):
        return student
    schedule = student.schedule
    return student.replace(prediction=Anchored(float(schedule.q(schedule.t_min))))


def planned_steps(task: DistillTask, name: str) -> int:
    """Steps of the stage; 1 where they are not planned yet."""
    try:
        return task.steps[name]
    except KeyError:
        return 1


def has_dropout(module: nn.Module) -> bool:
    """Whether the module's outputs are random."""
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules())


@contextlib.contextmanager
def same_dropout(seed: int | None) -> Iterator[None]:
    """A context with a fixed RNG seed that restores the state of the generators; None: no change."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
