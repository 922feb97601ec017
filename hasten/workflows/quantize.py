"""Quantise a model and save it: learned rounding, block after block, in a run that can be interrupted and resumed."""

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
    LearnedParams,
    QuantizationSession,
    SessionProgress,
    relative_error,
)
from ..accelerators.quantize import Quantize
from ..errors import BadInput
from ..files import check_writable, holds_lock, write_file
from ..model.model import Model
from ..model.sources import refuse_process
from ..pick import format_spec
from ..plan.config import SamplingConfig, SamplingOptions
from ..progress import ignore_messages
from ..storage.model_folder import check_savable
from ..storage.provenance import model_hash, tensor_hash, utc_now
from ..storage.runs import unfinished_run
from ..storage.weights import is_half
from ..train.sources import Data
from ..utils.config import Config
from ..utils.finite import check_finite, check_weights
from .source_data import PairSettings, calibration_sources
from .tune import tuning_progress

if TYPE_CHECKING:
    from typing_extensions import Unpack

RUN, BLOCKS = "run.json", "blocks"
HELD_OUT = 8  # images, of other seeds than the calibration's, on which the error is measured
MAX_ITERATIONS = 20_000  # of a block, the paper's number
STEPS_FRACTION = 0.25  # of the time for learning that step sizes get where rounding is learned too


@dataclass(frozen=True)
class QuantizeConfig(Config):
    """How to quantise a model; see `hasten.accelerators.quantize.Quantize` for the method.

    Args:
        weight_bits: 8 or 4.
        act_bits: 8, or None for activations in floating point.
        rounding: "nearest" or "adaround" (learned, block by block); None: "adaround" for 4 bits, "nearest" for 8.
        learn_step_sizes: learn the step sizes of the activations too.
        minutes: of learning, divided over the blocks.
        iterations: of every block, instead of minutes; 300 if neither is given.
        rank: of a low-rank branch in floating point in parallel to each layer; 0: none.
        time_groups: groups of times, each with activation ranges of its own; None: 6, or as many as there are.
        split: separate ranges for the two halves of the input of a U-Net's skip connections.
        calibration: of the ranges, "search" or "minmax".
        exclude: names or patterns of modules that stay in floating point; None: `conv_in` and `conv_out`.
        int8_fraction: of the weights, 0 to 1, that get 8 bits where `weight_bits` is 4: of the most sensitive layers.
        images: for calibration; None: 16, with learned rounding 32.
        calibration_steps: the number of evenly spaced time steps of a sampling that are used for calibration.
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
        options: dict[str, Any] = {
            "weights": self.weight_bits,
            "acts": self.act_bits,
            "rounding": rounding,
            "learn_steps": self.learn_step_sizes,
            "rank": self.rank,
            "split": self.split,
            "ranges": self.calibration,
            "images": images,
            "steps": self.calibration_steps,
            "eight": self.int8_fraction,
        }
        defaults: dict[str, Any] = {
            "groups": self.time_groups,
            "keep": None if self.exclude is None else tuple(self.exclude),
            "seed": self.seed,
            "iterations": self.iterations,
        }
        return Quantize(**options, **{key: value for key, value in defaults.items() if value is not None})


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
    data: str | Path | Data | Tensor | None = None,
    pairs: PairSettings | None = None,
    log: Callable[[str], None] = ignore_messages,
    command: str = "",
    **options: Unpack[QuantizeOptions],
) -> dict[str, Any]:
    """Quantise a model and save it in a model folder, which is sampled and compared like any other.

    Finished blocks are saved in `out/blocks` until all are done, and the number of iterations in `out/run.json`, so
    that the same call, repeated after an interruption, resumes and ends with the same weights.

    Args:
        model: the model in floating point; one of prompts is calibrated on its `calibration_prompts`.
        out: the folder to write.
        config: bits, rounding and calibration; None: 8 bits.
        sampling: of the calibration samples; None: the model's defaults.
        data: of a model that reads source images: images from which the sources of its calibration are made.
        pairs: what makes them; None: what the model's card records.
        log: called with one line after every block.
        command: the command line, for the model card.
        options: fields of `config` and of `sampling`.

    Returns:
        "folder", and the entry "quantized" of the model card: method, bits, calibration, blocks, error (of x0,
        relative, on model evaluations of other images), bytes.

    Raises:
        BadInput: before anything is computed, for options that are not supported.
        KeyboardInterrupt: at Ctrl-C; finished blocks are saved.
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
    refuse_process(model, "quantisation", bridges_only=True, sources=True)
    model = calibration_sources(model, data, pairs)
    check_savable(model, network=False, integers=True)
    check_weights(model.denoiser, model.name)
    out, start = Path(out), time.perf_counter()
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
    if model.conditioning is not None:
        run["prompts"] = list(model.calibration_prompts)
    if model.calibration_sources is not None:
        run["sources"] = tensor_hash(model.calibration_sources)
    record = unfinished_run(out / RUN, run, iterations_of)
    if record is not None and (out / "model.json").is_file():
        return {"folder": str(out), **json.loads((out / "model.json").read_text())["card"]["quantized"]}
    check_writable(out / RUN)
    calls = model.calls(images, method.seed, sampling)
    session = method.start(model.denoiser, calls)
    if record is None:
        record = {**run, "iterations": allocated(method, session, minutes, start)}
        write_file(out / RUN, (json.dumps(record, indent=2) + "\n").encode())
    with tuning_progress() as on_progress:
        progress = SavedBlocks(iterations_of(record), out / BLOCKS, log, on_progress)
        try:
            denoiser = method.finish(session, progress)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"stopped with {progress.done} blocks done; the same command resumes") from stop
    held_out = model.calls(HELD_OUT, method.seed + images, sampling)
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
        "date": utc_now(),
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
        log: called with one line after every block.
        on_progress: called after every iteration with what runs, iterations done, iterations in all and the loss.
    """

    def __init__(self, iterations: dict[str, int], folder: Path, log: Callable[[str], None], on_progress: Any) -> None:
        super().__init__(iterations)
        self.folder, self.log, self.on_progress = folder, log, on_progress
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
        write_file(check_writable(file), save(tensors, {"figures": json.dumps(learned[1]), "unit": unit}))

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
        self.log(f"{stage}: block {done} of {of}, {unit}: {gain}{last if self.learned else ''}")

    def file(self, stage: str, unit: str) -> Path:
        """The file of a block.

        Args:
            stage: the pass.
            unit: the block.
        """
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
