"""Quantise a model and save it: learned rounding, block after block, in a run that can be stopped and gone on with."""

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
    Learned,
    QuantizationSession,
    SessionProgress,
    relative_error,
)
from ..accelerators.quantize import Quantize
from ..errors import BadInput
from ..files import check_writable, holds_lock, write_file
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
MOST = 20_000  # iterations of a block, the paper's number: more are not made however long a run may take
SHARE = 0.25  # of the time for learning that steps get beside rounding


@holds_lock("out")
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
    """Quantise a model as `Quantize` says and save it in `out`; it is sampled and compared as the other.

    weights, acts, rank, groups, split, ranges, keep: see `Quantize`. spread: its `steps`, the queries of a sampling
        that are calibrated on, of `images` images (None: 16, with learned rounding 32).
    rounding: "nearest" or "adaround"; None: "adaround" for weights of 4 bits, "nearest" for 8.
    minutes: time for the whole of what is learned, divided over the blocks. iterations: of every block, in its place
        (300 if neither is given).
    sampler, times, steps, guidance_scale: of the samplings that are calibrated on (None: what the model recommends).
    say: told a line after every block.

    Finished blocks are kept in `out/blocks` until all are done, and the number of iterations in `out/run.json`, so that
    the same call, repeated after a stop or a kill, goes on and ends with the same weights.

    Returns a dict: folder, and what the model's card says under "quantized": method, bits, calibration, blocks, error
    (of x0, relative, on calls of other images), bytes.
    Raises BadInput before anything has run where something cannot be, KeyboardInterrupt at Ctrl-C, with what is kept.
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
    out, began = Path(out), time.perf_counter()
    asked = {"sampler": sampler, "times": times, "steps": steps, "guidance_scale": guidance_scale}
    setting = model.setting(**asked)  # type: ignore[arg-type]
    run = {
        "schema": 1,
        "method": format_spec(method),
        "model": fingerprint(model),
        "sampling": setting,
        "minutes": minutes,
    }
    known = earlier(out / RUN, run, iterations_of)
    if known is not None and (out / "model.json").is_file():
        return {"folder": str(out), **json.loads((out / "model.json").read_text())["card"]["quantized"]}
    check_writable(out / RUN)
    calls = model.calls(images, method.seed, **asked)
    work = method.work(model.denoiser, calls)
    if known is None:
        known = {**run, "iterations": allocated(method, work, minutes, began)}
        write_file(out / RUN, (json.dumps(known, indent=2) + "\n").encode())
    with watched() as tick:
        book = SavedBlocks(iterations_of(known), out / BLOCKS, say, tick)
        try:
            denoiser = method.finished(work, book)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"stopped with {book.done} blocks done; the same command goes on") from stop
    held = model.calls(HELD_OUT, method.seed + images, **asked)
    record = {
        "method": format_spec(method),
        "model": model.name,
        "model_sha256": model.sha256,
        "weights": weights,
        "acts": acts,
        "calibration": {"images": images, "calls": len(work.samples), "seed": method.seed, **setting},
        "iterations": known["iterations"] if book.figures else None,
        "blocks": book.figures,
        "eight": work.wide,
        "error": relative_error(model.denoiser, denoiser, method.samples(model.denoiser, held)),
        "bytes_fp32": sum(4 * p.numel() for p in model.denoiser.net.parameters()),
        "date": now(),
        "command": command,
    }
    check_finite("quantize: the record of what was found", record)
    made = replace(model, denoiser=denoiser, name=out.resolve().name, card={**model.card, "quantized": record})
    made.save(out, half=is_half(model))
    shutil.rmtree(out / BLOCKS, ignore_errors=True)
    size = (out / "weights.safetensors").stat().st_size
    return {"folder": str(out), **record, "bytes": size, "seconds": time.perf_counter() - began}


class SavedBlocks(SessionProgress):
    """A book on disk: one file a block, named after the hash of the unit's name, written whole or not at all."""

    def __init__(self, iterations: dict[str, int], folder: Path, say: Callable[[str], None], tick: Any) -> None:
        super().__init__(iterations)
        self.folder, self.say, self.bar = folder, say, tick
        self.figures: dict[str, dict[str, dict[str, float]]] = {}
        self.done, self.fresh, self.began = 0, 0, time.perf_counter()

    def known(self, stage: str, unit: str) -> Learned | None:
        from safetensors import SafetensorError, safe_open

        if not (file := self.file(stage, unit)).is_file():
            return None
        try:
            with safe_open(str(file), "pt") as kept:
                found: dict[str, Tensor] = {key: kept.get_tensor(key) for key in kept.keys()}  # noqa: SIM118
                return found, json.loads(kept.metadata()["figures"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
            raise BadInput(f"cannot read {file} ({type(e).__name__}): remove it to do this block again") from e

    def keep(self, stage: str, unit: str, learned: Learned) -> None:
        from safetensors.torch import save

        self.fresh += 1
        tensors = {key: value.detach().cpu().contiguous() for key, value in learned[0].items()}
        file = self.file(stage, unit)
        write_file(check_writable(file), save(tensors, {"figures": json.dumps(learned[1]), "unit": unit}))

    def inside(self, stage: str, unit: str, done: int, of: int, loss: float) -> None:
        self.bar(f"{stage} of {unit}", done, of, loss)

    def tick(self, stage: str, done: int, of: int, unit: str, figures: dict[str, float]) -> None:
        self.done += 1
        self.figures.setdefault(stage, {})[unit] = figures
        left = (time.perf_counter() - self.began) / max(self.fresh, 1) * (of - done)
        first = figures.get("nearest", figures.get("before", 0.0))
        gain = f"error {figures['error'] / first:.2f} of what it was" if first else "no error"
        last = "" if done == of else f", about {left / 60:.1f} min left" if left > 90 else f", about {left:.0f} s left"
        self.say(f"{stage}: block {done} of {of}, {unit}: {gain}{last if self.fresh else ''}")

    def file(self, stage: str, unit: str) -> Path:
        """Where a block is kept."""
        return self.folder / f"{stage}-{hashlib.sha256(unit.encode()).hexdigest()[:16]}.safetensors"


def iterations_of(known: dict[str, Any]) -> dict[str, int]:
    """Of every block, in each pass."""
    return {stage: int(known["iterations"][stage]) for stage in (ROUNDING, STEPS)}


def allocated(method: Quantize, work: QuantizationSession, minutes: float | None, began: float) -> dict[str, int]:
    """Iterations of every block in each pass: as asked, or what fits into the time, tried for a moment."""
    if minutes is None:
        return {ROUNDING: method.iterations, STEPS: method.iterations}
    passes = [ROUNDING] * (method.rounding == "adaround") + [STEPS] * method.learn_steps
    if not passes:
        return {ROUNDING: 0, STEPS: 0}
    last = time.perf_counter()
    work.block(work.units[-1])  # what a block's inputs cost, at the most
    look = (time.perf_counter() - last) * len(work.units) / 2 * len(passes)
    each = sum(work.seconds(ROUNDING).values())  # an iteration of either pass costs about the same
    left = 60 * minutes - (time.perf_counter() - began) - look
    share = {ROUNDING: 1 - SHARE, STEPS: SHARE} if len(passes) == 2 else dict.fromkeys((ROUNDING, STEPS), 1.0)
    return {stage: max(1, min(MOST, int(left * share[stage] / each))) for stage in (ROUNDING, STEPS)}
