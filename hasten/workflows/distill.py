"""Distil a model with one method of `hasten.distillers` and save the students."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import torch

from ..distillers import DistillTask
from ..distillers._conditions import NullConditions, condition_source
from ..distillers._dry_run import DryRun, StagePlan, allocate, time_limits
from ..distillers._notices import run_notices
from ..distributed.ranks import ProcessLost, Ranks
from ..errors import BadInput, check_choice, check_int
from ..files import check_writable, holds_lock, refuse_inside, write_file
from ..model.lora import with_trainable_lora
from ..model.model import Model
from ..model.sources import refuse_process
from ..nets.lora import lora_layers
from ..nets.scalar_inputs import FixedGuidance
from ..performance.autotune import format_runtime, parse_runtime
from ..performance.cost import peak_bytes
from ..pick import format_spec, pick
from ..progress import ignore_messages
from ..storage.provenance import model_hash
from ..storage.runs import unfinished_run
from ..tasks.speech.features import Corpus
from ..train.data import Batches, Data
from ..train.fingerprint import describe_data
from ..train.trained_module import OPTIMISERS, check_eight_bit
from ..utils.config import Config
from ..utils.random import preserve_rng_state
from .distill_checks import check_models, distillation_structure
from .distill_data import null_conditions, shared_training_data, training_data
from .lora import check_lora
from .source_data import PairSettings, reads_source
from .students import Saver

RUN = "run.json"

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class DistillConfig(Config):
    """How to distil a model.

    Args:
        method: as `pick` spells it, such as `"guided:steps=(16,8,4,2,1)"`.
        steps, minutes, nfe_budget: the budget of the whole run, whichever is reached first (default: 30 minutes):
            training steps; time; model evaluations of one image, in floating-point operations.
        guidance_scale: that the students give; None: the model's recommended one. `guided` learns a range.
        batch_size: images a step. seed: of everything that is random.
        precision: `fp32`, `bf16` (autocast), or `auto`: what is faster on this device.
        grad_accumulation: parts of a batch that are computed one after another, to need less memory.
        fsdp: shard the student (and not the teacher) among the processes of torchrun, for methods whose student is
            evaluated as a whole.
        lora: rank of a LoRA that is trained in place of all weights, and saved in a file of its own; None: no LoRA.
        lora_targets: layers of the LoRA, see `hasten.nets.lora.target_layers`.
        gradient_checkpointing: compute activations again in the backward pass, to need less memory; for networks of
            diffusers.
        optimizer: `adamw`; `adamw8bit` or `paged-adamw8bit`, of bitsandbytes on CUDA, to need less memory; `muon`,
            at 20 times the method's rate.
        source, degrade: of a model that reads a source image: what makes the sources of the data, see `TrainConfig`;
            None: what its card records.
        structure: weight of the structure term, or its options (`train.sadm.Sadm`).
    """

    method: str = "guided"
    steps: int | None = None
    minutes: float | None = None
    nfe_budget: float | None = None
    guidance_scale: float | None = None
    batch_size: int = 128
    seed: int = 0
    precision: str = "auto"
    grad_accumulation: int = 1
    fsdp: bool = False
    lora: int | None = None
    lora_targets: str | None = None
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    source: str | None = None
    degrade: str | None = None
    structure: float | str | None = None

    renamed: ClassVar[Mapping[str, str]] = {
        "evaluations": "nfe_budget",
        "runtime": "precision",
        "accumulate": "grad_accumulation",
        "shard": "fsdp",
    }


class DistillOptions(TypedDict, total=False):
    """The fields of `DistillConfig` as keyword arguments."""

    say: Callable[[str], None]  # the old name of `log`
    method: str
    steps: int | None
    minutes: float | None
    nfe_budget: float | None
    guidance_scale: float | None
    batch_size: int
    seed: int
    precision: str
    grad_accumulation: int
    fsdp: bool
    lora: int | None
    lora_targets: str | None
    gradient_checkpointing: bool
    optimizer: str
    source: str | None
    degrade: str | None
    structure: float | str | None


@holds_lock("out", unless="dry_run")
@preserve_rng_state()
def distill_model(
    model: Model,
    out: str | Path,
    config: DistillConfig | str | None = None,
    data: str | Path | Data | Corpus | torch.Tensor | list[str] | tuple[str, ...] | None = None,
    *,
    init: Model | str | Path | None = None,
    dry_run: bool = False,
    show: bool = True,
    log: Callable[[str], None] = ignore_messages,
    command: str = "",
    **options: Unpack[DistillOptions],
) -> dict[str, Any]:
    """Train students of a model and save them: each stage's in `out/<stage>`, the last one also in `out` itself.

    First every stage is tried for a moment, which gives its cost and divides the budget; the result is saved in
    `out/run.json`, so that the same call, repeated after a stop or a kill, ends with the same students. (But with
    `minutes` a stage that turns out slower than in the trial by more than a tenth ends early, by the clock.) Under
    torchrun, the processes share every batch, and the pairs that some methods make; the main one writes, and all must
    see `out`.

    Args:
        config: method, budget and optimiser, or the method alone as text; None: the defaults. options: fields of it.
        data: what `open_data` reads; may be omitted for methods that train on the teacher's own samples (`needs_data`
            is false): the classes then have equal parts. For samples that are no images: a tensor (n, *shape), or a
            `Data` with labels. Images for a model of latents are encoded. Models of prompts need captioned images, or,
            for methods that train on the teacher's own samples, a list of prompts.
        init: what the first student begins as, in place of the teacher: another model of the same shape, classes and
            schedule, such as an earlier student (adversarial and distribution matching refine one so). Or the
            .safetensors file of a LoRA of the teacher (such as `hasten lora extract` makes of a student), which is
            trained further.
        dry_run: only report what it would cost. show: progress bars on a terminal. log: called with a line at every
            stage. command: for the models' cards.

    Returns:
        A dict: folder, method, stages, evaluations, seconds, memory_bytes (of the largest moment of the trial),
        students (their names and folders).

    Raises:
        BadInput: before anything is computed, for what cannot be.
        KeyboardInterrupt: at Ctrl-C, with what is saved.
    """
    if isinstance(config, str):  # the method
        config = DistillConfig(method=config)
    log = options.pop("say", log)
    config = DistillConfig.of(config, options)
    method, steps, minutes, evaluations = config.method, config.steps, config.minutes, config.nfe_budget
    batch_size, seed, runtime, accumulate = config.batch_size, config.seed, config.precision, config.grad_accumulation
    guidance_scale, shard, say = config.guidance_scale, config.fsdp, log
    refuse_process(model, "distillation", sources=True)
    distiller = pick("distillers", method)
    config, init, adapted = open_init(model, init, config)
    check_models(model, init, distiller, method)
    structure = distillation_structure(config, distiller)
    check_lora(adapted, distiller, config.lora, config.lora_targets, config.fsdp)
    ranks = Ranks.start(str(model.device))
    check_int("batch_size", batch_size, 1)
    check_int("accumulate", accumulate, 1)
    check_int("seed", seed, 0)
    check_choice("optimizer", config.optimizer, OPTIMISERS)
    check_eight_bit(config.optimizer, model.device)
    if distiller.needs_data and (data is None or isinstance(data, (list, tuple))):
        more = "" if model.conditioning is None else ", with captions"
        raise BadInput(f"{method} needs real images{more}: set data, such as the folder that the model was trained on")
    if (steps, minutes, evaluations) == (None, None, None):
        minutes = 30.0
    for name, value in (("steps", steps), ("minutes", minutes), ("evaluations", evaluations)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise BadInput(f"{name} must be positive, got {value}")
    out = Path(out)
    scale = model.guidance_scale if guidance_scale is None else float(guidance_scale)
    if model.conditioning is not None and model.denoiser.guidance_range is None:
        scale = max(scale, 1.0)  # as in pipelines, where 1 or less is none
    teacher, denoiser = model.guided(scale), model.denoiser
    first = None if init is None else init.denoiser
    if not distiller.keeps_guidance_range:
        if denoiser.net_takes_guidance:  # the method does not vary the scale: fix it
            denoiser = teacher = at_scale(denoiser, scale)
        if first is not None and first.net_takes_guidance:
            first = at_scale(first, scale)
    refuse_inside(out, data if isinstance(data, (str, Path)) else None)
    pairs = pair_settings(model, data, config)
    source = shared_training_data(ranks, lambda: training_data(model, data, None if dry_run else out, pairs))
    captions = condition_source(Batches(source, 1))
    null = null_conditions(model, source)
    if null:
        teacher = NullConditions(teacher, null).eval()
    run = {
        "schema": 1,
        "method": format_spec(distiller),
        "teacher": model_hash(model),
        "guidance_scale": scale,
        "seed": seed,
        "batch_size": batch_size,
        "images": len(source),
        "data": describe_data(source),
        "budget": {"steps": steps, "minutes": minutes, "evaluations": evaluations},
    } | ({} if init is None else {"init": model_hash(init)})
    if config.lora is not None:
        run |= {"lora": config.lora, "lora_targets": config.lora_targets}
    run |= {} if captions is None else {"captions": captions.digest()}
    run |= {} if pairs is None else {"pairs": pairs.card()}
    run |= {} if config.optimizer == "adamw" else {"optimizer": config.optimizer}
    run |= {} if structure is None else {"structure": asdict(structure)}
    precision = ranks.on_main_process(lambda: resolve_precision(model, runtime, batch_size))
    denoiser.requires_grad_(False).eval()
    if first is not None:
        first.requires_grad_(False).eval().to(model.device)
    common: dict[str, Any] = {
        "teacher": teacher,
        "denoiser": denoiser,
        "batches": Batches(source, batch_size, seed=seed),
        "shape": model.shape,
        "out": out,
        "guidance_scale": scale,
        "seed": seed,
        "precision": precision,
        "device": str(model.device),
        "show": show and ranks.is_main_process,
        "accumulate": accumulate,
        "shard": shard,
        "classes": None if model.classes is None else len(model.classes),
        "codec": model.codec,
        "init": first,
        "lora": config.lora,
        "lora_targets": config.lora_targets,
        "null_conditions": null,
        "gradient_checkpointing": config.gradient_checkpointing,
        "optimizer": config.optimizer,
        "structure": structure,
    }
    for line in (
        run_notices(distiller, denoiser, batch_size, accumulate * ranks.world, structure)
        if ranks.is_main_process
        else ()
    ):
        print(f"hasten: {line}", file=sys.stderr)

    def planned() -> dict[str, Any]:
        known = unfinished_run(out / RUN, run, read_stages) if not dry_run else None
        if known is not None and runtime != "auto" and known["precision"] != precision:
            raise BadInput(
                f"{out} is a run with runtime {known['precision']}, got {precision}: use the same, write to another "
                "folder, or remove it"
            )
        if known is None:
            trial = DryRun(**common, processes=ranks.world)
            distiller.distill(trial)
            allocate(trial.stages, steps, minutes, evaluations)
            # a stage that is much slower than in the trial ends early, so that the run takes no more minutes
            limits = {} if minutes is None else time_limits(trial.stages, minutes)
            known = {
                **run,
                "precision": precision,
                "stages": [asdict(s) for s in trial.stages],
                "minutes": limits,
                "memory_bytes": peak_bytes(model.device),
            }
            if not dry_run:
                write_file(check_writable(out / RUN), (json.dumps(known, indent=2) + "\n").encode())
        return known

    known = ranks.on_main_process(planned)
    stages = read_stages(known)
    result = {
        "folder": str(out),
        "method": run["method"],
        "guidance_scale": scale,
        "stages": known["stages"],
        "evaluations": sum(s.evaluations * s.steps for s in stages),
        "precision": known["precision"],
        "seconds": sum(s.seconds * s.steps for s in stages),
        "memory_bytes": known["memory_bytes"],
        "students": {},
    }
    for stage in stages if ranks.is_main_process else ():
        say(describe_stage(stage))
    if dry_run:
        return result
    common["precision"] = known["precision"]
    saver = Saver(model, out, result, scale, command, say, source.captions, adapted)
    if reads_source(model):
        saver.show_sources(source, {} if pairs is None else pairs.card())
    save = saver if ranks.is_main_process else (lambda name, student: None)
    task = DistillTask(
        **common,
        steps={s.name: s.steps for s in stages},
        minutes=known.get("minutes", {}),
        save_student=save,
        ranks=ranks,
    )
    start = time.perf_counter()
    try:
        last = distiller.distill(task)
    except ProcessLost as e:
        raise ProcessLost(f"{str(e).partition(';')[0]}; {out} is intact: the same command resumes the run") from e
    if ranks.is_main_process:
        saver(None, last)
    ranks.barrier()
    return {**result, "seconds": time.perf_counter() - start}


def open_init(
    model: Model, init: Model | str | Path | None, config: DistillConfig
) -> tuple[DistillConfig, Model | None, Model]:
    """The settings, with the rank of a LoRA that is trained further, what the student begins as, and what a LoRA
    changes."""
    if init is None or isinstance(init, Model):
        return config, init, model if init is None else init
    first = with_trainable_lora(model, init)
    rank = next(iter(lora_layers(first.denoiser.net).values())).low_rank().rank
    if config.lora not in (None, rank) or config.lora_targets is not None:
        asked = "lora_targets" if config.lora_targets is not None else f"lora={config.lora}"
        raise BadInput(
            f"{init} is a LoRA of rank {rank} with layers of its own, which is trained further: omit {asked}"
        )
    return config.replace(lora=rank), first, model


def pair_settings(model: Model, data: Any, config: DistillConfig) -> PairSettings | None:
    """What makes the sources of the data; None where the model reads none, or the data has them.

    Raises:
        BadInput: for sources that are not used.
    """
    has_sources = isinstance(data, Data) and data.conditions is not None
    if reads_source(model) and not has_sources:
        return PairSettings.of(model, config.source, config.degrade)
    if given := next((name for name in ("source", "degrade") if getattr(config, name) is not None), None):
        why = "the data has its sources" if has_sources else f"{model.name} reads no source image"
        raise BadInput(f"--{given} makes the sources of the data, and {why}: leave it out")
    return None


def at_scale(denoiser: Any, scale: float) -> Any:
    """A denoiser whose network takes a guidance scale, at one scale."""
    net = denoiser.net
    net = net.fixed(scale) if hasattr(net, "fixed") else FixedGuidance(copy.deepcopy(net), scale)
    return denoiser.replace(net=net, guidance_range=(scale, scale))


def read_stages(known: dict[str, Any]) -> list[StagePlan]:
    """The stages that the trial measured."""
    return [StagePlan(**stage) for stage in known["stages"]]


def describe_stage(stage: StagePlan) -> str:
    """A line about a stage before it begins."""
    what = f"{stage.pairs} pairs" if stage.pairs else f"{stage.steps} steps"
    seconds = stage.seconds * stage.steps
    last = f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
    return f"{stage.name}: {what} of {stage.evaluations:.3g} evaluations, about {last}"


def resolve_precision(model: Model, runtime: str, batch_size: int) -> str:
    """`fp32` or `bf16`, as requested or as a timing of the network decides."""
    if runtime != "auto":
        precision, *rest = format_runtime(parse_runtime(runtime)).split("+")
        if rest:
            raise BadInput(f"distillation takes the runtimes fp32, bf16 and auto, and does not use +{'+'.join(rest)}")
        return precision
    return model.precision_for("auto", min(batch_size, 64)).split("+")[0]
