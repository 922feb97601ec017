"""Methods by name: `pick("samplers", "heun:churn=0.1")` is `Heun(churn=0.1)`.

A folder of hasten is the list of its methods: the file `samplers/heun.py` defines the one public dataclass called
`heun`. Time grids are all in `times.py`, each with its `name`. Only the file of the requested method is imported.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import math
import pkgutil
import types
import typing
from typing import Any

from .errors import BadInput, HastenError, check_choice, check_numbers, nearest
from .utils.aliases import alias_of, hint_for, own_name
from .utils.callable_module import make_callable
from .utils.deprecation import forward
from .utils.registry import is_own, path_of

__all__ = ["format_spec", "method_names", "pick"]

LARGEST = 1e15  # magnitude of a finite option
WORDS = {"true": True, "false": False, "none": None, "inf": math.inf, "nan": math.nan}


def pick(folder: str, text: str) -> Any:
    """The method that a text specifies, `name` or `name:option=value,option=value`.

    Args:
        folder: `"samplers"`, `"times"`, `"guides"`, ...
        text: values are numbers, true, false, none, inf, words, or tuples of them in parentheses:
            `"cfg:scale=2,interval=(0.2,inf)"`. Names of diffusers and k-diffusion are aliases, such as `"euler"`,
            `"dpmpp_2m_sde"`, `"pndm"` and `"exponential"` (`hasten.utils.aliases` lists them).

    Returns:
        an instance of the method's dataclass.

    Raises:
        HastenError: for an unknown name, option or value, naming the nearest valid choice.
    """
    name, colon, rest = text.strip().partition(":")
    name = name.strip()
    preset: dict[str, str] = {}
    known = method_names(folder)
    if name not in known and (own := own_name(name, known)):
        name = own
    elif name not in known and (alias := alias_of(folder, name)):
        name, _, alias_options = alias.partition(":")
        preset = dict(part.split("=") for part in _split(alias_options) if part)
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
            raise BadInput(f"{name} needs {key}=..., {_describe_type(hints[key])}")
    method = cls(**options)
    if dataclasses.is_dataclass(method):
        check_numbers(method)
    return method


def method_names(folder: str) -> list[str]:
    """The names that `pick` knows in a folder, sorted.

    Args:
        folder: as for `pick`.

    Raises:
        BadInput: for an unknown folder.
    """
    module = _folder(folder)
    if hasattr(module, "__path__"):
        return sorted(entry.name for entry in pkgutil.iter_modules(module.__path__) if not entry.name.startswith("_"))
    return sorted(_classes_by_name(module))


def _folder(folder: str) -> types.ModuleType:
    """The package, or for time grids the module, whose methods `pick` looks up."""
    root = importlib.import_module(__package__)
    folders = sorted(entry.name for entry in pkgutil.iter_modules(root.__path__) if entry.ispkg) + ["times"]
    if folder not in folders:
        raise BadInput(f"there are no methods called {folder!r}: {nearest(folder, folders)}")
    return importlib.import_module(f"{__package__}.{folder}")


def _class(folder: str, name: str) -> type[Any]:
    """The dataclass of this name. Raises BadInput for an unknown name."""
    kind = {"times": "time grid", "tuning": "tuning method", "train_processes": "process"}.get(
        folder, folder.removesuffix("s")
    )
    choices = method_names(folder)
    if name not in choices and (relative := hint_for(folder, name)):
        raise BadInput(f"unknown {kind} {name!r}: nearest is {relative} (choices: {', '.join(choices)})")
    check_choice(kind, name, choices)
    module = _folder(folder)
    if not hasattr(module, "__path__"):
        return _classes_by_name(module)[name]
    module = importlib.import_module(f"{module.__name__}.{name}")
    classes = _public_dataclasses(module)
    matching = [cls for cls in classes if cls.__name__.lower() == name.replace("_", "")] or classes
    if len(matching) != 1:
        raise HastenError(
            f"{folder}/{name}.py must define one public dataclass, found {[cls.__name__ for cls in classes]}"
        )
    return matching[0]


def _public_dataclasses(module: types.ModuleType) -> list[type[Any]]:
    """The dataclasses that a module itself defines under names without an underscore."""
    own = (
        value
        for key, value in vars(module).items()
        if not key.startswith("_") and isinstance(value, type) and value.__module__ == module.__name__
    )
    return [cls for cls in own if dataclasses.is_dataclass(cls)]


def _classes_by_name(module: types.ModuleType) -> dict[str, type[Any]]:
    """The dataclasses of a module that have a class attribute `name`, by that name."""
    return {name: cls for cls in _public_dataclasses(module) if (name := str(getattr(cls, "name", "")))}


def _split(text: str) -> list[str]:
    """The pieces between commas that are not inside brackets or quotes."""
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
    """The value as its field's type; integers are converted to floats and nothing else is converted."""
    fits, converted = _fit(value, hint)
    if not fits:
        hints = ""
        if typing.get_origin(hint) is typing.Literal and isinstance(value, str):
            hints = ": " + nearest(value, [str(choice) for choice in typing.get_args(hint)])
        if isinstance(value, (int, float)) and not isinstance(value, bool) and _fit(1, hint)[0] and value == value:
            hints = f", which is beyond {LARGEST:g}" if abs(value) > LARGEST else hints
        raise BadInput(f"{what} must be {_describe_type(hint)}, found {value!r}{hints}")
    return converted


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether a value is of a type, and the value converted to it."""
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
        if isinstance(value, (int, float)) and not isinstance(value, bool) and is_valid_number(value):
            return True, float(value)
        return False, None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64, value
    if hint is type(None):
        return value is None, None
    return isinstance(value, origin or hint), value


def is_valid_number(value: float) -> bool:
    """Whether a number can be an option: infinity can (no bound), NaN and what overflows when squared cannot."""
    return math.isinf(value) or abs(value) <= LARGEST


def _describe_type(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe_type(argument) for argument in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin is tuple and arguments:
        if arguments[-1] is Ellipsis:
            return f"a tuple ({_describe_type(arguments[0]).removeprefix('a ')}, ...)"
        return "a tuple (" + ", ".join(_describe_type(each).removeprefix("a ") for each in arguments) + ")"
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "a word", type(None): "none"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def format_spec(method: Any) -> str:
    """The text that `pick` reads as this method: `"heun:churn=0.1"`, with the fields that are not at their default.

    The name is the class attribute `name` where there is one, else that of the file that defines the class; for a class
    that hasten does not define it is the path, `"my_package.Mine"`.

    Args:
        method: an instance of a method's dataclass.
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
    """A field's value as `pick` reads it."""
    if isinstance(value, tuple):
        return "(" + ",".join(_format_value(item) for item in value) + ")"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if hasattr(value, "named_modules"):  # a network: only a name can be read back
        return type(value).__name__
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def resolve_sampler(sampler: Any) -> Any:
    """The sampler of this name, or the object itself.

    Args:
        sampler: a text as for `pick`, or an object with `steps` or `solve`.

    Raises:
        BadInput: for a class and for other objects.
    """
    if isinstance(sampler, str):
        return pick("samplers", sampler)
    if isinstance(sampler, type):
        raise BadInput(f"sampler must be an object, such as {sampler.__name__}(), found the class {sampler.__name__}")
    if not any(callable(getattr(sampler, name, None)) for name in ("steps", "solve")):
        raise BadInput(f"sampler must be a name or a sampler such as UniPC(), found {type(sampler).__name__}")
    return sampler


def resolve_grid(times: Any) -> Any:
    """The time grid of this name, or the object itself.

    Args:
        times: a text as for `pick`, a grid, or the times one by one, which are returned as they are.

    Raises:
        BadInput: for a class.
    """
    if isinstance(times, str):
        return pick("times", times)
    if isinstance(times, type):
        raise BadInput(f"times must be an object, such as {times.__name__}(), found the class {times.__name__}")
    return times


__getattr__ = forward(__name__, {"spell": f"{__name__}:format_spec", "names": f"{__name__}:method_names"})

make_callable(__name__, pick)
