"""Diffusion sampling by a neural operator: the whole path from one model evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import BadInput, check_choice
from ..nets.temporal import TemporalUNet
from ..nets.unet import UNet
from ..predictions import X0, spread
from ..schedules.base import Schedule
from ._targets import time_device
from ._task import Distiller, DistillTask, Loss, Student

__all__ = ["DSNO"]

LOSSES = ("l1", "l2")


@dataclass(frozen=True)
class DSNO(Distiller):
    """A student that predicts several states z_{t_1}, ..., z_{t_T} = x of the teacher's path at once, from z at t_max:

        L = sum_m w_m | Z_m(z) - z_{t_m} | / sum_m w_m,    w_m = clip(sqrt(SNR(t_m)), 1, largest)

    The network is the teacher's U-Net, once for each state with that state's time, and after each of its stages a
    convolution along the path in the Fourier domain (`nets.temporal`). Its last state is the clean end, which one step
    of sampling returns; the earlier ones help it learn the path. The teacher's paths are generated once.

    Paper: 512 DDIM steps, quadratic times, states at .5625, .25, .0625 and 0, a perceptual loss (l1 here); Adam 2e-4.
    Cost: 3 (T + 1) model evaluations a training step and image, pair_steps a path, and the work of T + 1 evaluations at
    sampling time, all in one call.

    Args:
        states: times of the states before the end, on the teacher's grid.
        modes: of the convolutions, of which T // 2 + 1 make sense.
        pairs: number of paths.
        pair_steps, sampler, times: of the teacher; ddim, dpm or deis.
        loss: `"l1"` or `"l2"`.
        largest: bound of the weights, which is the weight of the end.
        lr: peak learning rate.

    Raises:
        BadInput: for a network that is no hasten U-Net or is preconditioned as in EDM, and options out of range.

    References:
        Zheng, Nie, Vahdat, Azizzadenesheli, Anandkumar 2023, arXiv:2211.13449.
    """

    states: tuple[float, ...] = (0.5625, 0.25, 0.0625)
    modes: int = 2
    pairs: int = 16384
    pair_steps: int = 32
    sampler: str = "dpm"
    times: str = "trailing"
    loss: str = "l1"
    largest: float = 1e4
    lr: float = 2e-4
    needs_data: ClassVar[bool] = False
    adds_inputs: ClassVar[bool] = True  # a network of another kind

    def __post_init__(self) -> None:
        check_choice("loss of dsno", self.loss, LOSSES)
        if any(not 0 < b < a <= 1 for a, b in zip((1.0, *self.states), self.states)):
            raise BadInput(f"dsno: states must be decreasing times in (0, 1), got {self.states}")
        if self.modes < 1 or self.pairs < 1 or not self.largest >= 1:
            raise BadInput("dsno needs modes, pairs and largest of at least 1")

    @property
    def teacher_steps(self) -> int | None:
        """The teacher is evaluated at the times of the pairs."""
        return self.pair_steps if (self.sampler, self.times) == ("ddim", "trailing") else None

    def distill(self, task: DistillTask) -> Student:
        """Generate the paths and train the stage `student`."""
        student: Any = self.student(task)
        pairs = task.pairs(
            "paths", self.pairs, steps=self.pair_steps, sampler=self.sampler, times=self.times, states=self.states
        )
        modules = [task.trained_module("student", student, self.loss_fn(task, student), self.lr)]
        batches = pairs.batches(task.batch_size, task.seed)
        # not clipped, as in the paper: with the weights above the last state alone would decide the norm
        trained: Any = task.fit("student", modules, batches=batches, clip=None)["student"]
        result = Student(trained, "ddim", "trailing", 1, figures={"paths": len(pairs), "states": len(self.states) + 1})
        task.save_student("student", result)
        return result

    def student(self, task: DistillTask) -> Denoiser:
        """The network of all states, with the teacher's weights where it has them."""
        source = task.denoiser
        net: Any = source.net
        if type(net) is not UNet:
            kind = type(getattr(net, "net", net)).__name__
            raise BadInput(f"dsno adds its blocks to a UNet of hasten.nets, found {kind}: use denoising_student for it")
        if source.prediction.name == "edm":
            raise BadInput(
                "dsno: the network's outputs are the states, so it cannot be preconditioned as in EDM: found an edm "
                "prediction"
            )
        time_inputs = [float(source.time_input(t)) for t in (*self.states, 0.0)]
        start = float(source.time_input(source.schedule.t_max))
        student = TemporalUNet(states=time_inputs, start=start, modes=self.modes, **net.config)
        student.load_state_dict(net.state_dict(), strict=False)
        if source.prediction.name == "v":  # at the start of the path v is -x
            with torch.no_grad():
                for parameter in student.conv_out.parameters():
                    parameter.neg_()
        device = next(net.parameters()).device
        return source.replace(net=student.to(device), prediction=X0()).requires_grad_(True)

    def loss_fn(self, task: DistillTask, student: Any) -> Loss:
        """The loss of all states."""
        weights = self.weights(task.schedule)

        def loss_fn(batch: dict[str, Tensor]) -> Tensor:
            noise, target = batch["noise"], torch.cat([batch["states"], batch["x"][:, None]], 1)
            t = torch.full((len(noise),), task.schedule.t_max, dtype=torch.float64, device=time_device(noise))
            z = noise * spread(task.schedule.prior_std(t), noise)
            time = student.time_input(t).to(noise.device, torch.float32)
            error = student.net.path(z, time, **task.cond(batch)).float() - target
            error = (error.abs() if self.loss == "l1" else error.square()).flatten(2).mean((0, 2))
            return (weights.to(error.device, torch.float32) * error).sum()

        return loss_fn

    def weights(self, schedule: Schedule) -> Tensor:
        """w_m over their sum, float64 (T + 1,)."""
        snr = torch.exp(schedule.lam(torch.tensor([*self.states, 0.0], dtype=torch.float64)))
        weights = snr.clamp(1.0, self.largest)
        return weights / weights.sum()
