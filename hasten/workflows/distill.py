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

from ..distillers import Distiller, DistillTask, Student
from ..distillers._dry_run import DryRun, StagePlan, allocate, time_limits
from ..distillers._notices import run_notices
from ..distributed.ranks import ProcessLost, Ranks
from ..errors import BadInput, HastenError, check_int
from ..files import check_writable, holds_lock, refuse_inside, write_file
from ..images import encode_png, make_image_grid
from ..model.model import Model
from ..nets.quantized import layers
from ..nets.scalar_inputs import FixedGuidance
from ..performance.autotune import format_runtime, parse_runtime
from ..performance.cost import process_peak
from ..pick import format_spec, pick
from ..plan.table import plan as compile_plan
from ..progress import ignore_messages
from ..storage.checks import check_trainable
from ..storage.model_folder import check_savable
from ..storage.provenance import model_hash, utc_now
from ..storage.runs import unfinished_run
from ..train.data import Batches, Data
from ..train.fingerprint import describe_data
from ..utils.config import Config
from ..utils.random import preserve_rng_state
from ._distill_data import labels_only, training_data

RUN = "run.json"
PREVIEW_IMAGES = 64  # images in the preview of a stage
PREVIEW_BATCH = 16  # of them per evaluation of the network

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class DistillConfig(Config):
    """How to distil a model.

    Args:
        method: as `pick` spells it, such as `"guided:steps=(16,8,4,2,1)"`.
        steps, minutes, nfe_budget: the budget of the whole run, whichever is reached first; 30 minutes if none is
            given: steps of training; time; model evaluations of one image, in floating-point operations.
        guidance_scale: of the students; None: the model's recommended one. `guided` learns a range.
        batch_size: images a step. seed: of everything that is random.
        precision: `fp32`, `bf16` (autocast), or `auto`: what is faster on this device.
        grad_accumulation: parts of a batch that are computed one after another, to need less memory.
        fsdp: shard the student (and not the teacher) among the processes of torchrun, for methods whose student is
            evaluated as a whole.
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


@holds_lock("out", unless="dry_run")
@preserve_rng_state()
def distill_model(
    model: Model,
    out: str | Path,
    config: DistillConfig | str | None = None,
    data: str | Path | Data | torch.Tensor | None = None,
    *,
    init: Model | None = None,
    dry_run: bool = False,
    show: bool = True,
    log: Callable[[str], None] = ignore_messages,
    command: str = "",
    **options: Unpack[DistillOptions],
) -> dict[str, Any]:
    """Train students of a model and save them: each stage's in `out/<stage>`, the last one also in `out` itself.

    First every stage runs for a moment, which measures its cost and divides the budget; the plan is saved in
    `out/run.json`, so that the same call, repeated after an interruption, ends with the same students. (But with
    `minutes` a stage that turns out slower than in the trial by more than a tenth ends early, by the clock.) Under
    torchrun, the processes share every batch, and the generation of pairs; the main one writes, and all must see
    `out`.

    Args:
        config: method, budget and optimiser, or the method alone as text; None: the defaults. options: fields of it.
        data: what `open_data` reads; optional for methods that train on the teacher's own samples (`needs_data` is
            false): all classes then get equal parts. For samples other than images: a tensor (n, *shape), or a `Data`
            with labels. Images for a latent model are encoded.
        init: initial weights of the first student, in place of the teacher's: another model of the same shape, classes
            and schedule, such as an earlier student (to improve it by adversarial training or distribution matching).
        dry_run: only report what it would cost. show: progress bars on a terminal. log: called with a line at every
            stage. command: for the models' cards.

    Returns:
        A dict: folder, method, stages, evaluations, seconds, memory_bytes (maximum of the trial),
        students (their names and folders).

    Raises:
        BadInput: before anything runs, for arguments that do not fit.
        KeyboardInterrupt: at Ctrl-C; the run can be resumed.
    """
    if isinstance(config, str):  # the method
        config = DistillConfig(method=config)
    log = options.pop("say", log)
    config = DistillConfig.of(config, options)
    method, steps, minutes, evaluations = config.method, config.steps, config.minutes, config.nfe_budget
    batch_size, seed, runtime, accumulate = config.batch_size, config.seed, config.precision, config.grad_accumulation
    guidance_scale, shard, say = config.guidance_scale, config.fsdp, log
    distiller: Distiller = pick("distillers", method)
    check_models(model, init, distiller, method)
    ranks = Ranks.start(str(model.device))
    check_int("batch_size", batch_size, 1)
    check_int("accumulate", accumulate, 1)
    check_int("seed", seed, 0)
    if data is None and distiller.needs_data:
        raise BadInput(f"{method} needs real images: set data, such as the folder that the model was trained on")
    if (steps, minutes, evaluations) == (None, None, None):
        minutes = 30.0
    for name, value in (("steps", steps), ("minutes", minutes), ("evaluations", evaluations)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise BadInput(f"{name} must be positive, got {value}")
    out = Path(out)
    scale = model.guidance_scale if guidance_scale is None else float(guidance_scale)
    teacher, denoiser = model.guided(scale), model.denoiser
    first = None if init is None else init.denoiser
    if not distiller.keeps_guidance_range:
        if denoiser.net_takes_guidance:  # the method does not vary the scale: fix it
            denoiser = teacher = at_scale(denoiser, scale)
        if first is not None and first.net_takes_guidance:
            first = at_scale(first, scale)
    refuse_inside(out, data)
    source = labels_only(model) if data is None else training_data(model, data)
    run = {
        "schema": 1, "method": format_spec(distiller), "teacher": model_hash(model), "guidance_scale": scale,
        "seed": seed, "batch_size": batch_size, "images": len(source), "data": describe_data(source),
        "budget": {"steps": steps, "minutes": minutes, "evaluations": evaluations},
    } | ({} if init is None else {"init": model_hash(init)})  # fmt: skip
    precision = ranks.on_main_process(lambda: distill_precision(model, runtime, batch_size))
    denoiser.requires_grad_(False).eval()
    if first is not None:
        first.requires_grad_(False).eval().to(model.device)
    common: dict[str, Any] = {
        "teacher": teacher, "denoiser": denoiser, "batches": Batches(source, batch_size, seed=seed),
        "shape": model.shape, "out": out, "guidance_scale": scale, "seed": seed, "precision": precision,
        "device": str(model.device), "show": show and ranks.is_main_process, "accumulate": accumulate, "shard": shard,
        "classes": None if model.classes is None else len(model.classes), "codec": model.codec,
        "init": first,
    }  # fmt: skip
    for line in run_notices(distiller, denoiser, batch_size, accumulate * ranks.world) if ranks.is_main_process else ():
        print(f"hasten: {line}", file=sys.stderr)

    def planned() -> dict[str, Any]:
        known = unfinished_run(out / RUN, run, read_stages) if not dry_run else None
        if known is not None and runtime != "auto" and known["precision"] != precision:
            raise BadInput(
                f"{out} is a run with precision {known['precision']}, got {precision}: use the same, write to another "
                "folder, or remove it"
            )
        if known is None:
            trial = DryRun(**common, processes=ranks.world)
            distiller.distill(trial)
            allocate(trial.stages, steps, minutes, evaluations)
            # a stage that is much slower than in the trial ends early, so that the run takes no more minutes
            limits = {} if minutes is None else time_limits(trial.stages, minutes)
            known = {**run, "precision": precision, "stages": [asdict(s) for s in trial.stages],
                     "minutes": limits, "memory_bytes": peak_bytes(model.device)}  # fmt: skip
            if not dry_run:
                write_file(check_writable(out / RUN), (json.dumps(known, indent=2) + "\n").encode())
        return known

    known = ranks.on_main_process(planned)
    stages = read_stages(known)
    result = {
        "folder": str(out), "method": run["method"], "guidance_scale": scale, "stages": known["stages"],
        "evaluations": sum(s.evaluations * s.steps for s in stages), "precision": known["precision"],
        "seconds": sum(s.seconds * s.steps for s in stages), "memory_bytes": known["memory_bytes"], "students": {},
    }  # fmt: skip
    for stage in stages if ranks.is_main_process else ():
        say(describe_stage(stage))
    if dry_run:
        return result
    common["precision"] = known["precision"]
    saver = Saver(model, out, result, scale, command, say)
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


def check_models(model: Model, init: Model | None, distiller: Distiller, method: str) -> None:
    """Refuse, before anything runs, models that cannot be distilled so or whose students could not be saved."""
    name = method.partition(":")[0]
    for one in (model,) if init is None else (model, init):
        if one.conditioning is not None:
            raise BadInput(
                f"{one.name} takes prompts: distilling networks that read text is not supported yet; "
                "what works is a model without conditions or with classes"
            )
        if next(layers(one.denoiser.net), None) is not None or getattr(one.denoiser.net, "runs_elsewhere", False):
            raise BadInput(
                f"{one.name} is quantised or exported, which cannot be trained: use the model it was made from"
            )
        if one.denoiser.step_counts is not None:
            raise BadInput(f"{one.name} is one network for several step counts, which no method can distil further")
    check_savable(model if init is None else init, network=not distiller.adds_inputs)
    for one in (model,) if init is None else (model, init):
        check_trainable(one.name, one.denoiser, one.shape, one.cond(2))
    before = model.card.get("distilled", {})
    if before and not (before.get("any_time") or before.get("stage") == "guidance"):
        needed, k = distiller.teacher_steps, before["steps"]
        direction = before.get("figures", {}).get("direction", "decode")
        if direction != distiller.direction:
            does = "encodes images into noise" if direction == "encode" else "makes images from noise"
            raise BadInput(f"{model.name} {does}, which {name} cannot learn from: use another teacher")
        if needed not in (0, k):
            start = f", or use {name} with start={k}" if isinstance(getattr(distiller, "start", None), int) else ""
            times = "at any time" if needed is None else f"at the times of {needed} steps"
            raise BadInput(
                f"{model.name} is a student of {k} steps and was trained at no other times, {name} evaluates its "
                f"teacher {times}: use the model it was distilled from as the teacher, and this one as --init "
                f"(init=){start}"
            )
    if init is None:
        return
    for what, mine, theirs in (
        ("shape", tuple(init.shape), tuple(model.shape)),
        ("classes", len(init.classes or ()), len(model.classes or ())),
    ):
        if mine != theirs:
            raise BadInput(f"--init (init=) {init.name} has {what} {mine}, {model.name} has {theirs}")
    if init.classes != model.classes:
        raise BadInput(
            f"--init (init=) {init.name} has the classes of {model.name} under other names or in another order"
        )
    if init.denoiser.schedule.to_dict() != model.denoiser.schedule.to_dict():
        raise BadInput(f"--init (init=) {init.name} was trained on another schedule than {model.name}")


def at_scale(denoiser: Any, scale: float) -> Any:
    """A denoiser whose network takes a guidance scale, at one scale."""
    net = denoiser.net
    net = net.fixed(scale) if hasattr(net, "fixed") else FixedGuidance(copy.deepcopy(net), scale)
    return denoiser.replace(net=net, guidance_range=(scale, scale))


class Saver:
    """Saves students, and previews of their samples, where they do not exist already."""

    def __init__(
        self, teacher: Model, out: Path, result: dict[str, Any], scale: float, command: str, say: Callable[[str], None]
    ) -> None:
        self.teacher, self.out, self.result, self.scale = teacher, out, result, scale
        self.command, self.say = command, say

    def __call__(self, name: str | None, student: Student) -> None:
        """Save the student of the stage `name`; None: the last one, into the run's own folder."""
        folder = self.out if name is None else self.out / name
        model = self.model(name, student)
        self.result["students"][name or "."] = str(folder)
        if not (folder / "model.json").is_file():
            model.save(folder)
            if name is not None:
                self.say(f"{name}: {folder} is saved")
        picture = self.out / f"{name}.png"
        if name is None or picture.is_file() or student.figures.get("direction") == "encode" or not drawable(model):
            return
        try:
            images, columns = sample_grid(model)
            write_file(check_writable(picture), encode_png(make_image_grid(images, columns)))
        except (HastenError, RuntimeError) as e:  # a failed preview must not lose the student
            first = (str(e).splitlines() or [type(e).__name__])[0]
            print(f"hasten: no preview {picture}: {first}; {folder} is saved", file=sys.stderr)

    def model(self, name: str | None, student: Student) -> Model:
        """The student as a model, with its plan and its origin on its card."""
        span = student.guidance or (self.scale, self.scale)
        denoiser = copy.deepcopy(student.denoiser).eval().requires_grad_(False)  # the next stage uses the original
        if not denoiser.net_takes_guidance:
            denoiser = denoiser.replace(guidance_range=span)
        sampler = pick("samplers", student.sampler)
        times = pick("times", student.times)(denoiser.schedule, student.steps)
        plan = compile_plan(sampler, denoiser.schedule, times) if sampler.linear else None
        card: dict[str, Any] = {
            **{key: self.teacher.card[key] for key in ("data", "licence", "reference") if key in self.teacher.card},
            "summary": f"student of {self.teacher.name} for {student.steps} evaluations",
            "distilled": {
                "teacher": self.teacher.name, "teacher_sha256": self.teacher.sha256, "stage": name,
                **{key: self.result[key] for key in ("method", "stages", "evaluations", "precision")},
                "steps": student.steps, "guidance_scale": list(span), "figures": student.figures, "date": utc_now(),
                "command": self.command, **({"any_time": True} if student.any_time else {}),
            },
        }  # fmt: skip
        return Model(
            denoiser, self.out.resolve().name + ("" if name is None else f"-{name}"), self.teacher.shape,
            self.teacher.classes, self.teacher.codec, student.sampler, student.times, student.steps,
            min(max(self.scale, span[0]), span[1]), plan=plan, parts=student.parts, card=card,
            decoder=self.teacher.decoder, pipeline=self.teacher.pipeline,
        )  # fmt: skip


def drawable(model: Model) -> bool:
    """Whether the model generates images."""
    return model.decoder is not None or (model.codec == "image" and model.shape[0] in (1, 3, 4))


def sample_grid(model: Model) -> tuple[torch.Tensor, int | None]:
    """At most 64 images of a model, and the columns of their grid: one a class, or None."""
    if model.classes is None:
        return model.sample(PREVIEW_IMAGES, batch_size=PREVIEW_BATCH), None
    columns = len(model.classes)
    if columns <= PREVIEW_IMAGES:
        n = columns * (PREVIEW_IMAGES // columns)
        return model.sample(n, batch_size=PREVIEW_BATCH), columns
    return model.sample(PREVIEW_IMAGES, label=list(range(PREVIEW_IMAGES)), batch_size=PREVIEW_BATCH), None


def read_stages(known: dict[str, Any]) -> list[StagePlan]:
    """The stages that the trial measured."""
    return [StagePlan(**stage) for stage in known["stages"]]


def describe_stage(stage: StagePlan) -> str:
    """A line about a stage before it begins."""
    what = f"{stage.pairs} pairs" if stage.pairs else f"{stage.steps} steps"
    seconds = stage.seconds * stage.steps
    last = f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
    return f"{stage.name}: {what} of {stage.evaluations:.3g} evaluations, about {last}"


def distill_precision(model: Model, runtime: str, batch_size: int) -> str:
    """`fp32` or `bf16`, as requested or as a timing of the network decides."""
    if runtime != "auto":
        precision, *rest = format_runtime(parse_runtime(runtime)).split("+")
        if rest:
            raise BadInput(f"distillation takes the runtimes fp32, bf16 and auto, and does not use +{'+'.join(rest)}")
        return precision
    return model.precision_for("auto", min(batch_size, 64)).split("+")[0]


def peak_bytes(device: torch.device) -> int:
    """Maximum bytes in use: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return process_peak()
