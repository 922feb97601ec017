"""Options as frozen dataclasses that can be written to a file and read back: `Config`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..errors import BadInput, nearest

__all__ = ["Config", "read_table", "to_toml"]

# One file may hold the options of several commands, and what `hasten choose` says of its choice.
TABLES = ("sampling", "train", "distill", "autoencoder", "decoder", "vocoder", "model", "certificate")
Self = TypeVar("Self", bound="Config")


class Config:
    """Base of frozen dataclasses of options, all of whose fields have defaults.

    `renamed` maps old names of fields to new ones: they are still read, with a DeprecationWarning.
    """

    renamed: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def of(cls: type[Self], config: Self | Mapping[str, Any] | str | Path | None, options: Mapping[str, Any]) -> Self:
        """The config that a function was called with.

        Args:
            config: a config, a mapping of its fields, the path of a file, or None for the defaults.
            options: fields that the caller gave as keywords; they take the place of those of `config`.

        Raises:
            BadInput: for a field that there is not, naming the nearest one.
        """
        if config is None:
            config = cls()
        elif isinstance(config, (str, Path)):
            config = cls.load(config)
        elif isinstance(config, Mapping):
            config = cls.from_dict(config)
        if not isinstance(config, cls):
            raise BadInput(f"config must be a {cls.__name__}, a mapping or a file, found {type(config).__name__}")
        return config.replace(**options) if options else config

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the fields."""
        return tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    @classmethod
    def checked(cls, options: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """Options under the present names of the fields.

        Raises:
            BadInput: for an unknown name, or one that is given under an old and a new name.
        """
        result: dict[str, Any] = {}
        for name, value in options.items():
            new = cls.renamed.get(name, name)
            if new not in cls.names():
                prefix = f"{where}: " if where else ""
                raise BadInput(f"{prefix}{cls.__name__} has no option {name!r}: {nearest(name, cls.names())}")
            if new in result:
                raise BadInput(f"{where or cls.__name__}: {name!r} is the old name of {new!r}: give one of them")
            if new != name:
                warnings.warn(f"the option {name!r} is now called {new!r}", DeprecationWarning, stacklevel=4)
            result[new] = value
        return result

    def replace(self: Self, **options: Any) -> Self:
        """A copy with other values of some fields."""
        return dataclasses.replace(self, **self.checked(options))  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON and TOML can hold them."""
        return {
            field.name: to_plain(getattr(self, field.name))
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != field.default
        }

    @classmethod
    def from_dict(cls: type[Self], values: Mapping[str, Any], where: str = "") -> Self:
        """The inverse of `to_dict`. Raises BadInput for unknown fields, prefixed with `where`."""
        options = cls.checked(values, where)
        hints = typing.get_type_hints(cls)
        try:
            for name, value in options.items():
                if not has_type(value, hints[name]):
                    raise BadInput(f"{name} cannot be {value!r}")
            return cls(**options)
        except (BadInput, TypeError) as error:
            raise BadInput(f"{where or cls.__name__}: {error}") from error

    def digest(self) -> str:
        """16 hexadecimal digits of all fields: equal configs have equal ones."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_toml(self) -> str:
        """The fields that differ from their defaults as TOML."""
        return to_toml(self.to_dict())

    def save(self, path: str | Path) -> Path:
        """Write the config as TOML, for `load` and for `--config`."""
        path, text = Path(path), self.to_toml()
        part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            raise BadInput(f"cannot write {path}: {error.strerror or error}") from error
        return path

    @classmethod
    def load(cls: type[Self], path: str | Path, table: str | None = None) -> Self:
        """A config from a TOML or JSON file.

        Args:
            table: of the file, where it holds more than this config; the top level if there is no such table.

        Raises:
            BadInput: for a file that cannot be read, and for an option beside the table, which nothing would read.
        """
        values = read_table(path)
        inner = values.get(table) if table is not None else None
        if not isinstance(inner, dict):
            return cls.from_dict(values, str(path))
        if stray := [name for name, value in values.items() if name not in TABLES or not isinstance(value, dict)]:
            raise BadInput(f"{path}: {stray[0]!r} stands beside [{table}]: move it into the table, or remove it")
        return cls.from_dict(inner, str(path))


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value of a file can be an option of this type; types that a file cannot hold are not checked."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(has_type(value, one) for one in typing.get_args(hint))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, (list, tuple))
    checks: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), str: (str,), Path: (str, Path)}
    if hint in checks:
        return isinstance(value, checks[hint]) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, type(None)) else True


def to_plain(value: Any) -> Any:
    """A value as JSON holds it: tuples as lists, paths as texts."""
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def read_table(path: str | Path) -> dict[str, Any]:
    """The top level of a TOML file, or of a JSON file that ends in .json. Raises BadInput with the path."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the config {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise BadInput(f"{path} is not valid {kind}: {error}") from error
    if not isinstance(values, dict):
        raise BadInput(f"{path} must hold a table of options, found {type(values).__name__}")
    return values


def to_toml(values: Mapping[str, Any]) -> str:
    """A mapping of texts, numbers, truth values, lists of these and tables of these as TOML."""
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if not isinstance(value, Mapping)]
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{key}]", to_toml(value).rstrip()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, str)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    raise BadInput(f"a {type(value).__name__} cannot be written to a config file")
