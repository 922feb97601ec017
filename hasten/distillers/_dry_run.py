"""What a distillation will cost, found by going through it with a few steps of training a stage."""

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
from ._task import Task, refuse_keys

TIMED = 2  # steps of training that are timed, after one that is counted


@dataclass
class Stage:
    """A stage of a plan. evaluations, seconds: of one step of training, the first in network evaluations of one image.

    share: of the budget. steps: what the stage gets, once the budget is known. pairs: of a stage that only draws
    pairs, how many; a "step" of it is one pair.
    """

    name: str
    evaluations: float
    seconds: float
    share: float = 1.0
    steps: int = 0
    pairs: int = 0


@dataclass
class DryRun(Task):
    """A task whose stages are only tried: `stages` holds what each would cost. Nothing is written.

    Of several processes one rehearses, with its own part of a batch; the steps of all are then of the whole.

    Cost is counted in floating-point operations, forwards and backwards, over those of one evaluation of the plain
    network for one image, so that critics and partial evaluations count for what they are.
    """

    stages: list[Stage] = field(default_factory=list)
    unit: float = 0.0
    processes: int = 1
    _scratch: list[Any] = field(default_factory=list)

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
        """Count one step, time a few; the modules after these, frozen."""
        refuse_keys(self.batches if batches is None else batches)
        self.done.append(name)
        device = next(self.denoiser.parameters()).device
        source = shard_batches(self.batches if batches is None else batches, 0, self.processes * self.accumulate)
        batch = {key: value.to(device) for key, value in source[0].items()}
        optimisers = {p.name: p.optimizer() for p in players}
        torch.manual_seed(self.seed)
        evaluations = seconds = 0.0
        for p in players:
            p.module.to(device).train()
        shared = dict(batch)  # the players of a step may leave one another something in it
        for p in players:
            with counted() as count:
                self._learn(p, shared, optimisers[p.name])
            evaluations += count() / self.unit_flops(batch) / p.every
        for _ in range(TIMED):
            shared = dict(batch)
            for p in players:
                began = clock(device)
                self._learn(p, shared, optimisers[p.name])
                seconds += (clock(device) - began) / TIMED / p.every
        parts = self.accumulate, self.processes * self.accumulate
        self.stages.append(Stage(name, evaluations * parts[1], seconds * parts[0], share))
        return {p.name: copy.deepcopy(p.module).eval().requires_grad_(False) for p in players}

    def pairs(self, name: str, count: int, **how: Any) -> Any:
        """A batch of pairs, in a folder that goes with this task, and what one costs."""
        from ._pairs import make

        self._scratch.append(tempfile.TemporaryDirectory(prefix="hasten-"))
        small = min(count, self.batch_size)
        device = next(self.denoiser.parameters(), torch.zeros(())).device
        began = clock(device)
        with counted() as flops:
            pairs = make(self, Path(self._scratch[-1].name) / name, small, **how)
        seconds = (clock(device) - began) / small / self.processes
        evaluations = flops() / self.unit_flops(self.batches[0]) / small
        self.stages.append(Stage(f"pairs {name}", evaluations, seconds, pairs=count))
        return pairs

    def _learn(self, player: TrainedModule, batch: dict[str, Tensor], optimiser: torch.optim.Optimizer) -> None:
        """A step of training too short to change anything."""
        device = next(self.denoiser.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = player.loss(batch)
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
            with torch.no_grad(), counted() as count:
                self.denoiser.raw(x, torch.tensor([0.5], dtype=torch.float64, device=x.device), **cond)
            self.unit = max(count(), 1.0)
        return self.unit


@contextlib.contextmanager
def counted() -> Iterator[Any]:
    """A function that tells the floating-point operations of what ran inside."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    total = 0.0

    class Counter(TorchDispatchMode):  # torch's own FlopCounterMode cannot be asked about gradients within a loss
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal total
            out = func(*args, **(kwargs or {}))
            flops = flop_registry.get(func._overloadpacket)
            if flops is not None:
                total += flops(*args, **(kwargs or {}), out_val=out)
            return out

    with Counter():
        yield lambda: total


def clock(device: torch.device) -> float:
    """Seconds, read when the device has finished what it was given: launches alone take no time."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def time_limits(stages: list[Stage], minutes: float, slack: float = 1.1) -> dict[str, float]:
    """The most minutes that each stage may train: its share of `minutes` and a tenth, by which a timing may be off."""
    trained = [stage for stage in stages if not stage.pairs]
    left = minutes - sum(stage.pairs * stage.seconds for stage in stages) / 60
    whole = sum(stage.share for stage in trained)
    return {stage.name: slack * left * stage.share / whole for stage in trained}


def allocate(stages: list[Stage], steps: int | None, minutes: float | None, evaluations: float | None) -> None:
    """Give every stage its steps, from the smallest of the budgets that are given.

    steps: of training, all stages together; pairs are not counted. minutes, evaluations: of everything.
    BadInput where pairs alone cost more, or where a stage would get none.
    """
    if steps is None and minutes is None and evaluations is None:
        raise BadInput("distillation needs a budget: give steps, minutes or evaluations")
    trained = [stage for stage in stages if not stage.pairs]
    whole = sum(stage.share for stage in trained)
    limits = {"steps": (steps, None), "seconds": (None if minutes is None else 60 * minutes, "seconds"),
              "evaluations": (evaluations, "evaluations")}  # fmt: skip
    for stage in stages:
        stage.steps = stage.pairs
    for stage in trained:
        found = []
        for name, (limit, cost) in limits.items():
            if limit is None:
                continue
            drawn = 0.0 if cost is None else sum(s.pairs * getattr(s, cost) for s in stages)
            each = 1.0 if cost is None else getattr(stage, cost)
            left = (limit - drawn) * stage.share / whole / each
            if left < 1:
                raise BadInput(
                    f"a budget of {limit:g} {name} leaves no step for the stage {stage.name}: one costs {each:g}"
                    + (f", and the pairs {drawn:g}" if drawn else "")
                )
            found.append(left)
        stage.steps = int(min(found))
