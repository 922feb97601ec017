"""The input of a distiller (`DistillTask`), its result (`Student`) and its base class (`Distiller`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..distributed.ranks import Ranks
from ..nets.critic import label_count
from ..nets.lora import add_lora, base_parameters, lora_layers
from ..train.checkpoint import load_modules, save_modules
from ..train.data import Batches
from ..train.ema import Ema
from ..train.fit import Fit
from ..train.sadm import Sadm
from ..train.trained_module import TrainedModule
from ._batch_keys import check_batch_keys
from ._conditions import ConditionSource, both_branches, condition_source, unconditional
from ._memory import checkpoint_gradients, to_float32
from ._pair_making import make_pairs
from ._pairs import Pairs
from ._scalar_inputs import with_scalar_inputs
from ._student import Student

__all__ = ["DistillTask", "Distiller", "Loss", "Student"]

Loss = Callable[[dict[str, Tensor]], Tensor]
STUDENT_FILE = "student.safetensors"


class Distiller(Protocol):
    """Base of every method in `distillers/`: a frozen dataclass with the paper's numbers as its defaults.

    A method overrides the properties below, with class attributes or properties of its own, where their defaults do
    not hold for it.
    """

    @property
    def needs_data(self) -> bool:
        """Whether it trains on real samples; where not, only their labels and their number are passed to it."""
        ...

    @property
    def keeps_guidance_range(self) -> bool:
        """Whether its students keep the range of guidance scales of a network that takes the scale as an input."""
        return False

    @property
    def compares_batch(self) -> bool:
        """Whether its loss compares the samples of a batch with one another and is not a mean over them."""
        return False

    @property
    def compares_samples(self) -> bool:
        """Whether its loss compares x0, in which the error of an eps network is sigma / alpha times as large.

        At the noisy end of DDPM's table that is a factor of 150.
        """
        return False

    @property
    def takes_structure(self) -> bool:
        """Whether its students' x0 have targets, so that the relations of both can be compared (`train.sadm`)."""
        return False

    @property
    def needs_labels(self) -> bool:
        """Whether its images must have labels of the model's classes."""
        return False

    @property
    def teacher_steps(self) -> int | None:
        """The times at which the teacher is evaluated.

        k: the nodes of k steps of the trailing grid, so that a student of k steps can be the teacher. 0: never, the
        teacher only provides initial weights. None: any time.
        """
        return None

    @property
    def adds_inputs(self) -> bool:
        """Whether its students' networks take further inputs (a guidance scale, a number of steps) or are of another
        class, so that a student of a diffusers network is saved as a hasten folder."""
        return False

    @property
    def adds_guidance_only(self) -> bool:
        """Whether the only input that `adds_inputs` speaks of is the guidance scale, which a text-conditioned U-Net of
        diffusers can have."""
        return False

    @property
    def direction(self) -> str:
        """`"decode"`: the students map noise to data; `"encode"`: data to noise."""
        return "decode"

    def distill(self, task: DistillTask) -> Student:
        """Train the stages of the method on a task and return the last student."""
        ...


@dataclass
class DistillTask:
    """A teacher to imitate, the data, and `fit`, which trains a stage, loads it where it is finished, or resumes it.

    What is trained has float32 weights whatever the dtype of the teacher's, and so have the averages and the students.

    Args:
        teacher: frozen; `teacher(x_t, t, **cond) -> x0` is the target, guidance included.
        denoiser: frozen; the network without guidance, from which students are copied.
        batches: `batches[k]` is a batch `{"x": (B, *S) float32, "label": (B,) int64}`, with further conditions by name.
        shape: S of one sample, (C, H, W) for images.
        out: folder of the run.
        guidance_scale: of `teacher`.
        steps: training steps, by stage.
        seed: of the run.
        precision: `"fp32"` or `"bf16"` (autocast).
        device: to train on; None: the one that `Fit` picks.
        show: show progress bars.
        save_student: called as `save_student(stage, student)` with every finished student.
        completed_stages: the stages so far, in order.
        accumulate, shard: see `Fit`.
        ranks: the processes that share batches and the making of pairs; the main one writes, and all see `out`.
        init: frozen; what the first student is copied from in place of `denoiser`, see `initial`.
        classes: number of classes, with labels from 0; None: inferred from the network and the data.
        codec: of the samples, as a model has it. Only samples of `"image"` lie in [-1, 1] and may be stored as uint8.
        minutes: maximum minutes of training, by stage; a stage that is slower than planned ends early.
        tensorboard: write event files beside the logs of the stages, where the package is installed.
        lora: rank of the low-rank factors that students train in place of their weights; None: all weights.
        lora_targets: the layers that get them, see `nets.lora.target_layers`.
        conditions: names of those in a batch beside `label`, such as `text`; None: those of the data.
        null_conditions: what takes their place in the unconditional branch, (1, ...) by name. The teacher has its own.
        gradient_checkpointing: students and critics compute activations again, for less memory.
        optimizer: of everything trained, see `TrainedModule`.
        structure: options of the structure term; None: none.
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
    save_student: Callable[[str, Student], None] = lambda name, student: None
    completed_stages: list[str] = field(default_factory=list)
    accumulate: int = 1
    shard: bool = False
    ranks: Ranks = field(default_factory=lambda: Ranks(torch.device("cpu")))
    init: Denoiser | None = None
    classes: int | None = None
    codec: str | None = None
    minutes: dict[str, float] = field(default_factory=dict)
    tensorboard: bool = True
    lora: int | None = None
    lora_targets: str | None = None
    conditions: tuple[str, ...] | None = None
    null_conditions: dict[str, Tensor] = field(default_factory=dict)
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    structure: Sadm | None = None

    def __post_init__(self) -> None:
        if self.conditions is None:
            source = self.condition_source
            self.conditions = () if source is None else source.names

    @property
    def initial(self) -> Denoiser:
        """What the first student is copied from: `init` where there is one, else `denoiser`."""
        return self.denoiser if self.init is None else self.init

    @property
    def schedule(self) -> Any:
        """The denoiser's noise schedule."""
        return self.denoiser.schedule

    @property
    def batch_size(self) -> int:
        """Samples in a batch."""
        return self.batches.batch_size

    def student(self, of: Denoiser | None = None, **changes: Any) -> Denoiser:
        """A trainable copy of a denoiser; with `lora`, one of which only low-rank factors are trained.

        The copy of a denoiser with factors goes on training these: they stay relative to the weights of the first.

        Args:
            of: the denoiser to copy; None: `initial`.
            changes: further inputs of the copy's network, such as `guidance=(1, 5)` and `steps=(4, 2)`. A network whose
                constructor has these arguments is built with them, any other is wrapped (`nets.scalar_inputs`). The
                copy starts with the outputs of its source, whatever the values of the new inputs.
        """
        source = self.initial if of is None else of
        if not changes:
            if self.lora is not None:
                return self.lora_student(source)
            copied = copy.deepcopy(source)
        else:
            net = with_scalar_inputs(source.net, self.shape, **changes)
            replaced = {"guidance_range": changes["guidance"]} if "guidance" in changes else {}
            copied = source.replace(net=net, **replaced)
        if self.gradient_checkpointing:
            checkpoint_gradients(copied.net)
        return copied.requires_grad_(True)

    def lora_student(self, source: Denoiser) -> Denoiser:
        """A copy of a denoiser of which only low-rank factors are trained."""
        student = copy.deepcopy(source, {id(p): p for p in base_parameters(source)}).requires_grad_(False)
        layers = lora_layers(student.net)
        if not layers:
            assert self.lora is not None
            add_lora(student.net, self.lora, targets=self.lora_targets, seed=self.seed)
        for layer in layers.values():
            for factor in (layer.lora_A, layer.lora_B):
                factor.requires_grad_(True)
        if self.gradient_checkpointing:
            checkpoint_gradients(student.net)
        return student

    def full_copy(self, of: Denoiser) -> Denoiser:
        """A copy of a denoiser of which all weights are trained in any case: of critics."""
        copied = copy.deepcopy(of).requires_grad_(True)
        if self.gradient_checkpointing:
            checkpoint_gradients(copied.net)
        return copied

    @property
    def label_count(self) -> int:
        """Number of labels that a batch may hold, counted from 0; 0 where batches have none.

        It is `classes` where that is set, else the maximum of what the network's classes, its null label (which may be
        any label, 0 too), the data's classes and the labels themselves require.
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
        """The conditions of the first sample of the data, on the networks' device."""
        device = next(self.denoiser.parameters(), torch.zeros(())).device
        return {key: value[:1].to(device) for key, value in self.cond(self.batches[0]).items()}

    def cond(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The conditions in a batch that are passed to the networks: its labels and the embeddings of its prompts."""
        return {key: batch[key] for key in ("label", *(self.conditions or ())) if key in batch}

    @property
    def condition_source(self) -> ConditionSource | None:
        """The embedded captions of the data, by index; None where it has none."""
        return condition_source(self.batches)

    @property
    def guidable(self) -> bool:
        """Whether the plain network can be evaluated without its conditions, as guidance needs."""
        return self.denoiser.null_label is not None or bool(self.null_conditions)

    def branches(self, evaluate: Callable[..., Tensor], z: Tensor, t: Tensor, **cond: Tensor) -> tuple[Tensor, Tensor]:
        """The plain network with and without the conditions, in one batch of 2 B.

        Args:
            evaluate: `task.denoiser` for x0, `task.denoiser.raw` for its own output.
            z: (B, *S).
            t: (B,).
            cond: conditions of B rows.

        Returns:
            Both outputs, each (B, *S).
        """
        return both_branches(evaluate, z, t, cond, unconditional(cond, self.denoiser.null_label, self.null_conditions))

    def teacher_at(self, scale: Tensor) -> Callable[..., Tensor]:
        """The teacher at a guidance scale of each sample (B,): `teacher(z, t, **cond) -> x0`."""
        if self.denoiser.net_takes_guidance:
            return lambda z, t, **cond: self.denoiser(z, t, **cond, guidance=scale)

        def guided(z: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
            conditional, plain = self.branches(self.denoiser, z, t, **cond)
            return plain + scale.view(-1, *[1] * (z.ndim - 1)).to(z.dtype) * (conditional - plain)

        return guided

    def trained_module(
        self, name: str, module: nn.Module, loss: Loss, lr: float, every: int = 1, **options: Any
    ) -> TrainedModule:
        """A `TrainedModule` with the defaults of distillation: AdamW without weight decay, float32 weights.

        Args:
            name: of the module in the checkpoint and of its loss in the log.
            module: to train; its weights are made float32, in place.
            loss: `batch -> scalar`.
            lr: peak learning rate.
            every: the module is updated at the steps that this divides.
            options: further arguments of `TrainedModule`.
        """
        to_float32(module)
        defaults = {"lr": lr, "every": every, "weight_decay": 0.0, "optimiser": self.optimizer, "muon_lr": 20 * lr}
        return TrainedModule(name, module, loss, **{**defaults, **options})

    def fit(
        self,
        name: str,
        modules: list[TrainedModule],
        budget_weight: float = 1.0,
        batches: Any = None,
        ema: Ema | None = None,
        decay: str = "cosine",
        clip: float | None = 1.0,
    ) -> dict[str, nn.Module]:
        """Train a stage, resume it where it was interrupted, or load it where it is finished; the result is the same.

        Args:
            name: of the stage.
            modules: what is trained, each with its loss.
            budget_weight: share of the training budget, relative to the other stages'.
            batches: in place of the task's own.
            ema: average of the weights; None: `Ema()`.
            decay: of the learning rate, see `Fit`.
            clip: maximum norm of the gradients; None: no clipping.

        Returns:
            The averaged modules by name, frozen, in eval mode.

        Raises:
            BadInput: where batches have keys that distillers use.
        """
        check_batch_keys(self.batches if batches is None else batches)
        number = len(self.completed_stages)
        self.completed_stages.append(name)
        folder = self.out / "stages" / f"{number}-{name}"
        steps = self.steps[name]
        finished = folder / STUDENT_FILE
        if self.ranks.on_main_process(finished.is_file):
            trained = {p.name: p.module for p in modules}
            load_modules(trained, finished)
        else:
            fit = Fit(
                steps=steps,
                warmup=max(1, min(100, steps // 20)),
                precision=self.precision,
                decay=decay,
                clip=clip,
                ema=ema or Ema(),
                seed=self.seed * 1009 + number,
                device=self.device,
                tensorboard=self.tensorboard,
                accumulate=self.accumulate,
                shard=self.shard,
                minutes=self.minutes.get(name),
            )
            trained = fit(modules, self.batches if batches is None else batches, folder, self.show)
            if self.ranks.is_main_process:
                save_modules(trained, finished)
                (folder / "checkpoint.pt").unlink(missing_ok=True)
            self.ranks.barrier()
        # random numbers drawn between stages must not depend on whether this one was trained, resumed or loaded
        torch.manual_seed(self.seed * 1009 + number)
        return {key: module.eval().requires_grad_(False) for key, module in trained.items()}

    def pairs(self, name: str, count: int, **options: Any) -> Pairs:
        """Noise and the samples that the teacher makes of it, from the store in `out`; missing ones are generated.

        Args:
            name: of the store.
            count: number of pairs.
            options: of `make_pairs`.
        """
        return make_pairs(self, self.out / "pairs" / name, count, **options)
