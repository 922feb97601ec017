"""The files of a model's folder, replaced at once: a kill at any point leaves the old model or the new one."""

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


def digest(*values: Any) -> str:
    """Values as 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]


def refuse_other_model(folder: Path, model: Any, identity: str = "") -> None:
    """BadInput where a folder holds something that saving what was made of `model` would write over.

    Allowed are the model itself, as it was loaded, and what an earlier run of the same `identity` made of it.
    """
    found = describe_contents(folder)
    if found is None:
        return
    if found == "a model":
        told: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            told = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        card, own = told.get("card") or {}, json.loads(json.dumps(model.card, default=str))
        if (told.get("weights") or {}).get("sha256") == model.sha256 and card == own:
            return
        if identity and (card.get("tuned") or [{}])[-1].get("identity") == identity:
            return
        found = f"the model {told.get('name')}"
    raise BadInput(
        f"{folder} holds {found} already, and not {model.name} as it was loaded: choose another folder, or remove it"
    )


def replace_files(part: Path, folder: Path, told: dict[str, Any]) -> None:
    """Move the files of the temporary folder `part` into `folder`, and write its model.json from `told`, last.

    Where a model lies in `folder` already, files of the same name and other contents get a name of their own, with a
    part of their hash, so that the old model stays whole until the new model.json takes the place of the old one. Only
    then the files that it named are removed. Files of the same contents stay.
    """
    old, new = named_files(folder), set()
    for file in sorted(file for file in part.rglob("*") if file.is_file()):
        new.add(place(told, file.relative_to(part).as_posix(), file, folder, old))
    write_atomic(folder / DESCRIPTION, json.dumps(told, indent=2) + "\n")
    remove_unnamed(folder, old, new)


def place(told: dict[str, Any], name: str, file: Path, folder: Path, old: set[str]) -> str:
    """Move a new file into the folder, under another name if the old model has one of this name and other contents.

    told: what model.json is going to hold; it gets the other name. Returns the name.
    """
    target = folder / name
    with open(file, "rb+") as written:
        os.fsync(written.fileno())
    if name in old:
        network = told["net"].get("config", {}).get("files", ())
        own = sha256(file)
        if target.is_file() and sha256(target) == own:
            return name
        if name in network or "slot" in told["net"]:  # files of a graph or of a pipeline are looked for by name
            raise BadInput(f"{folder} holds another network of this kind: save the model in another folder")
        other = (file.parent / f"{file.stem}-{own[:8]}{file.suffix}").relative_to(file.parents[name.count("/")])
        for entry in (told["weights"], told.get("statistics", {}), *told.get("parts", {}).values()):
            if entry.get("file") == name:
                entry["file"] = other.as_posix()
        told["plan"] = other.as_posix() if told["plan"] == name else told["plan"]
        for key, value in told.get("plans", {}).items():
            told["plans"][key] = other.as_posix() if value == name else value
        name, target = other.as_posix(), folder / other
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(file, target)
    return name


def named_files(folder: Path) -> set[str]:
    """The files that the model.json of a folder names; none where there is none that can be read."""
    found: list[Any] = []
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        told = json.loads((folder / DESCRIPTION).read_text())
        found = [told.get("plan"), *(told.get("plans") or {}).values()]
        entries = (told.get("weights"), told.get("statistics"), *(told.get("parts") or {}).values())
        found += [entry["file"] for entry in entries if entry]
        found += ((told.get("net") or {}).get("config") or {}).get("files") or []
    return {
        name for name in found if isinstance(name, str) and (folder / name).is_file() and ".." not in Path(name).parts
    }


def remove_unnamed(folder: Path, old: set[str], new: set[str]) -> None:
    """Remove what the old model had and the new one has not, and what a killed process placed and never named."""
    for place in (folder, folder / "plans", folder / "parts"):
        for file in place.glob("*-????????.*"):
            if RENAMED.fullmatch(file.name) and (place != folder or file.name.startswith(STEMS)):
                old = old | {file.relative_to(folder).as_posix()}
    for name in old - new:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    for place in (folder / "plans", folder / "parts"):
        with contextlib.suppress(OSError):  # which says that something lies in it
            place.rmdir()
