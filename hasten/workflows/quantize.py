"""Quantise a model and save it: learned rounding, block after block, in a run that can be stopped and gone on with."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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
from ..plan.config import SamplingConfig, SamplingOptions
from ..progress import ignore_messages
from ..storage.model_folder import check_savable
from ..storage.provenance import model_hash, utc_now
from ..storage.runs import unfinished_run
from ..storage.weights import is_half
from ..utils.config import Config
from ..utils.finite import check_finite, check_weights
from .tune import tuning_progress

if TYPE_CHECKING:
    from typing_extensions import Unpack

RUN, BLOCKS = "run.json", "blocks"
HELD_OUT = 8  # images, of other seeds than the calibration's, on which the error is measured
MOST = 20_000  # iterations of a block, the paper's number: more are not made however long a run may take
SHARE = 0.25  # of the time for learning that steps get beside rounding


@dataclass(frozen=True)
class QuantizeConfig(Config):
    """How to quantise a model; see `hasten.accelerators.quantize.Quantize` for the method.

    Args:
        weight_bits: 8 or 4. act_bits: 8, or None for activations in floating point.
        rounding: "nearest" or "adaround" (learned, block by block); None: "adaround" for 4 bits, "nearest" for 8.
        learn_step_sizes: learn the step sizes of the activations too.
        minutes: time for all that is learned, divided over the blocks. iterations: of every block, in its place; 300 if
            neither is given.
        rank: of a low-rank branch in floating point in parallel to each layer; 0: none.
        time_groups: groups of times, each with activation ranges of its own; None: 6, or as many as there are.
        split: separate ranges for the two halves of the input of a U-Net's skip connections.
        calibration: of the ranges, "search" or "minmax".
        exclude: names or patterns of modules that stay in floating point; None: `conv_in` and `conv_out`.
        int8_fraction: of the weights, 0 to 1, that get 8 bits where `weight_bits` is 4: of the most sensitive layers.
        images: to calibrate on; None: 16, with learned rounding 32.
        calibration_steps: model evaluations of a sampling that are calibrated on, evenly spaced.
        seed: of the first calibration image; None: 2,000,000, far from the seeds that images are sampled with.
    """

    weight_bits: int = 8
    act_bits: int | None = 8
    rounding: str | None = None
    learn_step_sizes: bool = False
    minutes: float | None = None
    iterations: int | None = None
    rank: int = 0
    time_groups: int | None = None
    split: bool = True
    calibration: str = "search"
    exclude: tuple[str, ...] | None = None
    int8_fraction: float = 0.0
    images: int | None = None
    calibration_steps: int = 20
    seed: int | None = None

    renamed: ClassVar[Mapping[str, str]] = {
        "weights": "weight_bits",
        "acts": "act_bits",
        "learn_steps": "learn_step_sizes",
        "groups": "time_groups",
        "ranges": "calibration",
        "keep": "exclude",
        "eight": "int8_fraction",
        "spread": "calibration_steps",
    }

    def method(self) -> Quantize:
        """The accelerator with these options."""
        rounding = ("adaround" if self.weight_bits == 4 else "nearest") if self.rounding is None else self.rounding
        learned = rounding == "adaround" or self.learn_step_sizes
        images = (32 if learned else 16) if self.images is None else self.images
        more: dict[str, Any] = {
            "keep": None if self.exclude is None else tuple(self.exclude),
            "eight": self.int8_fraction,
            "seed": self.seed,
            "iterations": self.iterations,
        }
        return Quantize(
            weights=self.weight_bits,  # type: ignore[arg-type]
            acts=self.act_bits,  # type: ignore[arg-type]
            rounding=rounding,  # type: ignore[arg-type]
            learn_steps=self.learn_step_sizes,
            rank=self.rank,
            groups=self.time_groups,
            split=self.split,
            ranges=self.calibration,  # type: ignore[arg-type]
            images=images,
            steps=self.calibration_steps,
            **{key: value for key, value in more.items() if value is not None},
        )


QUANTIZE_FIELDS = {*QuantizeConfig.names(), *QuantizeConfig.renamed} - {"steps"}


class QuantizeOptions(SamplingOptions, total=False):
    """The fields of `QuantizeConfig` and of `SamplingConfig` as keyword arguments."""

    say: Callable[[str], None]  # the old name of `log`
    weight_bits: int
    act_bits: int | None
    rounding: str | None
    learn_step_sizes: bool
    minutes: float | None
    iterations: int | None
    rank: int
    time_groups: int | None
    split: bool
    calibration: str
    exclude: tuple[str, ...] | None
    int8_fraction: float
    images: int | None
    calibration_steps: int
    seed: int | None


@holds_lock("out")
def quantize_model(
    model: Model,
    out: str | Path,
    config: QuantizeConfig | None = None,
    sampling: SamplingConfig | None = None,
    *,
    log: Callable[[str], None] = ignore_messages,
    command: str = "",
    **options: Unpack[QuantizeOptions],
) -> dict[str, Any]:
    """Quantise a model and save it in `out`; it is sampled and compared as any other.

    Finished blocks are saved in `out/blocks` until all are done, and the number of iterations in `out/run.json`, so
    that the same call, repeated after a stop or a kill, resumes and ends with the same weights.

    Args:
        config: bits, rounding and calibration; None: 8 bits. options: fields of it and of `sampling`.
        sampling: of the samplings that are calibrated on; None: as the model recommends.
        log: called with a line after every block. command: for the model's card.

    Returns:
        A dict: folder, and what the model's card says under "quantized": method, bits, calibration, blocks, error (of
        x0, relative, on calls of other images), bytes.

    Raises:
        BadInput: before anything is computed, for what cannot be.
        KeyboardInterrupt: at Ctrl-C, with what is saved.
    """
    log = options.pop("say", log)
    own = {key: value for key, value in options.items() if key in QUANTIZE_FIELDS}
    config = QuantizeConfig.of(config, own)
    sampling = SamplingConfig.of(sampling, {key: value for key, value in options.items() if key not in own})
    method, minutes, iterations = config.method(), config.minutes, config.iterations
    weights, acts, images = config.weight_bits, config.act_bits, method.images
    if minutes is not None and iterations is not None:
        raise BadInput("give minutes or iterations, not both")
    if minutes is not None and not (minutes > 0 and math.isfinite(minutes)):
        raise BadInput(f"minutes must be positive, got {minutes}")
    check_savable(model, network=False)
    check_weights(model.denoiser, model.name)
    out, began = Path(out), time.perf_counter()
    settings = model.resolve(sampling).settings()
    precision = settings.pop("precision")
    setting = {**settings, "runtime": precision}  # the name of the field in run.json and in cards
    run = {
        "schema": 1,
        "method": format_spec(method),
        "model": model_hash(model),
        "sampling": setting,
        "minutes": minutes,
    }
    known = unfinished_run(out / RUN, run, iterations_of)
    if known is not None and (out / "model.json").is_file():
        return {"folder": str(out), **json.loads((out / "model.json").read_text())["card"]["quantized"]}
    check_writable(out / RUN)
    calls = model.calls(images, method.seed, sampling)
    work = method.work(model.denoiser, calls)
    if known is None:
        known = {**run, "iterations": allocated(method, work, minutes, began)}
        write_file(out / RUN, (json.dumps(known, indent=2) + "\n").encode())
    with tuning_progress() as tick:
        book = SavedBlocks(iterations_of(known), out / BLOCKS, log, tick)
        try:
            denoiser = method.finished(work, book)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"stopped with {book.done} blocks done; the same command goes on") from stop
    held = model.calls(HELD_OUT, method.seed + images, sampling)
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
        "date": utc_now(),
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
