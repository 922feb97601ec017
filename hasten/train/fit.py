"""The training loop: any number of trained modules, one stream of batches, a budget, checkpoints, exact resume."""

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
from ..errors import BadInput, HastenError, check_choice, check_int
from ..files import locked
from ..performance.autotune import FORMATS, parse_runtime
from .checkpoint import TrainingState, append_log, trim_log
from .data import Batches, shard_batches
from .ema import Ema, update_ema
from .fingerprint import describe_data
from .monitor import Meter, event_files, progress_bar, stop_signals
from .rng import MicroBatchRng, step_seed
from .shards import full_tensor
from .trained_module import OncePerStep, TrainedModule
from .transfer import matmul_precision, prefetch, to_device

__all__ = ["Ema", "Fit", "TrainedModule"]

DECAYS = ("cosine", "constant")


@dataclass(frozen=True)
class Fit:
    """The budget and the settings of a training run; `fit(trained, batches, out)` runs it.

    Each of K processes (`torchrun --nproc-per-node K`) takes 1/K of every batch, in `accumulate` micro-batches;
    gradients are averaged over all K * accumulate micro-batches. The random numbers of step k for micro-batch p are a
    function of (seed, k, p), so that runs of equal K * accumulate are the same up to rounding. A checkpoint does not
    depend on K: any number of processes resumes from it.

    `out` receives `checkpoint.pt`, `log.jsonl` (step, seconds, steps_per_second, lr_factor, the mean loss and gradient
    norm of each trained module since the last entry) and `tensorboard/`. A run that was stopped or killed resumes from
    the checkpoint; with a budget of steps, on a CPU, it ends with exactly the weights of an uninterrupted run. (With a
    budget of minutes the learning rate follows the clock, and some GPU kernels sum in varying order.)

    Args:
        steps: budget of steps.
        minutes: budget of training time, summed over all resumed runs. Whichever budget is used up first ends the run;
            at least one is needed.
        warmup: steps of linear warm-up of the learning rate.
        decay: of the learning rate over the budget: `cosine` to zero, or `constant`.
        clip: maximum gradient norm; None for no limit.
        precision: `fp32` or `bf16` (autocast; weights stay float32), with `+high` (TF32 on GPUs), `+medium` and
            `+channels_last` (`performance.autotune.parse_runtime`).
        ema: the averaging of the weights.
        seed: of all random numbers.
        save_seconds: seconds between checkpoints.
        log_steps: steps between log entries.
        device: `cpu`, `cuda`, ...; by default a GPU if there is one.
        tensorboard: write event files too, if tensorboard is installed.
        accumulate: gradient accumulation: micro-batches a process splits its batch into, to need less memory; >= 1.
        shard: shard parameters, gradients, EMA and AdamW's state among the processes, for networks too large for one
            device (`train.shards`). Checkpoints and results are unsharded, so a run may resume with or without it.

    Raises:
        BadInput: without a budget, for an unknown choice, or for a value out of range.
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
        check_choice("decay", self.decay, DECAYS)
        check_choice("precision", self.precision.partition("+")[0], FORMATS)
        parse_runtime(self.precision)
        check_int("accumulate", self.accumulate, 1)
        for name in ("steps", "minutes", "clip", "log_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadInput(f"{name} must be positive, got {value}")

    def progress(self, step: int, seconds: float) -> float:
        """The fraction of the budget that is used up after `step` steps and `seconds` of training, in [0, 1]."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(max(by_steps, by_time), 1.0)

    def rate(self, step: int, progress: float) -> float:
        """The factor of the learning rates: `min(1, (step + 1) / warmup) (1 + cos(pi progress)) / 2`."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        return warm * (0.5 * (1 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1.0)

    def run(self, trained: list[TrainedModule], batches: Any) -> dict[str, Any]:
        """The settings that a resumed run must share with the run that wrote the checkpoint, ready for JSON.

        The budget and the number of processes are not among them: a run may be extended, and resumed elsewhere.
        """
        settings: dict[str, Any] = {"seed": self.seed, "batch_size": getattr(batches, "batch_size", None)}
        if isinstance(batches, Batches):
            data = describe_data(batches.data)
            settings |= {"images": data["images"], "data": data, "order": batches.seed, "flip": batches.flip}
        ema = asdict(self.ema)
        del ema["decay" if self.ema.kind == "power" else "gamma"]  # the one that is not used
        settings |= {
            "precision": self.precision,
            "warmup": self.warmup,
            "decay": self.decay,
            "clip": self.clip,
            "ema": ema,
        }
        names = ("lr", "betas", "weight_decay", "optimiser", "every")
        settings["players"] = {t.name: {name: getattr(t, name) for name in names} for t in trained}
        for t in trained:
            settings["players"][t.name] |= {"muon_lr": t.muon_lr} if t.optimiser == "muon" else {}
            settings["players"][t.name] |= {"start": t.start} if t.start else {}
        return json.loads(json.dumps(settings))

    def __call__(
        self,
        trained: list[TrainedModule],
        batches: Any,
        out: str | Path,
        show: bool = True,
        settings: Mapping[str, Any] | None = None,
    ) -> dict[str, nn.Module]:
        """Train modules in place, and return their EMA; resumes if `out` has a checkpoint.

        Args:
            trained: the modules with their losses and optimisers, updated in this order at each step. What one loss
                adds to the batch, the next one finds there.
            batches: `batches[k]` is the batch of step k, a dict of tensors: `Batches`, or any object like it.
            out: the folder of the run.
            show: show a progress bar, if stderr is a terminal.
            settings: further settings that a resumed run must share, such as the network's shape; ready for JSON.

        Returns:
            The EMA modules by name.

        Raises:
            BadInput: if `out` holds a run of other data or settings, or another process writes there.
            HastenError: if a loss or gradient is not finite; the last checkpoint was saved before that.
            KeyboardInterrupt: at SIGINT or SIGTERM, after a checkpoint is written, with a line to print.
        """
        ranks = Ranks.start(self.device)
        with locked(out) if ranks.is_main_process else contextlib.nullcontext():
            return self._train(trained, batches, Path(out), show, settings or {}, ranks)

    def _train(
        self,
        trained: list[TrainedModule],
        batches: Any,
        out: Path,
        show: bool,
        settings: Mapping[str, Any],
        ranks: Ranks,
    ) -> dict[str, nn.Module]:
        """`__call__`, while the folder is locked."""
        run = ranks.on_main_process(lambda: {**self.run(trained, batches), **json.loads(json.dumps(dict(settings)))})
        runtime = parse_runtime(self.precision, ranks.device.type)
        numbers = range(ranks.rank * self.accumulate, (ranks.rank + 1) * self.accumulate)
        parts = [shard_batches(batches, number, ranks.world * self.accumulate) for number in numbers]
        state = TrainingState(trained, ranks.device, ranks, self.shard)
        checkpoint, log = out / "checkpoint.pt", out / "log.jsonl"
        if ranks.on_main_process(checkpoint.exists):
            if not checkpoint.exists():
                raise BadInput(f"process {ranks.rank} does not see {checkpoint}: all need the same folder")
            state.load(checkpoint, run)
        if runtime.channels_last:
            for module in (*state.modules.values(), *state.emas.values()):
                runtime.prepare(module)
        meter = Meter(state.modules, state.step, ranks.device)
        # On a GPU the clock, the signals and the losses are checked every tenth step only, since that synchronises.
        check_steps = 1 if ranks.device.type == "cpu" else 10
        done = self.progress(state.step, state.seconds)
        stop = False
        with contextlib.ExitStack() as stack:
            stack.enter_context(naming_checkpoint(checkpoint))
            signals = stack.enter_context(stop_signals())
            loaders = [stack.enter_context(prefetch(part, ranks.device)) for part in parts]
            stack.enter_context(matmul_precision(runtime.matmul))
            bar = stack.enter_context(progress_bar(show and ranks.is_main_process, str(out)))
            if ranks.is_main_process:
                trim_log(log, state.step)
            writer = stack.enter_context(event_files(out, state.step, self.tensorboard and ranks.is_main_process))
            last_save = mark = time.monotonic()
            while done < 1 and not stop:
                # The random numbers of a step are a function of (seed, step), so a resumed run repeats them exactly.
                rng = MicroBatchRng([step_seed(self.seed, state.step, number) for number in numbers])
                micro_batches = [
                    {k: to_device(v, ranks.device, runtime.channels_last) for k, v in load(state.step).items()}
                    for load in loaders
                ]
                for t in trained:
                    if state.step % t.every == 0 and done >= t.start:
                        meter.add(state.step, t.name, *self._update(t, state, micro_batches, rng, done, ranks))
                state.step += 1
                done = self.progress(state.step, state.seconds)
                if state.step % check_steps and done < 1:
                    continue
                meter.raise_if_not_finite(checkpoint)
                now = time.monotonic()
                due = now - last_save > self.save_seconds
                state.seconds, stop, due = ranks.sync_training_state(state.seconds + now - mark, bool(signals), due)
                done = self.progress(state.step, state.seconds)
                if state.step // self.log_steps > meter.logged // self.log_steps or done >= 1 or stop:
                    line = meter.line(state.step, state.seconds, self.rate(state.step, done))
                    if unreadable := getattr(getattr(batches, "data", None), "unreadable", None):
                        line["unreadable"] = len(unreadable)
                    if ranks.is_main_process:
                        append_log(log, line)
                        if writer is not None:
                            for key, value in line.items():
                                writer.add_scalar(key, value, state.step)
                bar(done, state.step, meter.last)
                if due or done >= 1 or stop:
                    state.save(checkpoint, run, ranks)
                if due:
                    last_save = time.monotonic()
                mark = time.monotonic()
        ranks.barrier()
        if stop and done < 1:
            raise KeyboardInterrupt(
                f"stopped after {state.step} steps; {checkpoint} is written: the same command resumes from it"
            )
        return state.averages()

    def _update(
        self,
        t: TrainedModule,
        state: TrainingState,
        batches: list[dict[str, Tensor]],
        rng: MicroBatchRng,
        done: float,
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor]:
        """One step of one trained module on the micro-batches; its loss and gradient norm, still on the device."""
        optimiser = state.optimisers[t.name]
        for group, peak in zip(optimiser.param_groups, state.peak_rates[t.name], strict=True):
            group["lr"] = peak * self.rate(state.step, done)
        optimiser.zero_grad(set_to_none=True)
        total = torch.zeros((), device=ranks.device)
        for number, batch in enumerate(batches):
            for module in t.module.modules() if len(batches) > 1 else ():
                if isinstance(module, OncePerStep):
                    module.again = number > 0
            bf16 = self.precision.startswith("bf16")
            with rng.fork(number), torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16):
                loss = t.loss(batch)
            if loss.ndim:
                raise HastenError(f"{t.name}: the loss must be a scalar, got shape {tuple(loss.shape)}")
            (loss if len(batches) == 1 else loss / len(batches)).backward()
            total = total + loss.detach() / len(batches)
        parameters = list(t.module.parameters())
        # gradients of sharded parameters are averaged already
        loss = ranks.all_reduce_gradients(() if self.shard else parameters, total)
        norm = full_tensor(nn.utils.clip_grad_norm_(parameters, math.inf if self.clip is None else self.clip))
        optimiser.step()
        update_ema(state.emas[t.name], t.module, self.ema.beta(state.step // t.every + 1))
        return loss, norm


@contextlib.contextmanager
def naming_checkpoint(checkpoint: Path) -> Iterator[None]:
    """Add to a ProcessLost inside which checkpoint there is."""
    try:
        yield
    except ProcessLost as e:
        exists = checkpoint.exists()
        saved = f"the same command resumes from {checkpoint}" if exists else "no checkpoint was written"
        raise ProcessLost(f"{e}; {saved}") from e
