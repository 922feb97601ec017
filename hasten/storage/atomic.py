"""Atomic replacement of the files of a model folder: a kill at any point leaves the old model or the new one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..files import describe_contents, write_atomic
from .weights import sha256

DESCRIPTION = "model.json"
RENAMED = re.compile(r".+-[0-9a-f]{8}\.(safetensors|json)")
STEMS = ("weights-", "statistics-", "plan-")


def short_hash(*values: Any) -> str:
    """16 hexadecimal digits of the sha256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]


def refuse_other_model(folder: Path, model: Any, identity: str = "") -> None:
    """Refuse to overwrite a folder that holds anything but the given model or an earlier result of the same run.

    Args:
        folder: where a model derived from `model` will be saved.
        model: as it was loaded; its own folder is allowed.
        identity: of the run; what an earlier run of the same identity saved is allowed.

    Raises:
        BadInput: where the folder holds something else.
    """
    present = describe_contents(folder)
    if present is None:
        return
    if present == "a model":
        description: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        card, own = description.get("card") or {}, json.loads(json.dumps(model.card, default=str))
        if (description.get("weights") or {}).get("sha256") == model.sha256 and card == own:
            return
        if identity and (card.get("tuned") or [{}])[-1].get("identity") == identity:
            return
        present = f"the model {description.get('name')}"
    raise BadInput(
        f"{folder} holds {present} already, and not {model.name} as it was loaded: choose another folder, or remove it"
    )


def replace_files(source: Path, folder: Path, description: dict[str, Any]) -> None:
    """Move the files of a temporary folder into a model folder and write its model.json, last.

    Where `folder` holds a model already, files of the same name and other contents get a new name with a prefix of
    their hash, so that the old model stays complete until the new model.json replaces the old one. Only then the files
    that the old one named are removed. Files of the same contents stay.

    Args:
        source: the temporary folder.
        folder: the model folder.
        description: the contents of model.json; names in it are changed with those of the files.
    """
    old, new = named_files(folder), set()
    for file in sorted(file for file in source.rglob("*") if file.is_file()):
        new.add(move_file(description, file.relative_to(source).as_posix(), file, folder, old))
    write_atomic(folder / DESCRIPTION, json.dumps(description, indent=2) + "\n")
    remove_unnamed(folder, old, new)


def move_file(description: dict[str, Any], name: str, file: Path, folder: Path, old: set[str]) -> str:
    """Move a new file into the folder, under another name if the old model has one of this name and other contents.

    Args:
        description: the contents of the new model.json, which gets the other name.
        name: of the file, relative to the folder.
        file: its present path.
        folder: the model folder.
        old: names of the files of the old model.

    Returns:
        The name that the file has now.
    """
    target = folder / name
    with open(file, "rb+") as written:
        os.fsync(written.fileno())
    if name in old:
        network = description["net"].get("config", {}).get("files", ())
        own = sha256(file)
        if target.is_file() and sha256(target) == own:
            return name
        if name in network or "slot" in description["net"]:  # graphs and pipelines are opened by file name
            raise BadInput(f"{folder} holds another network of this kind: save the model in another folder")
        other = (file.parent / f"{file.stem}-{own[:8]}{file.suffix}").relative_to(file.parents[name.count("/")])
        for entry in (
            description["weights"],
            description.get("statistics", {}),
            *description.get("parts", {}).values(),
        ):
            if entry.get("file") == name:
                entry["file"] = other.as_posix()
        description["plan"] = other.as_posix() if description["plan"] == name else description["plan"]
        for key, value in description.get("plans", {}).items():
            description["plans"][key] = other.as_posix() if value == name else value
        name, target = other.as_posix(), folder / other
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(file, target)
    return name


def named_files(folder: Path) -> set[str]:
    """The files that the model.json of a folder names; the empty set where it cannot be read."""
    names: list[Any] = []
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        description = json.loads((folder / DESCRIPTION).read_text())
        names = [description.get("plan"), *(description.get("plans") or {}).values()]
        entries = (
            description.get("weights"),
            description.get("statistics"),
            *(description.get("parts") or {}).values(),
        )
        names += [entry["file"] for entry in entries if entry]
        names += ((description.get("net") or {}).get("config") or {}).get("files") or []
    return {
        name for name in names if isinstance(name, str) and (folder / name).is_file() and ".." not in Path(name).parts
    }


def remove_unnamed(folder: Path, old: set[str], new: set[str]) -> None:
    """Remove files of the old model that the new one lacks, and those that a killed process moved but never named."""
    for directory in (folder, folder / "plans", folder / "parts"):
        for file in directory.glob("*-????????.*"):
            if RENAMED.fullmatch(file.name) and (directory != folder or file.name.startswith(STEMS)):
                old = old | {file.relative_to(folder).as_posix()}
    for name in old - new:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    for directory in (folder / "plans", folder / "parts"):
        with contextlib.suppress(OSError):  # it is not empty
            directory.rmdir()
