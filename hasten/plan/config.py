"""`SamplingConfig`: everything that says how to sample, as one frozen object that can be written to a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import numpy as np
from torch import Tensor

from ..errors import BadInput, check_number
from ..pick import format_spec, pick
from ..times import as_times, check_steps
from ..utils.config import Config, read_table
from .table import Plan

__all__ = ["SamplingConfig", "SamplingOptions"]

FOLDERS = {
    "sampler": "samplers",
    "times": "times",
    "start": "starts",
    "guides": "guides",
    "accelerators": "accelerators",
}
# What an object of each folder must have to be one of its methods.
MEMBERS = {"samplers": ("steps", "solve"), "guides": ("wrap",), "starts": ("begin",), "accelerators": ("apply",)}


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingConfig` as keyword arguments."""

    sampler: Any
    times: Any
    steps: int | None
    guidance_scale: float | None
    guides: Any
    start: Any
    plan: Any
    accelerators: Any
    precision: str | None


@dataclass(frozen=True)
class SamplingConfig(Config):
    """How to sample. A field that is None is what the model recommends.

        config = SamplingConfig("unipc:order=3", times="karras", steps=8, guidance_scale=2)
        model.sample(16, config=config)
        config.save("best.toml")  # hasten sample MODEL --config best.toml

    Args:
        sampler: as `pick` spells it, such as `"dpm:order=2"`, or an object, such as `DPMSolver(order=2)`.
        times: a time grid, as `pick` spells it or as an object, or the times themselves, float64, decreasing to 0.
        steps: of the time grid, at least 1.
        guidance_scale: 1 is the plain conditional model; more costs two model evaluations a step
            (Ho & Salimans 2022, 2207.12598).
        guides: further guides, in the order in which they wrap the model.
        start: the initialisation, such as `"ccdf:time=0.3"`; `"noise"`: none, where the model recommends one.
        plan: a plan of the model by name, a plan's .json file, or a `Plan`, in place of sampler, times and steps.
        accelerators: what makes a model evaluation cheaper, such as `"encoder_propagation"`, in any order.
        precision: `"fp32"`, `"bf16"` (autocast), with `+medium`, `+high` or `+channels_last` as wanted, or `"auto"`,
            which times them once on this device. None: what the caller has as its default.

    Raises:
        BadInput: for a value that cannot be. Names of methods are looked up when the config is resolved.
    """

    sampler: Any = None
    times: Any = None
    steps: int | None = None
    guidance_scale: float | None = None
    guides: Any = ()
    start: Any = None
    plan: Any = None
    accelerators: Any = ()
    precision: str | None = None

    renamed: ClassVar[Mapping[str, str]] = {"runtime": "precision"}

    def __post_init__(self) -> None:
        for name in ("guides", "accelerators"):
            object.__setattr__(self, name, tuple(as_list(FOLDERS[name], getattr(self, name))))
        if isinstance(self.times, (Tensor, np.ndarray, list)):
            object.__setattr__(self, "times", tuple(as_times(self.times).tolist()))
        if self.steps is not None:
            object.__setattr__(self, "steps", check_steps(self.steps))
        if self.guidance_scale is not None:
            object.__setattr__(self, "guidance_scale", check_number("guidance_scale", self.guidance_scale))

    @classmethod
    def load(cls, path: str | Path, table: str | None = "sampling") -> SamplingConfig:
        """As `Config.load`, by default from the table [sampling] where the file has one."""
        return super().load(path, table)

    @classmethod
    def of(
        cls, config: SamplingConfig | Mapping[str, Any] | str | Path | None, options: Mapping[str, Any]
    ) -> SamplingConfig:
        """As `Config.of`; a text may also be what `str(config)` wrote."""
        if isinstance(config, str) and not config.endswith((".toml", ".json")):
            if "=" not in config.partition(";")[0].partition(":")[0]:
                raise BadInput(
                    f"config must be a SamplingConfig, found {config!r}: a sampler is given as sampler={config!r}"
                )
            config = cls.parse(config)
        elif isinstance(config, (str, Path)):
            refuse_files(config)
        return super().of(config, options)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not None or empty; methods as `pick` reads them, a `Plan` as its JSON."""
        values: dict[str, Any] = {}
        for name in self.names():
            value = getattr(self, name)
            if value is None or (name in ("guides", "accelerators") and not value):
                continue
            if name in ("guides", "accelerators"):
                values[name] = [spec(method) for method in value]
            elif name == "plan":
                values[name] = json.loads(value.to_json()) if isinstance(value, Plan) else str(value)
            else:
                values[name] = spec(value) if name in FOLDERS else value
        return values

    def digest(self) -> str:
        """16 hexadecimal digits: the same for the same methods, however they are spelled."""
        return Config.digest(self.replace(**self._canonical()))

    def to_toml(self) -> str:
        """The config as TOML. Raises BadInput for a `Plan` object: save that as a .json file and name it."""
        if isinstance(self.plan, Plan):
            raise BadInput(
                "a Plan cannot be written to a config file: write plan.to_json() to a .json file, and name it"
            )
        return super().to_toml()

    def __str__(self) -> str:
        """One line that `parse` reads: `sampler=unipc:order=3; times=karras; steps=8`."""
        values = self.to_dict()
        return "; ".join(
            f"{name}={' + '.join(value) if name in ('guides', 'accelerators') else _line(value)}"
            for name, value in values.items()
        )

    @classmethod
    def parse(cls, text: str) -> SamplingConfig:
        """The config that `str(config)` wrote.

        Raises:
            BadInput: for what cannot be read.
        """
        values: dict[str, Any] = {}
        for part in filter(None, (piece.strip() for piece in text.split(";"))):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not value:
                raise BadInput(f"cannot read {part!r}: write field=value, separated by semicolons")
            name = cls.renamed.get(name, name)
            if name in ("guides", "accelerators"):
                values[name] = [one.strip() for one in value.split(" + ")]
            elif name in ("steps", "guidance_scale") or value.startswith("["):
                try:
                    values[name] = json.loads(value)
                except ValueError as error:
                    raise BadInput(f"{name} must be a number, found {value!r}") from error
            else:
                values[name] = value
        return cls.from_dict(values)

    def _canonical(self) -> dict[str, Any]:
        """Methods that are given as texts, as `format_spec` writes them."""
        changed: dict[str, Any] = {}
        for name, folder in FOLDERS.items():
            value = getattr(self, name)
            if isinstance(value, str):
                changed[name] = format_spec(pick(folder, value))
            elif name in ("guides", "accelerators"):
                changed[name] = [format_spec(pick(folder, one)) if isinstance(one, str) else one for one in value]
        return changed


def refuse_files(path: str | Path) -> None:
    """Raise BadInput for the choice of another model, a LoRA or a decoder, which a sampling alone cannot follow."""
    if files := read_table(path).get("model"):
        (key, value), *_ = files.items() if isinstance(files, Mapping) else (("model", files),)
        raise BadInput(
            f"{path} needs more than a way to sample, its [model] has {key} = {value!r}: use hasten sample --config, "
            "hasten.apply on a pipeline, or load that yourself and pass SamplingConfig.load(file)"
        )


def as_list(folder: str, methods: Any) -> list[Any]:
    """Guides or accelerators as a list: none, one, or several, by name or as objects. Raises BadInput for others."""
    if methods is None:
        return []
    one = isinstance(methods, (str, type)) or not isinstance(methods, Iterable)
    return [each if isinstance(each, str) else check_method(folder, each) for each in ([methods] if one else methods)]


def check_method(folder: str, method: Any) -> Any:
    """The method itself. Raises BadInput for a class in place of an object, and for what is no method of the folder."""
    kind = folder.removesuffix("s")
    if isinstance(method, type):
        raise BadInput(f"{kind} must be an object, such as {method.__name__}(), found the class {method.__name__}")
    if folder in MEMBERS and not any(callable(getattr(method, name, None)) for name in MEMBERS[folder]):
        raise BadInput(
            f"{kind} must be a name or a method of hasten.{folder}, found {type(method).__name__} {method!r}"
        )
    return method


def spec(method: Any) -> Any:
    """A method as text; times that are given one by one as a list."""
    if isinstance(method, (Tensor, np.ndarray, list, tuple)):
        return as_times(method).tolist()
    return method if isinstance(method, (str, Path)) else format_spec(method)


def _line(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
