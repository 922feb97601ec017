"""The one training loop: any number of players, one stream of batches, a budget, checkpoints, exact resume."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.ranks import ProcessLost, Ranks
from ..errors import BadInput, HastenError, check_int, nearest
from ..files import locked
from ..performance.autotune import FORMATS, parse_runtime
from .checkpoint import State, append_log, trim_log
from .data import Batches, share_of
from .draws import Draws, drawn
from .ema import Ema, average
from .fingerprint import describe_data
from .monitor import Meter, event_files, progress_bar, stop_signals
from .player import TrainedModule
from .transfer import matmul_precision, moved, prefetch

__all__ = ["Ema", "Fit", "TrainedModule", "average"]


@dataclass(frozen=True)
class Fit:
    """How long and how to train; `fit(players, batches, out)` runs it.

    steps, minutes: the budget; whichever is reached first ends the run (at least one must be given). Minutes count
        the training alone, over all the runs that a checkpoint joined.
    warmup: steps of linear warm-up. decay: of the rate over the budget, `cosine` to zero or `constant`.
    clip: largest gradient norm, None for no limit. precision: `fp32` or `bf16` (autocast; weights stay float32), with
        `+high` (TF32 on GPUs), `+medium` and `+channels_last` as `machine.parse` takes them.
    seed: of every random draw.
    save_seconds, log_steps: how often a checkpoint and a log line are written.
    device: `cpu`, `cuda`, ...; by default a GPU where there is one.
    tensorboard: write its event files too, where the package is installed.
    accumulate: parts of a batch that go through the network one after another, to need less memory.
    shard: divide parameters, gradients, averages and AdamW's state among the processes, for networks too large for
        one (`train.shards`). Checkpoints and results are whole, so a run may go on with or without it.

    Of K processes (`torchrun --nproc-per-node K`) each takes a K-th of every batch, in `accumulate` parts; gradients
    are averaged over all K accumulate parts. The random draws of step k for part p are a function of (seed, k, p), so
    the run is the same, up to rounding, whenever K accumulate is. A checkpoint says nothing of K: it goes on on any.

    `out` receives `checkpoint.pt`, `log.jsonl` (step, seconds, steps_per_second, each player's mean loss and gradient
    norm since the line before, lr_factor) and `tensorboard/`. A run that was stopped, or killed, goes on from the
    checkpoint; with a budget of steps, on a CPU, it ends with the very weights of an undisturbed run. (With a budget of
    minutes the rate follows the clock, and some GPU kernels add in varying order.)
    """

    steps: int | None = None
    minutes: float | None = None
    warmup: int = 200
    decay: str = "cosine"
    clip: float | None = 1.0
    precision: str = "fp32"
    ema: Ema = field(default_factory=Ema)
    seed: int = 0
    save_seconds: float = 60.0
    log_steps: int = 50
    device: str | None = None
    tensorboard: bool = True
    accumulate: int = 1
    shard: bool = False

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise BadInput("training needs a budget: give steps or minutes")
        formats = self.precision.partition("+")[0]
        for name, value, choices in (("decay", self.decay, ("cosine", "constant")), ("precision", formats, FORMATS)):
            if value not in choices:
                raise BadInput(f"unknown {name} {getattr(self, name)!r}: {nearest(value, choices)}")
        parse_runtime(self.precision)
        check_int("accumulate", self.accumulate, 1)
        for name in ("steps", "minutes", "clip", "log_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadInput(f"{name} must be positive, got {value}")

    def progress(self, step: int, seconds: float) -> float:
        """The share of the budget that is used, in [0, 1]."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(max(by_steps, by_time), 1.0)

    def rate(self, step: int, progress: float) -> float:
        """The factor on every player's learning rate: `min(1, (step + 1) / warmup) (1 + cos(pi progress)) / 2`."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        return warm * (0.5 * (1 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1.0)

    def run(self, players: list[TrainedModule], batches: Any) -> dict[str, Any]:
        """All that a resumed run must have in common with the one that wrote the checkpoint, ready for JSON.

        The budget is not part of it, nor how the work is divided: a run may be lengthened, and go on elsewhere.
        """
        found: dict[str, Any] = {"seed": self.seed, "batch_size": getattr(batches, "batch_size", None)}
        if isinstance(batches, Batches):
            data = describe_data(batches.data)
            found |= {"images": data["images"], "data": data, "order": batches.seed, "flip": batches.flip}
        ema = asdict(self.ema)
        del ema["decay" if self.ema.kind == "power" else "gamma"]  # which is not used
        found |= {
            "precision": self.precision,
            "warmup": self.warmup,
            "decay": self.decay,
            "clip": self.clip,
            "ema": ema,
        }
        names = ("lr", "betas", "weight_decay", "optimiser", "every")
        found["players"] = {p.name: {name: getattr(p, name) for name in names} for p in players}
        for p in players:
            found["players"][p.name] |= {"muon_lr": p.muon_lr} if p.optimiser == "muon" else {}
        return json.loads(json.dumps(found))

    def __call__(
        self,
        players: list[TrainedModule],
        batches: Batches,
        out: str | Path,
        show: bool = True,
        settings: Mapping[str, Any] | None = None,
    ) -> dict[str, nn.Module]:
        """Train the players' modules in place and return their averages by name; go on from `out`'s checkpoint if any.

        batches: `batches[k]` is the batch of step k. show: a progress bar, where stderr is a terminal.
        settings: what else a resumed run must have in common with this one, such as the network's shape; JSON.

        Raises BadInput where `out` belongs to a run of other data or settings, or another process writes there.
        Raises HastenError where a loss or gradient stops being finite: the last checkpoint, written before that, is
        kept. At SIGINT or SIGTERM a checkpoint is written and KeyboardInterrupt raised with a line to print.
        """
        ranks = Ranks.start(self.device)
        with locked(out) if ranks.is_main_process else contextlib.nullcontext():
            return self._train(players, batches, Path(out), show, settings or {}, ranks)

    def _train(
        self,
        players: list[TrainedModule],
        batches: Batches,
        out: Path,
        show: bool,
        settings: Mapping[str, Any],
        ranks: Ranks,
    ) -> dict[str, nn.Module]:
        """`__call__`, with the folder locked."""
        run = ranks.on_main_process(lambda: {**self.run(players, batches), **json.loads(json.dumps(dict(settings)))})
        runtime = parse_runtime(self.precision, ranks.device.type)
        numbers = range(ranks.rank * self.accumulate, (ranks.rank + 1) * self.accumulate)
        parts = [share_of(batches, number, ranks.world * self.accumulate) for number in numbers]
        state = State(players, ranks.device, ranks, self.shard)
        checkpoint, log = out / "checkpoint.pt", out / "log.jsonl"
        if ranks.on_main_process(checkpoint.exists):
            if not checkpoint.exists():
                raise BadInput(f"process {ranks.rank} does not see {checkpoint}: all need the same folder")
            state.load(checkpoint, run)
        if runtime.channels_last:
            for module in (*state.modules.values(), *state.emas.values()):
                runtime.prepare(module)
        meter = Meter(state.modules, state.step, ranks.device)
        # On a GPU the loop looks at the clock, the signals and the losses every tenth step only: a look waits for it.
        look = 1 if ranks.device.type == "cpu" else 10
        done = self.progress(state.step, state.seconds)
        stop = False
        with contextlib.ExitStack() as stack:
            stack.enter_context(keeping(checkpoint))
            told = stack.enter_context(stop_signals())
            ahead = [stack.enter_context(prefetch(part, ranks.device)) for part in parts]
            stack.enter_context(matmul_precision(runtime.matmul))
            bar = stack.enter_context(progress_bar(show and ranks.is_main_process, str(out)))
            if ranks.is_main_process:
                trim_log(log, state.step)
            board = stack.enter_context(event_files(out, state.step, self.tensorboard and ranks.is_main_process))
            last_save = mark = time.monotonic()
            while done < 1 and not stop:
                # Every draw of a step is a function of (seed, step), so a resumed run repeats an undisturbed one.
                draws = Draws([drawn(self.seed, state.step, number) for number in numbers])
                taken = [
                    {k: moved(v, ranks.device, runtime.channels_last) for k, v in take(state.step).items()}
                    for take in ahead
                ]
                for p in players:
                    if state.step % p.every == 0:
                        meter.add(state.step, p.name, *self._learn(p, state, taken, draws, done, ranks))
                state.step += 1
                done = self.progress(state.step, state.seconds)
                if state.step % look and done < 1:
                    continue
                meter.refuse(checkpoint)
                now = time.monotonic()
                due = now - last_save > self.save_seconds
                state.seconds, stop, due = ranks.sync_training_state(state.seconds + now - mark, bool(told), due)
                done = self.progress(state.step, state.seconds)
                if state.step // self.log_steps > meter.logged // self.log_steps or done >= 1 or stop:
                    line = meter.line(state.step, state.seconds, self.rate(state.step, done))
                    if unreadable := getattr(getattr(batches, "data", None), "unreadable", None):
                        line["unreadable"] = len(unreadable)
                    if ranks.is_main_process:
                        append_log(log, line)
                        for key in line if board is not None else ():
                            board.add_scalar(key, line[key], state.step)
                bar(done, state.step, meter.last)
                if due or done >= 1 or stop:
                    state.save(checkpoint, run, ranks)
                if due:
                    last_save = time.monotonic()
                mark = time.monotonic()
        ranks.barrier()
        if stop and done < 1:
            raise KeyboardInterrupt(
                f"stopped after {state.step} steps; {checkpoint} is written: the same command goes on"
            )
        return state.averages()

    def _learn(
        self, p: TrainedModule, state: State, batches: list[dict[str, Tensor]], draws: Draws, done: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        """One step of one player on the parts of a batch; its loss and gradient norm, still on the device."""
        optimiser = state.optimisers[p.name]
        for group, peak in zip(optimiser.param_groups, state.peaks[p.name], strict=True):
            group["lr"] = peak * self.rate(state.step, done)
        optimiser.zero_grad(set_to_none=True)
        total = torch.zeros((), device=ranks.device)
        for number, batch in enumerate(batches):
            for module in p.module.modules() if len(batches) > 1 else ():
                if hasattr(module, "again"):  # what a loss does once a step must not be done for every part
                    module.again = number > 0
            low = self.precision.startswith("bf16")
            with draws.of(number), torch.autocast(ranks.device.type, torch.bfloat16, enabled=low):
                loss = p.loss(batch)
            if loss.ndim:
                raise HastenError(f"{p.name}: the loss must be a scalar, got shape {tuple(loss.shape)}")
            (loss if len(batches) == 1 else loss / len(batches)).backward()
            total = total + loss.detach() / len(batches)
        parameters = list(p.module.parameters())
        loss = ranks.all_reduce_gradients(
            () if self.shard else parameters, total
        )  # sharded gradients are means already
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if self.clip is None else self.clip)
        norm = norm.full_tensor() if self.shard else norm  # type: ignore[operator]
        optimiser.step()
        average(state.emas[p.name], p.module, self.ema.beta(state.step // p.every + 1))
        return loss, norm


@contextlib.contextmanager
def keeping(checkpoint: Path) -> Iterator[None]:
    """Where another process is lost, the message says what is left."""
    try:
        yield
    except ProcessLost as e:
        kept = f"{checkpoint} is kept: the same command goes on" if checkpoint.exists() else "no checkpoint was written"
        raise ProcessLost(f"{e}; {kept}") from e
