"""Rectified flow: straighten the teacher's paths by training on its own samples, then follow them in one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import BadInput, check_choice
from ..predictions import spread
from ..schedules.base import Schedule
from ..times import Trailing
from ..train.coupling import COUPLINGS, couple
from ..train.losses import stratified
from ._pairs import Pairs
from ._targets import DeviceTimes, time_device, time_nodes
from ._task import Distiller, DistillTask, Student
from .denoising_student import LOSSES, generate, one_step_student, regression_error

__all__ = ["ReFlow"]


@dataclass(frozen=True)
class ReFlow(Distiller):
    """Rounds of rectified flow on pairs (e, x), x the sample of the model of the round before from the noise e:

        L = E | v(y_u, u) - (e - x) |^2,   y_u = (1 - u) x + u e,   u uniform in (0, 1]

    which preserves the distribution of x, increases no transport cost, and straightens the paths. With y = z / (alpha +
    sigma) and u = sigma / (alpha + sigma) every schedule has these straight lines, z = alpha x + sigma e, a DDIM step
    is an Euler step in u, and v = (z - (alpha + sigma) x0) / sigma. So the student keeps the teacher's schedule and
    prediction, begins as the teacher itself, which is the first rectified flow, and is sampled with DDIM. (The output
    of an eps network is read as v from then on, since eps is uninformative at alpha = 0.)

    Paper: 1,000,000 pairs, Adam 2e-4, warm-up 5000, average .9999; the first flow trained from data.
    Cost: 3 model evaluations a training step and image, and the steps of a pair.

    Figures: `straightness` S = mean |(y_1 - y_0) - v|^2 along the flow's own paths, of the last flow and of the teacher
    (0: one step is exact).

    Args:
        rounds: of reflow, each on pairs of the model before it.
        pairs: number of pairs a round.
        pair_steps, sampler, times: of the teacher's sampling of pairs.
        own_steps: steps of DDIM of a student's sampling of pairs.
        coupling: `"ot"` or `"ot_class"`: first train on real images, paired with noise by `train.coupling`, and begin
            from that flow; `"none"`: begin from the teacher.
        distill_last: at the end, train at the `steps` times alone, on pairs of the last flow: for one step, with `loss`
            between the step and the sample.
        steps: of the student that is returned.
        loss: `"l1"` or `"l2"`.
        lr: peak learning rate of each stage.

    Raises:
        BadInput: for unknown choices, numbers out of range, and a coupling under guidance.

    References:
        Liu, Gong, Liu 2022, arXiv:2209.03003.
        Liu et al. 2023, arXiv:2309.06380, for one-step distillation after it.
    """

    rounds: int = 1
    pairs: int = 16384
    pair_steps: int = 16
    sampler: str = "unipc"
    times: str = "angle"
    own_steps: int = 8
    coupling: str = "none"
    distill_last: bool = True
    steps: int = 1
    loss: str = "l2"
    lr: float = 3e-4
    compares_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("coupling of reflow", self.coupling, COUPLINGS)
        check_choice("loss of reflow", self.loss, LOSSES)
        if min(self.rounds + (self.coupling != "none"), self.steps, self.own_steps, self.pairs) < 1 or self.rounds < 0:
            raise BadInput("reflow needs steps, own_steps and pairs of at least 1, and a round or a coupling")

    @property
    def needs_data(self) -> bool:
        """A coupling trains on real images; pairs do not."""
        return self.coupling != "none"

    @property
    def compares_batch(self) -> bool:
        """A coupling assigns the noise to the images of a batch."""
        return self.coupling != "none"

    @property
    def teacher_steps(self) -> int | None:
        """With a coupling the teacher only provides initial weights; else it is evaluated at the times of the pairs."""
        if self.coupling != "none":
            return 0
        return self.pair_steps if (self.sampler, self.times) == ("ddim", "trailing") else None

    def distill(self, task: DistillTask) -> Student:
        """Train the stages `flow` (with a coupling), `reflow1`, ..., `distill`, and return the last student."""
        teacher: nn.Module = task.teacher
        source, result = task.initial, None
        figures = {"straightness_teacher": straightness(teacher, *straightness_inputs(task))}
        if self.coupling != "none":
            if task.guidance_scale != 1:
                raise BadInput(
                    f"reflow with a coupling learns from real images, without guidance: guidance_scale must be 1, got "
                    f"{task.guidance_scale:g}"
                )
            trained = self.stage(
                task,
                "flow",
                source,
                lambda b: couple(b["x"], torch.randn_like(b["x"]), self.coupling, b.get("label")),
                None,
            )
            teacher, source, result = trained, trained, self.flow_student(task, "flow", trained, figures)
        for number in range(1, self.rounds + 1):
            pairs = self.pairs_of(task, f"round{number}", teacher)
            trained = self.stage(task, f"reflow{number}", source, lambda batch: batch["noise"], pairs)
            teacher, source = trained, trained
            result = self.flow_student(task, f"reflow{number}", trained, figures)
        if self.distill_last:
            pairs = self.pairs_of(task, "last", teacher)
            nodes = time_nodes(Trailing(), task.schedule, self.steps)[1:]
            trained = self.stage(task, "distill", source, lambda batch: batch["noise"], pairs, nodes)
            result = Student(trained, "ddim", "trailing", self.steps, figures=dict(figures))
            task.save_student("distill", result)
        assert result is not None
        return result

    def stage(
        self,
        task: DistillTask,
        name: str,
        source: Denoiser,
        noise: Callable[[dict[str, Tensor]], Tensor],
        pairs: Pairs | None,
        nodes: Tensor | None = None,
    ) -> Any:
        """One stage: a copy of `source` trained on real images, or on pairs; at all times, or at `nodes` alone."""
        student = one_step_student(task.student(source))
        grid = DeviceTimes(torch.ones(1) if nodes is None else nodes)

        def loss_fn(batch: dict[str, Tensor]) -> Tensor:
            x, cond = batch["x"], task.cond(batch)
            if nodes is not None and len(nodes) == 1:
                return regression_error(generate(student, noise(batch), **cond), x, self.loss)
            if nodes is None:
                t = flow_times(task.schedule, stratified(len(x), time_device(x))).clamp_min(task.schedule.t_min)
            else:
                times = grid.at(x)
                t = times[torch.randint(len(times), (len(x),), device=times.device)]
            return flow_loss(student, x, noise(batch), t, **cond)

        batches = None if pairs is None else pairs.batches(task.batch_size, task.seed)
        return task.fit(name, [task.trained_module("student", student, loss_fn, self.lr)], batches=batches)["student"]

    def pairs_of(self, task: DistillTask, name: str, teacher: nn.Module) -> Pairs:
        """Pairs of the task's teacher, or of a student."""
        if teacher is task.teacher:
            return task.pairs(name, self.pairs, steps=self.pair_steps, sampler=self.sampler, times=self.times)
        return task.pairs(name, self.pairs, steps=self.own_steps, sampler="ddim", times="trailing", teacher=teacher)

    def flow_student(self, task: DistillTask, name: str, flow: Any, figures: dict[str, Any]) -> Student:
        """A flow as a student that can be sampled from."""
        figures["straightness"] = straightness(flow, *straightness_inputs(task))
        result = Student(flow, "ddim", "trailing", self.steps, figures=dict(figures), any_time=True)
        task.save_student(name, result)
        return result


def flow_times(schedule: Schedule, u: Tensor) -> Tensor:
    """The times at which `sigma / (alpha + sigma)` is u in [0, 1], float64, of the shape of u."""
    u = u.double().clamp(1e-12, 1 - 1e-12)
    return schedule.time(torch.log1p(-u) - torch.log(u)).clamp_max(schedule.t_max)


def flow_loss(student: Any, x: Tensor, noise: Tensor, t: Tensor, **cond: Any) -> Tensor:
    """`| v - (noise - x) |^2` per dimension, a scalar, at the points alpha x + sigma noise of the times t (B,), t > 0.

    It is the squared error of x0 times ((alpha + sigma) / sigma)^2, applied to the network's output, so that nothing is
    divided by a small number.
    """
    alpha, sigma = student.schedule.alpha(t), student.schedule.sigma(t)
    z = spread(alpha, x) * x + spread(sigma, x) * noise
    raw = student.raw(z, t, **cond)
    error = (raw - student.prediction.target(x, noise, alpha, sigma).to(raw.dtype)).float().square().flatten(1).mean(1)
    _, _, c_out = student.prediction.coefficients(alpha, sigma)
    return ((c_out * (alpha + sigma) / sigma).square().to(error.device, torch.float32) * error).mean()


def straightness_inputs(task: DistillTask, count: int = 64) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise (count, *S) to measure straightness from, and its labels where the task has classes."""
    batch, n = task.batches[0], min(count, task.batch_size)
    device = next(task.denoiser.parameters(), torch.zeros(())).device
    generator = torch.Generator().manual_seed(task.seed)
    noise = torch.randn(n, *task.shape, generator=generator).to(device)
    return noise, {key: value[:n].to(device) for key, value in task.cond(batch).items()}


@torch.no_grad()
def straightness(denoiser: Any, noise: Tensor, cond: dict[str, Tensor], steps: int = 8) -> float:
    """S, the mean over Euler's path of `|(y_1 - y_0) / u_1 - v|^2` per dimension, from normal noise (B, *S)."""
    schedule = denoiser.schedule
    first = float(torch.sigmoid(-schedule.lam(schedule.t_max)))
    nodes = torch.linspace(first, 0, steps + 1, dtype=torch.float64)
    start = y = noise * float(schedule.prior_std(schedule.t_max)) / path_scale(schedule, schedule.t_max)
    velocities = []
    for u, after in zip(nodes.tolist(), nodes[1:].tolist()):
        t = float(flow_times(schedule, torch.tensor(u, dtype=torch.float64)))
        x0 = denoiser(y * path_scale(schedule, t), torch.tensor(t, dtype=torch.float64), **cond)
        velocities.append((y - x0) / u)
        y = y + (after - u) * velocities[-1]
    chord = (start - y) / first
    return float(torch.stack([(chord - v).square().mean() for v in velocities]).mean())


def path_scale(schedule: Schedule, t: float) -> float:
    """`alpha + sigma`, by which z is divided to lie on the straight path."""
    return float(schedule.alpha(t) + schedule.sigma(t))
