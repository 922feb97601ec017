"""What a distiller is given (`Task`) and what it returns (`Student`)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..distributed.ranks import Ranks
from ..errors import BadInput
from ..nets.critic import label_count
from ..nets.scalar_inputs import ScalarInputs, with_scalars
from ..train.checkpoint import load_modules, save_modules
from ..train.data import Batches
from ..train.ema import Ema
from ..train.fit import Fit
from ..train.trained_module import TrainedModule
from ._pairs import Pairs, make

Loss = Callable[[dict[str, Tensor]], Tensor]
STUDENT = "student.safetensors"
# what the players of a step leave in its batch for one another
RESERVED = ("fake", "t", "z", "chain", "advantage", "k")


@dataclass
class Student:
    """A distilled denoiser and how to sample from it.

    sampler, times, steps: as `pick` spells them; they become the model's recommended ones and its plan.
    guidance: the guidance scales (low, high) that the network takes as its input `guidance`, or equal ones where the
        scale is built in; None: the task's own scale is built in.
    parts: small networks to keep with the model, by name. figures: JSON scalars about this student.
    any_time: it is a denoiser at every time, as its teacher was, and not only at the nodes of its own steps.
    """

    denoiser: Denoiser
    sampler: str
    times: str
    steps: int
    guidance: tuple[float, float] | None = None
    parts: dict[str, nn.Module] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    any_time: bool = False


class Distiller(Protocol):
    """What every file of `distillers/` holds: a frozen dataclass of this form, with the paper's numbers as defaults.

    needs_data: it trains on real images (where it does not, their labels and number are all that it is given).
    ranged: it can keep the range of guidance scales of a network that takes one as an input. Default: it cannot.
    whole_batches: its loss is no mean over images, but compares those of a batch. Default: it does not.
    on_samples: its loss compares samples, in which the error of an eps network is sigma / alpha times as large: at the
        noisy end of DDPM's table 150 times. Default: it does not.
    teacher_steps: at which times it asks its teacher: an int k, at the nodes of k steps on the trailing grid alone, so
        that a student of k steps can be its teacher; 0, never (the teacher only lends its weights); None, anywhere.
        Default: None.
    adds_inputs: its students' networks take further inputs (a guidance scale, a number of steps), or are networks of
        another kind, so that a student of a network of diffusers is saved as a hasten folder. Default: they do not.
    direction: "decode", its students go from noise to data, or "encode", the other way. Default: "decode".

    All but the first may be class attributes or properties; `option` reads them with their defaults.
    """

    needs_data: bool

    def distill(self, task: Task) -> Student: ...


DEFAULTS: dict[str, Any] = {"ranged": False, "teacher_steps": None, "adds_inputs": False, "direction": "decode"}


def option(distiller: Any, name: str) -> Any:
    """A field of the `Distiller` protocol, or its default."""
    return getattr(distiller, name, DEFAULTS[name])


@dataclass
class Task:
    """A teacher to imitate, the data, and `fit`, which trains a stage, skips it where it is done, or resumes it.

    teacher: frozen; `teacher(x_t, t, **cond) -> x0` is what to imitate, guidance included.
    denoiser: frozen; the network without guidance, from which students are copied.
    init: frozen; what the first student is copied from in place of `denoiser`, see `initial`.
    guidance_scale: of `teacher`. shape: (C, H, W). batches: `batches[k]` is a batch `{"x": ..., "label": ...}`.
    out: folder of the run. steps: by stage, how many steps of training it gets.
    keep: told of every finished student: `keep(name, student)`.
    accumulate, shard: see `Fit`. ranks: the processes that share every batch, and make the pairs; the first one writes,
        and all see `out`.
    classes: how many classes there are, their labels counted from 0; None: what the network or the data say.
    codec: of the samples, as a model has it. Only samples of "image" lie in [-1, 1] and may be kept in 8 bits.
    minutes: by stage, the most that its training may take; a stage that is slower than planned ends early.
    tensorboard: write event files beside the logs of the stages, where the package is installed.

    What is trained has float32 weights whatever the teacher's are, and so have its averages and the students.
    """

    teacher: nn.Module
    denoiser: Denoiser
    batches: Batches
    shape: tuple[int, ...]
    out: Path
    guidance_scale: float = 1.0
    steps: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    precision: str = "fp32"
    device: str | None = None
    show: bool = True
    keep: Callable[[str, Student], None] = lambda name, student: None
    done: list[str] = field(default_factory=list)
    accumulate: int = 1
    shard: bool = False
    ranks: Ranks = field(default_factory=lambda: Ranks(torch.device("cpu")))
    init: Denoiser | None = None
    classes: int | None = None
    codec: str | None = None
    minutes: dict[str, float] = field(default_factory=dict)
    tensorboard: bool = True

    @property
    def initial(self) -> Denoiser:
        """What the first student begins as: `init` where there is one, else `denoiser`."""
        return self.denoiser if self.init is None else self.init

    @property
    def schedule(self) -> Any:
        """Of the denoiser."""
        return self.denoiser.schedule

    @property
    def batch_size(self) -> int:
        """Images in a batch."""
        return self.batches.batch_size

    def student(self, of: Denoiser | None = None, **changes: Any) -> Denoiser:
        """A trainable copy of `of` (default: `initial`).

        changes: inputs that the copy takes in addition, `guidance=(1, 5)` and `steps=(4, 2)`. A network whose
        constructor has such arguments is built with them; any other is wrapped (`nets.scalar_inputs`). At first the
        copy answers as its source, whatever it is given there.
        """
        source = self.initial if of is None else of
        if not changes:
            return copy.deepcopy(source).requires_grad_(True)
        net = with_inputs(source.net, self.shape, **changes)
        ranged = {"guidance_range": None} if "guidance" in changes else {}
        return source.replace(net=net, **ranged).requires_grad_(True)

    @property
    def label_count(self) -> int:
        """How many labels a batch may hold, counted from 0: 0 where batches have none.

        The task's `classes`, where it says so; else the most that the network's classes, its null label (which may be
        any of the labels, 0 too), the data's classes and the labels themselves ask for.
        """
        batch = self.batches[0]
        if "label" not in batch:
            return 0
        if self.classes:
            return self.classes
        data = getattr(self.batches, "data", None)
        labels = getattr(data, "labels", None)
        labels = batch["label"] if labels is None else labels
        classes = getattr(data, "classes", None) or ()
        return max(label_count(self.denoiser), len(classes), int(labels.max()) + 1)

    def one_cond(self) -> dict[str, Tensor]:
        """What the networks are told with one sample: the first of the data's, on their device."""
        device = next(self.denoiser.parameters(), torch.zeros(())).device
        return {key: value[:1].to(device) for key, value in self.cond(self.batches[0]).items()}

    def cond(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of a batch the networks are told: its labels, where it has any."""
        return {"label": batch["label"]} if "label" in batch else {}

    def player(
        self, name: str, module: nn.Module, loss: Loss, lr: float, every: int = 1, **options: Any
    ) -> TrainedModule:
        """A `TrainedModule` with the settings that distillation wants: AdamW without decay, float32 weights.

        options: of `TrainedModule`."""
        widened(module)
        return TrainedModule(name, module, loss, **{"lr": lr, "every": every, "weight_decay": 0.0, **options})

    def fit(
        self,
        name: str,
        players: list[TrainedModule],
        share: float = 1.0,
        batches: Any = None,
        ema: Ema | None = None,
        decay: str = "cosine",
        clip: float | None = 1.0,
    ) -> dict[str, nn.Module]:
        """Train the stage `name`; the players' averaged modules by player's name, frozen, in eval mode.

        share: of the budget, relative to the other stages' shares. batches: in place of the task's own.
        A stage that was finished before is read, one that was interrupted goes on; the result is the same.
        """
        refuse_keys(self.batches if batches is None else batches)
        number = len(self.done)
        self.done.append(name)
        folder = self.out / "stages" / f"{number}-{name}"
        steps = self.steps[name]
        finished = folder / STUDENT
        if self.ranks.on_main_process(finished.is_file):
            modules = {p.name: p.module for p in players}
            load_modules(modules, finished)
        else:
            fit = Fit(
                steps=steps, warmup=max(1, min(100, steps // 20)), precision=self.precision, decay=decay, clip=clip,
                ema=ema or Ema(), seed=self.seed * 1009 + number, device=self.device, tensorboard=self.tensorboard,
                accumulate=self.accumulate, shard=self.shard, minutes=self.minutes.get(name),
            )  # fmt: skip
            modules = fit(players, self.batches if batches is None else batches, folder, self.show)
            if self.ranks.is_main_process:
                save_modules(modules, finished)
                (folder / "checkpoint.pt").unlink(missing_ok=True)
            self.ranks.barrier()
        # what is drawn between the stages must not depend on whether this one was trained, resumed or read
        torch.manual_seed(self.seed * 1009 + number)
        return {key: module.eval().requires_grad_(False) for key, module in modules.items()}

    def pairs(self, name: str, count: int, **how: Any) -> Pairs:
        """Noise and where the teacher takes it, from the store in `out`; made, or completed, where it lacks any.

        count: pairs. how: as `distillers._pairs.make` takes it.
        """
        return make(self, self.out / "pairs" / name, count, **how)


def widened(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers of less than 32 bits made float32, in place.

    A step of training is smaller than what half precision can tell apart: the weights would not move, or drift.
    Raises BadInput for weights of 8 bits, which hooks of the network would narrow again at every call.
    """
    for name, p in module.named_parameters():
        if p.is_floating_point() and p.itemsize < 2:
            raise BadInput(
                f"the weights {name} are {str(p.dtype).removeprefix('torch.')} (layer-wise casting), which cannot be "
                "trained: load the network in float32, bfloat16 or float16"
            )
    return module._apply(lambda value: value.float() if value.is_floating_point() and value.itemsize < 4 else value)


def refuse_keys(batches: Any) -> None:
    """Refuse batches with keys in which the distillers leave values of their own. Raises BadInput."""
    taken = sorted(set(RESERVED) & set(batches[0]))
    if taken:
        raise BadInput(
            f"the batches have the key {taken[0]!r}, in which distillers keep values of their own: call it something "
            f"else (and none of {', '.join(key for key in RESERVED if key != taken[0])})"
        )


def notes(distiller: Any, denoiser: nn.Module, batch_size: int, parts: int) -> list[str]:
    """What a person should know before a run: lines about the weights' type and about batches that are divided.

    parts: into which every batch is divided: processes, times accumulate.
    """
    lines = []
    narrow = {p.dtype for p in denoiser.parameters() if p.is_floating_point() and p.itemsize < 4}
    if narrow:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrow))
        lines.append(f"the teacher's weights are {names}: students are trained and saved in float32")
    if parts > 1 and getattr(distiller, "whole_batches", False):
        name = type(distiller).__name__.lower()
        lines.append(
            f"{name} compares the images of a batch with one another: divided into {parts} parts (processes, times "
            f"accumulate), it sees {batch_size // parts} of the {batch_size} at once"
        )
    prediction: Any = getattr(denoiser, "prediction", None)
    schedule: Any = getattr(denoiser, "schedule", None)
    if getattr(distiller, "on_samples", False) and prediction is not None and prediction.name == "eps":
        grown = float(schedule.q(schedule.t_max))
        lines.append(
            f"{type(distiller).__name__.lower()} compares samples, in which the error of a network that predicts eps "
            f"is {grown:.3g} times as large at the noisy end: its students may be much worse than those of "
            "progressive, tract or guided"
        )
    return lines


def with_inputs(net: nn.Module, shape: Sequence[int], **inputs: Any) -> nn.Module:
    """A copy of the network that takes `guidance` and `steps` as inputs, with its weights; zero where they are new."""
    config, wanted = getattr(net, "config", None), inspect.signature(type(net).__init__).parameters
    if isinstance(net, ScalarInputs):
        made: nn.Module = with_scalars(copy.deepcopy(net.net), shape, **{**scalars_of(net), **inputs})
    elif isinstance(config, Mapping) and all(name in wanted for name in inputs):
        made = type(net)(**{**config, **inputs})
    else:
        return with_scalars(copy.deepcopy(net), shape, **inputs)
    made.to(next(net.parameters()).device)
    made.load_state_dict(net.state_dict(), strict=False)
    return made


def scalars_of(net: ScalarInputs) -> dict[str, Any]:
    """The inputs that such a network takes already."""
    found = {"guidance": net.guidance_range, "steps": net.step_counts}
    return {name: value for name, value in found.items() if value is not None}
