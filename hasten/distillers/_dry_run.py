"""The cost of a distillation, measured by running it with a few training steps a stage."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..train.data import shard_batches
from ..train.fit import Ema
from ..train.trained_module import TrainedModule
from ..utils.devices import synchronize
from ._batch_keys import check_batch_keys
from ._task import DistillTask

TIMED_STEPS = 2  # training steps that are timed, after one whose operations are counted


@dataclass
class StagePlan:
    """A stage of a plan.

    Args:
        name: of the stage.
        evaluations: model evaluations of one image that one training step costs, by floating-point operations.
        seconds: of one training step.
        share: of the budget, relative to the other stages'.
        steps: training steps of the stage, once the budget is known.
        pairs: of a stage that only generates pairs: how many. One of its "steps" is one pair.
    """

    name: str
    evaluations: float
    seconds: float
    share: float = 1.0
    steps: int = 0
    pairs: int = 0


@dataclass
class DryRun(DistillTask):
    """A task that only measures: `stages` holds what each stage would cost. Nothing is written.

    Cost is counted in floating-point operations, forward and backward, divided by those of one evaluation of the plain
    network for one image, so that critics and partial evaluations count for what they are. Of several processes one
    measures, with its own part of a batch; the figures are those of a whole step of all.

    Args:
        stages: the stages so far.
        unit: floating-point operations of one model evaluation; 0: not measured yet.
        processes: number of processes that share a batch.
    """

    stages: list[StagePlan] = field(default_factory=list)
    unit: float = 0.0
    processes: int = 1
    _folders: list[Any] = field(default_factory=list)

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
        """Count the operations of one step, time a few more, and return the modules after these, frozen."""
        check_batch_keys(self.batches if batches is None else batches)
        self.completed_stages.append(name)
        device = next(self.denoiser.parameters()).device
        source = shard_batches(self.batches if batches is None else batches, 0, self.processes * self.accumulate)
        batch = {key: value.to(device) for key, value in source[0].items()}
        optimisers = {p.name: p.optimizer() for p in modules}
        torch.manual_seed(self.seed)
        evaluations = seconds = 0.0
        for p in modules:
            p.module.to(device).train()
        shared = dict(batch)  # the losses of one step may pass values to one another in it
        for p in modules:
            with count_flops() as count:
                self._train_step(p, shared, optimisers[p.name])
            evaluations += count() / self.unit_flops(batch) / p.every
        for _ in range(TIMED_STEPS):
            shared = dict(batch)
            for p in modules:
                start = synchronized_clock(device)
                self._train_step(p, shared, optimisers[p.name])
                seconds += (synchronized_clock(device) - start) / TIMED_STEPS / p.every
        parts = self.accumulate, self.processes * self.accumulate
        self.stages.append(StagePlan(name, evaluations * parts[1], seconds * parts[0], budget_weight))
        return {p.name: copy.deepcopy(p.module).eval().requires_grad_(False) for p in modules}

    def pairs(self, name: str, count: int, **options: Any) -> Any:
        """One batch of pairs, in a temporary folder, and the cost of a pair."""
        from ._pair_making import make_pairs

        self._folders.append(tempfile.TemporaryDirectory(prefix="hasten-"))
        small = min(count, self.batch_size)
        device = next(self.denoiser.parameters(), torch.zeros(())).device
        start = synchronized_clock(device)
        with count_flops() as flops:
            pairs = make_pairs(self, Path(self._folders[-1].name) / name, small, **options)
        seconds = (synchronized_clock(device) - start) / small / self.processes
        evaluations = flops() / self.unit_flops(self.batches[0]) / small
        self.stages.append(StagePlan(f"pairs {name}", evaluations, seconds, pairs=count))
        return pairs

    def _train_step(self, trained: TrainedModule, batch: dict[str, Tensor], optimiser: torch.optim.Optimizer) -> None:
        """A training step that is too small to change anything."""
        device = next(self.denoiser.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = trained.loss(batch)
        loss.backward()
        for group in optimiser.param_groups:
            group["lr"] = 1e-7
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def unit_flops(self, batch: dict[str, Tensor]) -> float:
        """Floating-point operations of one evaluation of the plain network for one image."""
        if not self.unit:
            x = torch.zeros(1, *self.shape, device=batch["x"].device)
            cond = {key: value[:1] for key, value in self.cond(batch).items()}
            if self.denoiser.net_takes_guidance:
                cond["guidance"] = torch.full((1,), self.guidance_scale, device=x.device)
            with torch.no_grad(), count_flops() as count:
                self.denoiser.raw(x, torch.tensor([0.5], dtype=torch.float64), **cond)
            self.unit = max(count(), 1.0)
        return self.unit


@contextlib.contextmanager
def count_flops() -> Iterator[Any]:
    """A context that yields a function, which returns the floating-point operations of what ran inside."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    total = 0.0

    class Counter(TorchDispatchMode):  # torch's FlopCounterMode fails on gradients within a loss
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal total
            out = func(*args, **(kwargs or {}))
            flops = flop_registry.get(func._overloadpacket)
            if flops is not None:
                total += flops(*args, **(kwargs or {}), out_val=out)
            return out

    with Counter():
        yield lambda: total


def synchronized_clock(device: torch.device) -> float:
    """Seconds, read when the device has finished its work: launches alone take no time."""
    synchronize(device)
    return time.perf_counter()


def time_limits(stages: list[StagePlan], minutes: float, slack: float = 1.1) -> dict[str, float]:
    """Maximum minutes of training, by stage.

    Args:
        stages: of the plan.
        minutes: budget of the run.
        slack: factor by which a timing may be off.
    """
    trained = [stage for stage in stages if not stage.pairs]
    remaining = minutes - sum(stage.pairs * stage.seconds for stage in stages) / 60
    total = sum(stage.share for stage in trained)
    return {stage.name: slack * remaining * stage.share / total for stage in trained}


def allocate(stages: list[StagePlan], steps: int | None, minutes: float | None, evaluations: float | None) -> None:
    """Set the steps of every stage, by the smallest of the budgets that are set.

    Args:
        stages: of the plan; their `steps` are set.
        steps: training steps of all stages together, without pairs.
        minutes: of everything, pairs included.
        evaluations: model evaluations of one image, of everything.

    Raises:
        BadInput: without a budget, where pairs alone cost more, or where a stage would have no step.
    """
    if steps is None and minutes is None and evaluations is None:
        raise BadInput("distillation needs a budget: give steps, minutes or evaluations")
    trained = [stage for stage in stages if not stage.pairs]
    total = sum(stage.share for stage in trained)
    limits = {
        "steps": (steps, None),
        "seconds": (None if minutes is None else 60 * minutes, "seconds"),
        "evaluations": (evaluations, "evaluations"),
    }
    for stage in stages:
        stage.steps = stage.pairs
    for stage in trained:
        affordable = []
        for name, (limit, cost) in limits.items():
            if limit is None:
                continue
            pairs = 0.0 if cost is None else sum(s.pairs * getattr(s, cost) for s in stages)
            unit = 1.0 if cost is None else getattr(stage, cost)
            remaining = (limit - pairs) * stage.share / total / unit
            if remaining < 1:
                raise BadInput(
                    f"a budget of {limit:g} {name} leaves no step for the stage {stage.name}: one costs {unit:g}"
                    + (f", and the pairs {pairs:g}" if pairs else "")
                )
            affordable.append(remaining)
        stage.steps = int(min(affordable))
