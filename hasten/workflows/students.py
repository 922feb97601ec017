"""Finished students of a distillation: saved with their plan, card and a preview."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..distillers import Student
from ..distillers._memory import checkpoint_gradients
from ..errors import HastenError
from ..files import check_writable, write_file
from ..images import encode_png, make_image_grid
from ..model.lora import lora_file
from ..model.model import Model
from ..nets.lora import fold_lora, lora_factors
from ..pick import pick
from ..plan.table import plan as compile_plan
from ..storage.lora_files import FILE as LORA_FILE
from ..storage.lora_files import write_lora
from ..storage.provenance import utc_now
from ..train.sources import Data
from ..utils.resizing import enlarge
from .source_data import sources_of

PREVIEW_IMAGES = 64  # images in the preview of a stage

PREVIEW_PROMPTS = 8  # of a model of prompts, two images each

PREVIEW_BATCH = 16  # of them per evaluation of the network

PREVIEW_SOURCES = 16  # of a model that reads a source image, each beside its sample

# entries that students keep
CARD = ("data", "licence", "reference", "process", "degrade", "source", "crop", "flip", "speech")


class Saver:
    """Saves students, and previews of their samples, where they do not exist already."""

    def __init__(
        self,
        teacher: Model,
        out: Path,
        result: dict[str, Any],
        scale: float,
        command: str,
        say: Callable[[str], None],
        captions: Sequence[str] | None = None,
        base: Model | None = None,
    ) -> None:
        self.base = teacher if base is None else base  # which a LoRA changes
        self.teacher, self.out, self.result, self.scale = teacher, out, result, scale
        self.command, self.say = command, say
        self.sources: torch.Tensor | None = None
        self.pairs: dict[str, Any] = {}
        self.prompts = preview_prompts(captions) if teacher.conditioning is not None else None

    def show_sources(self, data: Data, pairs: dict[str, Any]) -> None:
        """Show some of the data's sources and what is made of them.

        Args:
            data: with the condition `source`.
            pairs: what made them, for the models' cards.
        """
        self.sources, self.pairs = sources_of(data, PREVIEW_SOURCES), pairs

    def __call__(self, name: str | None, student: Student) -> None:
        """Save the student of the stage `name`; None: the last one, into the run's own folder."""
        folder = self.out if name is None else self.out / name
        model = self.model(name, student)
        self.result["students"][name or "."] = str(folder)
        if not (folder / "model.json").is_file():
            model.save(folder)
            if name is not None:
                self.say(f"{name}: {folder} is saved")
        if not (folder / LORA_FILE).is_file() and (factors := lora_factors(student.denoiser.net)):
            write_lora(lora_file(self.base, factors, model), folder / LORA_FILE)
        picture = self.out / f"{name}.png"
        if name is None or picture.is_file() or student.figures.get("direction") == "encode" or not drawable(model):
            return
        try:
            images, columns = (
                source_grid(model, self.sources) if self.sources is not None else sample_grid(model, self.prompts)
            )
            write_file(check_writable(picture), encode_png(make_image_grid(images, columns)))
        except (HastenError, RuntimeError) as e:  # the student is saved, and worth more than its picture
            first = (str(e).splitlines() or [type(e).__name__])[0]
            print(f"hasten: no preview {picture}: {first}; {folder} is saved", file=sys.stderr)

    def model(self, name: str | None, student: Student) -> Model:
        """The student as a model, with its plan and its origin on its card."""
        takes = student.denoiser.net_takes_guidance
        span = student.guidance or (student.denoiser.guidance_range if takes else None) or (self.scale, self.scale)
        denoiser = copy.deepcopy(student.denoiser).eval().requires_grad_(False)  # the next stage uses the original
        factors = fold_lora(denoiser.net)
        if getattr(getattr(denoiser.net, "net", None), "is_gradient_checkpointing", False):
            checkpoint_gradients(denoiser.net, False)
        if not takes or span[0] == span[1]:
            denoiser = denoiser.replace(guidance_range=span)
        sampler = pick("samplers", student.sampler)
        times = pick("times", student.times)(denoiser.schedule, student.steps)
        plan = compile_plan(sampler, denoiser.schedule, times) if sampler.linear else None
        card: dict[str, Any] = {
            **{key: self.teacher.card[key] for key in CARD if key in self.teacher.card},
            **self.pairs,
            "summary": f"student of {self.teacher.name} for {student.steps} evaluations",
            "distilled": {
                "teacher": self.teacher.name,
                "teacher_sha256": self.teacher.sha256,
                "stage": name,
                **{key: self.result[key] for key in ("method", "stages", "evaluations", "precision")},
                "steps": student.steps,
                "guidance_scale": list(span),
                "figures": student.figures,
                "date": utc_now(),
                "command": self.command,
                **({"any_time": True} if student.any_time else {}),
                **({"lora": {"rank": next(iter(factors.values())).rank, "layers": len(factors)}} if factors else {}),
            },
        }
        return Model(
            denoiser,
            self.out.resolve().name + ("" if name is None else f"-{name}"),
            self.teacher.shape,
            self.teacher.classes,
            self.teacher.codec,
            student.sampler,
            student.times,
            student.steps,
            min(max(self.scale, span[0]), span[1]),
            plan=plan,
            parts={**kept_parts(self.teacher), **student.parts},
            card=card,
            conditioning=self.teacher.conditioning,
            decoder=self.teacher.decoder,
            pipeline=self.teacher.pipeline,
            residual_std=self.teacher.residual_std,
            # students map the same noise to the same samples; other starts are for the teacher's own first time
            start=self.teacher.start if (self.teacher.start or "").startswith("temperature") else None,
        )


def kept_parts(teacher: Model) -> dict[str, torch.nn.Module]:
    """The parts of a teacher that its students need: of a model that speaks, the encoder and the aligner."""
    return dict(teacher.parts) if "speech" in teacher.card else {}


def drawable(model: Model) -> bool:
    """Whether the model generates images."""
    return model.decoder is not None or (model.codec in ("image", "residual") and model.shape[0] in (1, 3, 4))


def source_grid(model: Model, sources: torch.Tensor) -> tuple[torch.Tensor, int | None]:
    """Source images, enlarged, each beside the model's sample."""
    samples = model.sample(len(sources), images=sources, batch_size=PREVIEW_BATCH)
    pairs = torch.stack([enlarge(sources.float().cpu(), model.source_factor).clamp(-1, 1), samples], 1)
    return pairs.flatten(0, 1), 2 * max(1, round(len(sources) ** 0.5))


def preview_prompts(captions: Sequence[str] | None) -> list[str]:
    """A few captions, equally spaced among all; the empty prompt without any."""
    distinct = list(dict.fromkeys(captions or ("",)))
    count = min(PREVIEW_PROMPTS, len(distinct))
    return [distinct[k * len(distinct) // count] for k in range(count)]


def sample_grid(model: Model, prompts: Sequence[str] | None = None) -> tuple[torch.Tensor, int | None]:
    """At most 64 images of a model, and the columns of their grid: one a class or prompt, or None."""
    if prompts is not None:
        return model.sample(2 * len(prompts), label=list(prompts), batch_size=PREVIEW_BATCH), len(prompts)
    if model.classes is None:
        return model.sample(PREVIEW_IMAGES, batch_size=PREVIEW_BATCH), None
    columns = len(model.classes)
    if columns <= PREVIEW_IMAGES:
        n = columns * (PREVIEW_IMAGES // columns)
        return model.sample(n, batch_size=PREVIEW_BATCH), columns
    return model.sample(PREVIEW_IMAGES, label=list(range(PREVIEW_IMAGES)), batch_size=PREVIEW_BATCH), None
