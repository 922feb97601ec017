"""Methods by name: `pick("samplers", "heun:churn=0.1")` is `Heun(churn=0.1)`.

A folder of hasten is the list of its methods: the file `samplers/heun.py` holds the one public dataclass that is called
`heun`. Time grids all live in `times.py` and carry their names. Only the file that is asked for is imported.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import math
import pkgutil
import sys
import types
import typing
from typing import Any

from .errors import BadInput, HastenError, check_numbers, nearest
from .utils.aliases import alias_of, hint_for, own_name
from .utils.registry import is_own, path_of

__all__ = ["method_names", "pick", "format_spec"]

LARGEST = 1e15  # magnitude of a finite option
WORDS = {"true": True, "false": False, "none": None, "inf": math.inf, "nan": math.nan}


def pick(folder: str, text: str) -> Any:
    """The method that a text spells, `name` or `name:option=value,option=value`.

    Args:
        folder: `"samplers"`, `"times"`, `"guides"`, ...
        text: values are numbers, true, false, none, inf, words, or tuples of them in parentheses:
            `"cfg:scale=2,interval=(0.2,inf)"`. Names of diffusers and k-diffusion are understood, such as `"euler"`,
            `"dpmpp_2m_sde"`, `"pndm"` and `"exponential"` (`hasten.utils.aliases` lists them).

    Raises:
        HastenError: for an unknown name, option or value, naming the nearest valid choice.
    """
    name, colon, rest = text.strip().partition(":")
    name = name.strip()
    preset: dict[str, str] = {}
    known = method_names(folder)
    if name not in known and (same := own_name(name, known)):
        name = same
    elif name not in known and (meant := alias_of(folder, name)):
        name, _, said = meant.partition(":")
        preset = dict(part.split("=") for part in _split(said) if part)
    cls = _class(folder, name)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init and not field.metadata.get("bound")}
    options: dict[str, Any] = {}
    for part in _split(rest) if colon else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise BadInput(f"{name}: cannot read {part.strip()!r}; write option=value, separated by commas")
        if key not in fields:
            raise BadInput(f"{name} has no option {key!r}: {nearest(key, fields)}")
        if key in options:
            raise BadInput(f"{name}: {key} is given twice")
        options[key] = _typed(f"{name}: {key}", _parse(value), hints[key])
    for key, value in preset.items():
        options.setdefault(key, _typed(f"{name}: {key}", _parse(value), hints[key]))
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in options:
            raise BadInput(f"{name} needs {key}=..., {_said(hints[key])}")
    made = cls(**options)
    if dataclasses.is_dataclass(made):
        check_numbers(made)
    return made


def method_names(folder: str) -> list[str]:
    """The names that `pick` knows in a folder, sorted."""
    module = _folder(folder)
    if hasattr(module, "__path__"):
        return sorted(found.name for found in pkgutil.iter_modules(module.__path__) if not found.name.startswith("_"))
    return sorted(_named(module))


def _folder(folder: str) -> types.ModuleType:
    root = importlib.import_module(__package__)
    folders = sorted(found.name for found in pkgutil.iter_modules(root.__path__) if found.ispkg) + ["times"]
    if folder not in folders:
        raise BadInput(f"there are no methods called {folder!r}: {nearest(folder, folders)}")
    return importlib.import_module(f"{__package__}.{folder}")


def _class(folder: str, name: str) -> type:
    kind = {"times": "time grid", "tuning": "tuning method"}.get(folder, folder.removesuffix("s"))
    choices = method_names(folder)
    if name not in choices and (relative := hint_for(folder, name)):
        raise BadInput(f"unknown {kind} {name!r}: nearest is {relative} (choices: {', '.join(choices)})")
    if name not in choices:
        raise BadInput(f"unknown {kind} {name!r}: {nearest(name, choices)}")
    module = _folder(folder)
    if not hasattr(module, "__path__"):
        return _named(module)[name]
    module = importlib.import_module(f"{module.__name__}.{name}")
    found = _public(module)
    same = [cls for cls in found if cls.__name__.lower() == name.replace("_", "")]
    if len(same or found) != 1:
        raise HastenError(f"{folder}/{name}.py must hold one public dataclass, found {[c.__name__ for c in found]}")
    return (same or found)[0]


def _public(module: types.ModuleType) -> list[type]:
    return [
        value
        for key, value in vars(module).items()
        if not key.startswith("_") and isinstance(value, type) and dataclasses.is_dataclass(value)
        and value.__module__ == module.__name__
    ]  # fmt: skip


def _named(module: types.ModuleType) -> dict[str, type]:
    return {cls.name: cls for cls in _public(module) if getattr(cls, "name", "")}  # type: ignore[attr-defined]


def _split(text: str) -> list[str]:
    """Pieces between the commas that no bracket or quote holds."""
    pieces, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += (letter in "([{") - (letter in ")]}") if not quote else 0
        if letter == "," and depth == 0 and not quote:
            pieces.append("")
        else:
            pieces[-1] += letter
    return pieces


def _parse(text: str) -> Any:
    """A Python literal, one of the words above, a tuple of these, or the text itself."""
    if text.lower().lstrip("+-") in WORDS:
        value = WORDS[text.lower().lstrip("+-")]
        return -value if text.startswith("-") and isinstance(value, float) else value
    if text[0] + text[-1] in ("()", "[]"):
        return tuple(_parse(piece.strip()) for piece in _split(text[1:-1]) if piece.strip())
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return text if isinstance(value, float) and math.isinf(value) else value  # 1e999 is no number


def _typed(what: str, value: Any, hint: Any) -> Any:
    """The value as its field's type; whole numbers pass for floats and nothing else is converted."""
    fits, converted = _fit(value, hint)
    if not fits:
        hints = ""
        if typing.get_origin(hint) is typing.Literal and isinstance(value, str):
            hints = ": " + nearest(value, [str(choice) for choice in typing.get_args(hint)])
        if isinstance(value, (int, float)) and not isinstance(value, bool) and _fit(1, hint)[0] and value == value:
            hints = f", which is beyond {LARGEST:g}" if abs(value) > LARGEST else hints
        raise BadInput(f"{what} must be {_said(hint)}, found {value!r}{hints}")
    return converted


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True, value
    if origin in (typing.Union, types.UnionType):
        fitting = [converted for fits, converted in (_fit(value, argument) for argument in arguments) if fits]
        return bool(fitting), fitting[0] if fitting else None
    if origin is typing.Literal:
        return value in arguments, value
    if origin is tuple or hint is tuple:
        if not isinstance(value, tuple):
            return False, None
        if not arguments:
            return True, value
        each = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        pairs = [_fit(v, h) for v, h in zip(value, each)]
        return len(each) == len(value) and all(fits for fits, _ in pairs), tuple(v for _, v in pairs)
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and sensible(value)
        return number, float(value) if number else None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64, value
    if hint is type(None):
        return value is None, None
    return isinstance(value, origin or hint), value


def sensible(value: float) -> bool:
    """Whether a number can be an option: infinity can (no bound), NaN and what overflows when it is squared cannot."""
    return math.isinf(value) or abs(value) <= LARGEST


def _said(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_said(argument) for argument in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin is tuple and arguments:
        if arguments[-1] is Ellipsis:
            return f"a tuple ({_said(arguments[0]).removeprefix('a ')}, ...)"
        return "a tuple (" + ", ".join(_said(argument).removeprefix("a ") for argument in arguments) + ")"
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "a word", type(None): "none"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def format_spec(method: Any) -> str:
    """How a method is written on the command line: `"heun:churn=0.1"`, the fields that are not at their default.

    The name is the class attribute `name` where there is one, else the file that defines the class; of a class that
    hasten does not define, where it is defined, `"my_package.Mine"`.
    """
    name = getattr(type(method), "name", None) or type(method).__module__.rpartition(".")[2]
    if not is_own(type(method)):
        name = path_of(type(method))
    options = []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if not field.metadata.get("bound") and value != field.default:
            options.append(f"{field.name}={_format_value(value)}")
    return name + (":" + ",".join(options) if options else "")


def _format_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ",".join(_format_value(item) for item in value) + ")"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def resolve_sampler(sampler: Any) -> Any:
    """A sampler by name or as an object. Raises BadInput for what is neither."""
    if isinstance(sampler, str):
        return pick("samplers", sampler)
    if isinstance(sampler, type):
        raise BadInput(f"sampler must be an object, such as {sampler.__name__}(), found the class {sampler.__name__}")
    if not any(callable(getattr(sampler, name, None)) for name in ("steps", "solve")):
        raise BadInput(f"sampler must be a name or a sampler such as UniPC(), found {type(sampler).__name__}")
    return sampler


def resolve_grid(times: Any) -> Any:
    """A time grid by name or as an object; what is given time by time as it is. Raises BadInput for a class."""
    if isinstance(times, str):
        return pick("times", times)
    if isinstance(times, type):
        raise BadInput(f"times must be an object, such as {times.__name__}(), found the class {times.__name__}")
    return times


class _Callable(types.ModuleType):
    """`hasten.pick` is this module and, called, the function of that name in it."""

    __call__ = staticmethod(pick)
    __signature__ = inspect.signature(pick)

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Callable
