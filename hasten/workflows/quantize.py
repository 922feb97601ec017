"""Quantise a model and save it: learned rounding, block after block, in a run that can be interrupted and resumed."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..accelerators._quantization.session import (
    ROUNDING,
    STEPS,
    LearnedParams,
    QuantizationSession,
    SessionProgress,
    relative_error,
)
from ..accelerators.quantize import Quantize
from ..errors import BadInput
from ..files import reserve, write, writes
from ..model.model import Model
from ..pick import format_spec
from ..storage.model_folder import check_savable
from ..storage.provenance import fingerprint, now
from ..storage.runs import earlier
from ..storage.weights import is_half
from ..utils.finite import check_finite, check_weights
from .tune import watched

RUN, BLOCKS = "run.json", "blocks"
HELD_OUT = 8  # images, of other seeds than the calibration's, on which the error is measured
MAX_ITERATIONS = 20_000  # of a block, the paper's number
STEPS_FRACTION = 0.25  # of the time for learning that step sizes get where rounding is learned too


@writes("out")
def quantize_model(
    model: Model,
    out: str | Path,
    weights: int = 8,
    acts: int | None = 8,
    rounding: str | None = None,
    learn_steps: bool = False,
    minutes: float | None = None,
    iterations: int | None = None,
    rank: int = 0,
    groups: int | None = None,
    split: bool = True,
    ranges: str = "search",
    keep: tuple[str, ...] | None = None,
    eight: float = 0.0,
    images: int | None = None,
    spread: int = 20,
    seed: int | None = None,
    sampler: str | None = None,
    times: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    say: Callable[[str], None] = lambda line: None,
    command: str = "",
) -> dict[str, Any]:
    """Quantise a model and save it in a model folder, which is sampled and compared like any other.

    Finished blocks are saved in `out/blocks` until all are done, and the number of iterations in `out/run.json`, so
    that the same call, repeated after an interruption, resumes and ends with the same weights.

    Args:
        model: the model in floating point.
        out: the folder to write.
        weights: see `Quantize`, and so acts, learn_steps, rank, groups, split, ranges, keep, eight and seed.
        acts: see `Quantize`.
        rounding: "nearest" or "adaround"; None: "adaround" for weights of 4 bits, "nearest" for 8.
        learn_steps: see `Quantize`.
        minutes: of learning, divided over the blocks.
        iterations: of every block, instead of minutes (300 if neither is given).
        rank: see `Quantize`.
        groups: see `Quantize`.
        split: see `Quantize`.
        ranges: see `Quantize`.
        keep: see `Quantize`.
        eight: see `Quantize`.
        images: how many are sampled for calibration (None: 16, with learned rounding 32).
        spread: the `steps` of `Quantize`: the number of time steps of a sampling that are used for calibration.
        seed: see `Quantize`.
        sampler: of the calibration samples, and so times, steps and guidance_scale (None: the model's default).
        times: of the calibration samples.
        steps: of the calibration samples.
        guidance_scale: of the calibration samples.
        say: called with one line after every block.
        command: the command line, for the model card.

    Returns:
        "folder", and the entry "quantized" of the model card: method, bits, calibration, blocks, error (of x0,
        relative, on model evaluations of other images), bytes.

    Raises:
        BadInput: before anything has run, for arguments that are not supported.
        KeyboardInterrupt: at Ctrl-C; finished blocks are saved.
    """
    rounding = ("adaround" if weights == 4 else "nearest") if rounding is None else rounding
    images = (32 if rounding == "adaround" or learn_steps else 16) if images is None else images
    options: dict[str, Any] = {"keep": keep, "eight": eight, "seed": seed, "iterations": iterations}
    method = Quantize(
        weights=weights, acts=acts, rounding=rounding, learn_steps=learn_steps, rank=rank, groups=groups, split=split,  # type: ignore[arg-type]
        ranges=ranges, images=images, steps=spread, **{k: v for k, v in options.items() if v is not None},  # type: ignore[arg-type]
    )  # fmt: skip
    if minutes is not None and iterations is not None:
        raise BadInput("give minutes or iterations, not both")
    if minutes is not None and not (minutes > 0 and math.isfinite(minutes)):
        raise BadInput(f"minutes must be positive, got {minutes}")
    check_savable(model, network=False)
    check_weights(model.denoiser, model.name)
    out, start = Path(out), time.perf_counter()
    sampling = {"sampler": sampler, "times": times, "steps": steps, "guidance_scale": guidance_scale}
    setting = model.setting(**sampling)  # type: ignore[arg-type]
    run = {
        "schema": 1,
        "method": format_spec(method),
        "model": fingerprint(model),
        "sampling": setting,
        "minutes": minutes,
    }
    record = earlier(out / RUN, run, iterations_of)
    if record is not None and (out / "model.json").is_file():
        return {"folder": str(out), **json.loads((out / "model.json").read_text())["card"]["quantized"]}
    reserve(out / RUN)
    calls = model.calls(images, method.seed, **sampling)
    session = method.start(model.denoiser, calls)
    if record is None:
        record = {**run, "iterations": allocated(method, session, minutes, start)}
        write(out / RUN, (json.dumps(record, indent=2) + "\n").encode())
    with watched() as on_progress:
        progress = SavedBlocks(iterations_of(record), out / BLOCKS, say, on_progress)
        try:
            denoiser = method.finish(session, progress)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"stopped with {progress.done} blocks done; the same command resumes") from stop
    held_out = model.calls(HELD_OUT, method.seed + images, **sampling)
    card = {
        "method": format_spec(method),
        "model": model.name,
        "model_sha256": model.sha256,
        "weights": weights,
        "acts": acts,
        "calibration": {"images": images, "calls": len(session.samples), "seed": method.seed, **setting},
        "iterations": record["iterations"] if progress.figures else None,
        "blocks": progress.figures,
        "eight": session.int8_layers,
        "error": relative_error(model.denoiser, denoiser, method.samples(model.denoiser, held_out)),
        "bytes_fp32": sum(4 * p.numel() for p in model.denoiser.net.parameters()),
        "date": now(),
        "command": command,
    }
    check_finite("quantize: the model card", card)
    quantized = replace(model, denoiser=denoiser, name=out.resolve().name, card={**model.card, "quantized": card})
    quantized.save(out, half=is_half(model))
    shutil.rmtree(out / BLOCKS, ignore_errors=True)
    size = (out / "weights.safetensors").stat().st_size
    return {"folder": str(out), **card, "bytes": size, "seconds": time.perf_counter() - start}


class SavedBlocks(SessionProgress):
    """Progress on disk: one file a block, named after the hash of the unit's name and written atomically.

    Args:
        iterations: for every block, by pass.
        folder: of the files.
        say: called with one line after every block.
        on_progress: called after every iteration with what runs, iterations done, iterations in all and the loss.
    """

    def __init__(self, iterations: dict[str, int], folder: Path, say: Callable[[str], None], on_progress: Any) -> None:
        super().__init__(iterations)
        self.folder, self.say, self.on_progress = folder, say, on_progress
        self.figures: dict[str, dict[str, dict[str, float]]] = {}
        self.done, self.learned, self.start = 0, 0, time.perf_counter()

    def load(self, stage: str, unit: str) -> LearnedParams | None:
        """What an earlier run has learned of a block; None: nothing.

        Raises:
            BadInput: for a damaged file.
        """
        from safetensors import SafetensorError, safe_open

        if not (file := self.file(stage, unit)).is_file():
            return None
        try:
            with safe_open(str(file), "pt") as saved:
                tensors: dict[str, Tensor] = {key: saved.get_tensor(key) for key in saved.keys()}  # noqa: SIM118
                return tensors, json.loads(saved.metadata()["figures"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
            raise BadInput(f"cannot read {file} ({type(e).__name__}): remove it to do this block again") from e

    def save(self, stage: str, unit: str, learned: LearnedParams) -> None:
        """Write what was learned of a block."""
        from safetensors.torch import save

        self.learned += 1
        tensors = {key: value.detach().cpu().contiguous() for key, value in learned[0].items()}
        file = self.file(stage, unit)
        write(reserve(file), save(tensors, {"figures": json.dumps(learned[1]), "unit": unit}))

    def on_iteration(self, stage: str, unit: str, done: int, of: int, loss: float) -> None:
        """Update the progress bar."""
        self.on_progress(f"{stage} of {unit}", done, of, loss)

    def on_block(self, stage: str, done: int, of: int, unit: str, figures: dict[str, float]) -> None:
        """Print a line with the block's error and the time left."""
        self.done += 1
        self.figures.setdefault(stage, {})[unit] = figures
        left = (time.perf_counter() - self.start) / max(self.learned, 1) * (of - done)
        first = figures.get("nearest", figures.get("before", 0.0))
        gain = f"error {figures['error'] / first:.2f} of what it was" if first else "no error"
        last = "" if done == of else f", about {left / 60:.1f} min left" if left > 90 else f", about {left:.0f} s left"
        self.say(f"{stage}: block {done} of {of}, {unit}: {gain}{last if self.learned else ''}")

    def file(self, stage: str, unit: str) -> Path:
        """The file of a block."""
        return self.folder / f"{stage}-{hashlib.sha256(unit.encode()).hexdigest()[:16]}.safetensors"


def iterations_of(run: dict[str, Any]) -> dict[str, int]:
    """The iterations of every block by pass, from `run.json`."""
    return {stage: int(run["iterations"][stage]) for stage in (ROUNDING, STEPS)}


def allocated(method: Quantize, session: QuantizationSession, minutes: float | None, start: float) -> dict[str, int]:
    """The iterations of every block by pass: those of the method, or as many as fit into the time.

    Args:
        method: what is learned.
        session: in which an iteration of every block is timed.
        minutes: in all; None: the method's iterations.
        start: when the run started, by `time.perf_counter()`.
    """
    if minutes is None:
        return {ROUNDING: method.iterations, STEPS: method.iterations}
    passes = [ROUNDING] * (method.rounding == "adaround") + [STEPS] * method.learn_steps
    if not passes:
        return {ROUNDING: 0, STEPS: 0}
    last = time.perf_counter()
    session.block(session.units[-1])  # an upper bound of what recording a block takes
    recording = (time.perf_counter() - last) * len(session.units) / 2 * len(passes)
    seconds = sum(session.seconds(ROUNDING).values())  # an iteration of either pass takes about the same
    left = 60 * minutes - (time.perf_counter() - start) - recording
    fraction = {ROUNDING: 1 - STEPS_FRACTION, STEPS: STEPS_FRACTION}
    fraction = fraction if len(passes) == 2 else dict.fromkeys((ROUNDING, STEPS), 1.0)
    return {stage: max(1, min(MAX_ITERATIONS, int(left * fraction[stage] / seconds))) for stage in (ROUNDING, STEPS)}
