"""Model: a denoiser and what a user needs beside it; a folder of model.json and weights.safetensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import zoo
from .denoiser import Denoiser
from .errors import BadInput, nearest
from .guides.cfg import CFG
from .machine import choose, parse, spell
from .pick import pick
from .plan import Plan, plan
from .predictions import prediction_from
from .sampling import Noise, draw
from .schedules import schedule_from_dict
from .weights import build, fill, sha256, store

SCHEMA = 1
DESCRIPTION, WEIGHTS, PLAN = "model.json", "weights.safetensors", "plan.json"
Progress = Callable[[int, int], None]
Label = int | str | Sequence[int | str] | None


@dataclass
class Model:
    """A denoiser plus what a user needs: shape, classes, recommended sampling, card.

    denoiser: `forward(x_t (B, C, H, W), t, label=) -> x0 (B, C, H, W)`.
    shape: `(C, H, W)` of one sample. classes: class names in label order, or None for an unconditional model.
    codec: what a sample is; `image` is pixels in [-1, 1].
    sampler, times, steps, guidance_scale: what `sample` uses where it is not told, spelled as `pick` reads them.
    plan: the recommended sampler, times and steps compiled, if the model brings its own coefficients.
    card: anything JSON about training, data, figures and licence.
    sha256: of the weights file that the model was loaded from or saved to.
    """

    denoiser: Denoiser
    name: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...] | None = None
    codec: str = "image"
    sampler: str = "unipc"
    times: str = "angle"
    steps: int = 16
    guidance_scale: float = 1.0
    plan: Plan | None = None
    card: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.denoiser.parameters()).device

    def to(self, device: str | torch.device) -> Model:
        """The same model with its weights moved."""
        return replace(self, denoiser=self.denoiser.to(device))

    def labels(self, n: int, label: Label = None) -> Tensor | None:
        """Labels of `n` images, `(n,)` int64: None for an unconditional model.

        label: one class (its index or its name) for all images; a sequence, of which image k gets entry `k % len`;
            or None: image k gets class `k % C`.
        Raises BadInput for a label that the model does not have.
        """
        if self.classes is None:
            if label is not None:
                raise BadInput(f"{self.name} has no classes, so label={label!r} means nothing to it")
            return None
        if label is None:
            chosen: list[int] = list(range(len(self.classes)))
        elif isinstance(label, (int, str)) or not isinstance(label, Sequence):
            chosen = [self.class_index(label)]
        else:
            chosen = [self.class_index(entry) for entry in label]
        if not chosen:
            raise BadInput("label is an empty list: give one class or more")
        return torch.tensor([chosen[k % len(chosen)] for k in range(n)], dtype=torch.long)

    def class_index(self, label: int | str) -> int:
        """The index of a class given by index, by digits or by name (case does not matter)."""
        names = list(self.classes or ())
        lowered = [name.lower() for name in names]
        if isinstance(label, str) and label.strip().lower() in lowered:
            return lowered.index(label.strip().lower())
        if isinstance(label, str) and label.strip().lstrip("-").isdigit():
            label = int(label)
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
            return label
        listed = [f"{k} {name}" for k, name in enumerate(names)]
        hint = nearest(label, names) if isinstance(label, str) else f"choices: {', '.join(listed)}"
        raise BadInput(f"unknown label {label!r} for {self.name}: {hint}")

    @torch.no_grad()
    def sample(
        self,
        n: int = 1,
        label: Label = None,
        seed: int = 0,
        sampler: str | None = None,
        times: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 64,
        progress: Progress | None = None,
        runtime: str = "fp32",
    ) -> Tensor:
        """`n` images, `(n, C, H, W)` float32 in [-1, 1], on the CPU.

        Image k depends on `seed + k` and its label alone, not on `n` or `batch_size`.

        label: see `labels`. seed: of image 0; image k uses `seed + k`.
        sampler, times: as `pick` spells them, such as `"dpm:order=2"` and `"karras"`. steps: of the time grid.
        guidance_scale: 1 is the plain conditional model; more than 1 costs two network evaluations a step
            (Ho & Salimans 2022, 2207.12598).
        batch_size: images in the network at once. progress: called with (network calls done, of how many).
        runtime: `fp32`, `bf16` (autocast; faster from about 16 images on, 1 % off), `auto`, see `runtime_for`.
        Raises BadInput for a value that cannot be, with the nearest that can.
        """
        whole("n", n, 1)
        whole("batch_size", batch_size, 1)
        whole("seed", seed, 0)
        guided = self.guided(guidance_scale)
        plan, method, grid = self.method(sampler, times, steps)
        labels = self.labels(n, label)
        device = self.device
        images = []
        machine = parse(self.runtime_for(runtime, min(n, batch_size)), device.type)
        machine.prepare(self.denoiser)
        with machine.apply():
            for start in range(0, n, batch_size):
                count = min(batch_size, n - start)
                seeds = range(seed + start, seed + start + count)
                noise = Noise(seeds, self.shape, dtype=torch.float32, device=device)
                cond = {} if labels is None else {"label": labels[start : start + count].to(device)}
                x = draw(guided, method, grid, noise, plan=plan, progress=part(progress, start, n, batch_size), **cond)
                images.append(x.float().clamp(-1, 1).cpu())
        return torch.cat(images)

    def guided(self, guidance_scale: float | None = None) -> nn.Module:
        """The denoiser under classifier-free guidance (None: the recommended scale)."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if not (isinstance(scale, (int, float)) and abs(scale) < float("inf")):
            raise BadInput(f"guidance_scale must be a finite number, got {scale!r}")
        if scale != 1 and self.classes is None:
            raise BadInput(f"{self.name} has no classes to guide towards: guidance_scale must be 1, got {scale:g}")
        return CFG(scale=float(scale)).wrap(self.denoiser)

    def method(self, sampler: str | None, times: str | None, steps: int | None) -> tuple[Plan | None, Any, Tensor]:
        """What to run for these choices (None: the recommended one): plan or None, sampler, time grid."""
        if steps is not None:
            whole("steps", steps, 1)
        schedule = self.denoiser.schedule
        method = pick("samplers", sampler or self.sampler)
        if self.plan is not None and (sampler, times, steps) == (None, None, None):
            return self.plan, method, self.plan.times
        grid = pick("times", times or self.times)(schedule, steps or self.steps)
        return (plan(method, schedule, grid) if method.linear else None), method, grid

    def setting(
        self,
        sampler: str | None = None,
        times: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        runtime: str = "fp32",
        batch_size: int = 64,
    ) -> dict[str, Any]:
        """The arguments of `sample` that a record must name, with the recommended ones filled in, checked."""
        self.method(sampler, times, steps)
        self.guided(guidance_scale)
        return {
            "sampler": sampler or self.sampler,
            "times": times or self.times,
            "steps": steps or self.steps,
            "guidance_scale": float(self.guidance_scale if guidance_scale is None else guidance_scale),
            "runtime": self.runtime_for(runtime, batch_size),
        }

    def runtime_for(self, runtime: str = "auto", batch_size: int = 64) -> str:
        """`auto` as what a timing of this network on this machine found fastest; anything else as it is spelled.

        `fp32` or `bf16` (autocast), with `+medium` (matrix products) and `+channels_last` as wanted. The timing is
        done once for a network, machine and power of two that `batch_size` reaches, and remembered.
        """
        if runtime != "auto":
            return spell(parse(runtime))
        size = 2 ** (batch_size.bit_length() - 1)
        x = torch.randn((size, *self.shape), generator=torch.Generator().manual_seed(0)).to(self.device)
        labels = self.labels(size)
        cond = {} if labels is None else {"label": labels.to(self.device)}
        identity = self.sha256 or str(self.denoiser.net)
        return spell(choose(self.denoiser, x, identity, **cond))

    def save(self, folder: str | Path, half: bool = False) -> Path:
        """Write `model.json`, `weights.safetensors` and, with a plan, `plan.json`. half: weights as float16.

        A new folder appears whole or not at all. In a folder that is there (a training run's), the files take their
        names one by one, the description last, and nothing else in it is touched.
        """
        folder = Path(folder)
        part = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
        try:
            part.mkdir(parents=True)
            store(self.denoiser.net, part / WEIGHTS, half)
            self.sha256 = sha256(part / WEIGHTS)
            if self.plan is not None:
                (part / PLAN).write_text(self.plan.to_json())
            (part / DESCRIPTION).write_text(json.dumps(self.describe(), indent=2) + "\n")
            if folder.is_dir() and any(folder.iterdir()):
                for file in sorted(part.iterdir(), key=lambda file: file.name == DESCRIPTION):
                    os.replace(file, folder / file.name)
            else:
                os.replace(part, folder)
        except OSError as e:
            raise BadInput(f"cannot save the model in {folder}: {e.strerror or e}") from e
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return folder

    def describe(self) -> dict[str, Any]:
        """What `model.json` holds."""
        net, denoiser = self.denoiser.net, self.denoiser
        return {
            "schema": SCHEMA,
            "name": self.name,
            "net": {"class": type(net).__name__, "config": net.config},
            "schedule": denoiser.schedule.to_dict(),
            "prediction": denoiser.prediction.to_dict(),
            "clock": denoiser.clock,
            "shape": list(self.shape),
            "classes": None if self.classes is None else list(self.classes),
            "null_label": denoiser.null_label,
            "codec": self.codec,
            "sampler": self.sampler,
            "times": self.times,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "plan": None if self.plan is None else PLAN,
            "weights": {"file": WEIGHTS, "sha256": self.sha256},
            "card": self.card,
        }


def load(name: str | Path, device: str | torch.device = "cpu") -> Model:
    """A model by bundled name or by folder.

    Raises BadInput if there is no such model, and if a file in the folder is missing, damaged (the weights' sha256
    must be the one in model.json) or of another shape than the network.
    """
    return read(find(name)).to(device)


def find(name: str | Path) -> Path:
    """The folder of a model: a bundled name first, then a folder with a model.json."""
    cards = zoo.cards()
    if str(name) in cards:
        return cards[str(name)].folder
    folder = Path(name)
    if (folder / DESCRIPTION).is_file():
        return folder
    if (folder / "model_index.json").is_file():
        raise BadInput(f"{name} is a diffusers pipeline: diffusers models are not supported yet")
    if folder.is_dir():
        raise BadInput(f"no {DESCRIPTION} in {name}: not a model that hasten saved")
    if folder.exists():
        raise BadInput(f"{name} is a file: a model is a folder with a {DESCRIPTION}, or a bundled name")
    if "/" in str(name) or os.sep in str(name):
        raise BadInput(
            f"no folder {name}; if it is a hub id: diffusers models are not supported yet "
            f"(bundled models: {', '.join(cards) or 'none'})"
        )
    raise BadInput(f"unknown model {str(name)!r}: {nearest(str(name), cards)}, or a folder with a {DESCRIPTION}")


def read(folder: Path) -> Model:
    """The model in a folder, checked part by part."""
    try:
        told = json.loads((folder / DESCRIPTION).read_text())
    except (OSError, ValueError) as e:
        raise BadInput(f"cannot read {folder / DESCRIPTION}: {e}") from e
    if not isinstance(told, dict) or told.get("schema") != SCHEMA:
        found = told.get("schema") if isinstance(told, dict) else type(told).__name__
        raise BadInput(f"{folder / DESCRIPTION} has schema {found!r}, this version of hasten reads {SCHEMA}")
    try:
        net = build(told["net"]["class"], told["net"]["config"])
        denoiser = Denoiser(
            net,
            schedule_from_dict(told["schedule"]),
            prediction_from(told["prediction"]),
            clock=told["clock"],
            null_label=told["null_label"],
        )
        model = Model(
            denoiser=denoiser,
            name=told["name"],
            shape=tuple(told["shape"]),
            classes=None if told["classes"] is None else tuple(told["classes"]),
            plan=Plan.from_json((folder / told["plan"]).read_text()) if told.get("plan") else None,
            sha256=told["weights"]["sha256"],
            **{key: told[key] for key in ("codec", "sampler", "times", "steps", "guidance_scale", "card")},
        )
        weights = folder / told["weights"]["file"]
        fits(model)
    except KeyError as e:
        raise BadInput(f"{folder / DESCRIPTION} lacks {e}") from e
    except BadInput:
        raise
    except (TypeError, ValueError) as e:
        raise BadInput(f"{folder / DESCRIPTION} does not describe a model: {e}") from e
    fill(net, weights, str(model.sha256))
    denoiser.eval().requires_grad_(False)
    return model


def fits(model: Model) -> None:
    """Refuse a shape or classes that the network was not built for, where the network tells."""
    net = model.denoiser.net
    config, side = getattr(net, "config", {}), getattr(net, "multiple", 1)
    channels, height, width = model.shape
    if config.get("channels", channels) != channels or height % side or width % side:
        raise BadInput(
            f"{model.name}: images of shape {model.shape} do not fit its network, "
            f"which takes {config.get('channels', channels)} channels and sides that {side} divides"
        )
    if config.get("classes", len(model.classes or ())) != len(model.classes or ()):
        raise BadInput(f"{model.name} names {len(model.classes or ())} classes, its network has {config['classes']}")


def part(progress: Progress | None, start: int, n: int, batch_size: int) -> Progress | None:
    """`progress` of the batch that begins at image `start`, as a share of all `n` images."""
    if progress is None:
        return None
    before, batches = start // batch_size, -(-n // batch_size)
    return lambda done, total: progress(before * total + done, batches * total)


def whole(name: str, value: object, least: int) -> None:
    """Refuse an argument that is not a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BadInput(f"{name} must be a whole number of at least {least}, got {value!r}")
