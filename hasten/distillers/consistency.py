"""Consistency models: a student that says, anywhere on a path, where the path ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import BadInput, nearest
from ..predictions import X0, Anchored, spread
from ..train.losses import LogNormal
from ._consistency import (
    LAWS,
    SOLVERS,
    distance,
    doubling_count,
    ect_lower,
    level,
    lognormal_shares,
    pairs,
    root_count,
    root_momentum,
)
from ._ema_target import Counted, EMATarget
from ._targets import clock, noised
from ._task import Student, Task

__all__ = ["Consistency"]

CHOICES = {
    "mode": ("distillation", "training"),
    "curriculum": ("fixed", "root", "doubling", "ect"),
    "solver": tuple(SOLVERS),
    "metric": ("huber", "l2", "l1"),
    "weight": ("one", "gap"),
    "levels": ("uniform", "lognormal"),
    "grid": tuple(LAWS),
}


@dataclass(frozen=True)
class Consistency:
    """A student f(z_t, t) that gives the same answer all along a path, and f(x, 0) = x: so it is the path's clean end.

        E[ lambda d( f(z_t, t), f-(z_s, s) ) ],   s < t neighbours, z_t = alpha_t x + sigma_t eps, f- without gradient

    mode "distillation": z_s is where one step of the teacher, `solver`, takes z_t. "training": z_s is alpha_s x +
    sigma_s eps, the same x and eps; the teacher only lends its weights, so no guidance is learnt. f is the network's
    x0, which at t = 0 is its input for v, flow, edm and eps networks; one that predicts x0 is anchored to do so.
    Sampled by `consistency`: guess, renoise, guess again.

    Levels are q = sigma / alpha, those of z / alpha. The nodes are N levels from the schedule's t_min to its t_max by
    the law `grid`, "karras" (rho 7) or "angle", and the clean end below them, so that no smallest level is left over.
    A start at pure noise, where q is infinite, stays a node of its own and counts as q = 150 in laws and weights.

    nodes, first: N at the end and at the beginning. curriculum: how it gets there: "fixed" is N = nodes; "root"
        sqrt-like from `first`; "doubling" from `first` by factors of 2; "ect" has no nodes: t is drawn log-normally and
        the gap to s halves `stages` times, training only.
    metric: "huber" sqrt(|a - b|^2 + C^2) - C of the whole sample, C = c sqrt(dimension); "l2"; "l1".
    weight: lambda, "one" or "gap", 1 / (q_t - q_s). levels: which pairs, "uniform" or "lognormal" in q by `noise`, its
        mean and deviation. momentum: of f-, an average of the student; 0 for the student itself, which short runs find
        less steady; "root" moves it towards 1 as N grows. lr: peak rate. steps: of the sampler that is recommended.

    Papers: CD momentum=0 (pixels of 32) or nodes=40, momentum=.95 (of 64); CT mode=training, curriculum=root, first=2,
    nodes=150, momentum=.9; improved CT mode=training, curriculum=doubling, nodes=1280, weight=gap, levels=lognormal,
    momentum=0; ECT mode=training, curriculum=ect, weight=gap, momentum=0. All evaluate an average of the weights.
    Cost: 6 evaluations a step of training and image with Heun's step, 5 with Euler's, 4 in training.
    Raises BadInput for options that do not fit.

    Reference: Song, Dhariwal, Chen, Sutskever 2023, arXiv:2303.01469; Song, Dhariwal 2024, arXiv:2310.14189; Geng,
    Pokle, Luo, Lin, Kolter 2024, arXiv:2406.14548.
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
    lr: float = 3e-4
    steps: int = 2
    needs_data: ClassVar[bool] = True
    on_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise BadInput(
                    f"consistency: unknown {name} {getattr(self, name)!r}: {nearest(getattr(self, name), known)}"
                )
        if self.curriculum == "ect" and self.mode != "training":
            raise BadInput("consistency: curriculum=ect has gaps too wide for a step of the teacher: use mode=training")
        if min(self.nodes, self.stages, self.steps) < 1 or not self.first >= 2:
            raise BadInput("consistency needs nodes, stages and steps of at least 1, and first of at least 2")
        if self.curriculum in ("root", "doubling") and self.first > self.nodes:
            raise BadInput(f"consistency: nodes grow from first={self.first} to nodes={self.nodes}, which is less")
        if not 0 <= self.momentum < 1 or not self.c >= 0 or not self.noise[1] > 0:
            raise BadInput("consistency needs momentum in [0, 1), c of at least 0, and a deviation of noise above 0")

    @property
    def teacher_steps(self) -> int | None:
        """In training the teacher only lends its weights."""
        return 0 if self.mode == "training" else None

    def distill(self, task: Task) -> Student:
        """Train the one stage `consistency`; its student."""
        student = anchored(task.student())
        player: Counted = EMATarget(student) if self.momentum else Counted(student)
        # weights by the gap span orders of magnitude, and a limit for all would undo them
        clip = 1.0 if self.weight == "one" else None
        players = [task.player("student", player, self.lesson(task, player), self.lr)]
        trained: Any = task.fit("consistency", players, clip=clip)["student"]
        own = (1.0, 1.0) if self.mode == "training" else None
        made = Student(trained.student, "consistency", "angle", self.steps, guidance=own)
        task.keep("consistency", made)
        return made

    def lesson(self, task: Task, player: Counted, name: str = "consistency") -> Callable[[dict[str, Tensor]], Tensor]:
        """The loss of the stage; how far the run is comes from the count of `player`."""
        schedule, student = task.schedule, player.student
        rough = has_dropout(student)

        def lesson(batch: dict[str, Tensor]) -> Tensor:
            k = player.begun()
            total = max(budget(task, name), k + 1)
            if isinstance(player, EMATarget):
                player.update(self.following(k, total), corrected=False)
            else:
                player.tick()
            x, cond = batch["x"], task.cond(batch)
            t, s = self.times(schedule, len(x), k, total, clock(x))
            eps = torch.randn_like(x)
            z = noised(schedule, x, t, eps)
            seed = int(torch.randint(2**62, ())) if rough else None
            with same_dropout(seed):
                answer = student(z, t, **cond)
            with torch.no_grad(), same_dropout(seed):
                if self.mode == "training":
                    below = noised(schedule, x, s, eps)
                else:
                    below = SOLVERS[self.solver](task.teacher, schedule, z, t, s, **cond)
                itself = player.copy if isinstance(player, EMATarget) else student
                # by definition the clean end is its own answer, whatever is rounded on the way
                target = torch.where(spread((s == 0).double(), z) > 0, below, itself(below, s, **cond))
            apart = distance(answer, target, self.metric, self.c)
            if self.weight == "one":
                return apart.mean()
            gap = level(schedule, t) - level(schedule, s)
            return (apart / gap.to(apart.device, torch.float32)).mean()

        return lesson

    def count(self, k: int, total: int) -> int:
        """N at step k of `total`."""
        if self.curriculum == "root":
            return root_count(k / total, self.first, self.nodes)
        if self.curriculum == "doubling":
            return doubling_count(k, total, self.first, self.nodes)
        return self.nodes

    def following(self, k: int, total: int) -> float:
        """The momentum of f- at step k of `total`."""
        if self.curriculum == "root":
            return root_momentum(self.count(k, total), self.first, self.momentum)
        return self.momentum

    def times(
        self, schedule: Any, n: int, k: int, total: int, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """The upper and the lower times (n,) of n pairs, drawn at step k of `total`."""
        if self.curriculum == "ect":
            t = LogNormal(*self.noise)(schedule, torch.rand(n, dtype=torch.float64, device=device))
            return t, schedule.time(-torch.log(ect_lower(level(schedule, t), k * self.stages // total)))
        times, levels = pairs(self.grid, schedule, self.count(k, total), str(device))
        if self.levels == "lognormal":
            i = torch.multinomial(lognormal_shares(levels, *self.noise), n, replacement=True)
        else:
            i = torch.randint(len(times) - 1, (n,), device=device)
        return times[i + 1], times[i]


def anchored(student: Denoiser) -> Denoiser:
    """The student itself, or, where its network predicts x0, one that says x_t at t = 0 whatever the network says."""
    if not isinstance(student.prediction, X0):
        return student
    schedule = student.schedule
    return student.replace(prediction=Anchored(float(schedule.q(schedule.t_min))))


def budget(task: Task, name: str) -> int:
    """Steps of the stage, 1 where nobody has decided yet."""
    try:
        return task.steps[name]
    except KeyError:
        return 1


def has_dropout(module: nn.Module) -> bool:
    """Whether what the module says depends on chance."""
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules())


@contextlib.contextmanager
def same_dropout(seed: int | None) -> Iterator[None]:
    """Draws inside are those of `seed`, and leave no trace outside; None: as ever."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
