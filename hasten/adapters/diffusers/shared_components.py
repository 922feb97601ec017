"""Pipeline folders without the components that the folder of another pipeline, their base, holds already.

A student, or a pipeline with another network, has the text encoders and the autoencoder of the pipeline that it was
made of, which are often the larger part. Its model.json names the base and the files that are taken from it:

    "components_from": {"model": "../sdxl", "files": {"vae": {"config.json": SHA256, ...}, ...}}

A base is a bundled name or a folder; the path of a folder is relative to the one that names it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ... import zoo
from ...errors import BadInput
from ...files import sha256
from .library import diffusers, without_expected_messages, without_loading_bars

INDEX, DESCRIPTION, ENTRY = "model_index.json", "model.json", "components_from"
# Entries of the configs that say how and by which version a component was loaded and saved, and how a tokenizer was
# called last.
OF_THE_RUN = set(
    """
    _name_or_path _diffusers_version transformers_version dtype torch_dtype is_local local_files_only
    truncation padding max_length pad_to_multiple_of pad_token_type_id stride truncation_strategy
    """.split()  # noqa: SIM905
)
DEFAULTS = {"padding_side": "right", "truncation_side": "right"}  # which a tokenizer writes once it was called


def find_base(name: str, folder: Path | None = None) -> Path:
    """The folder of a base.

    Args:
        name: a bundled name, or a path.
        folder: what a path is relative to. Default: the working directory.

    Raises:
        BadInput: where there is no pipeline.
    """
    cards = zoo.cards()
    path = cards[name].folder if name in cards else (folder or Path()) / name
    if (path / INDEX).is_file():
        return path
    asked = f"{folder} takes components from {name}" if folder is not None else f"components_from={name}"
    raise BadInput(f"{asked}, but there is no folder of a pipeline: found no {path / INDEX}, nor a bundled model")


def check_base(base: str | Path) -> Path:
    """The folder of a base that holds its own components.

    Raises:
        BadInput: where there is no pipeline, or it takes components from a further one itself.
    """
    folder = find_base(str(base))
    if entry := read_entry(folder):
        raise BadInput(f"{base} takes components from {entry['model']} itself: give components_from={entry['model']}")
    return folder


def drop_shared(folder: Path, base: str | Path, keep: tuple[str, ...], final: Path) -> dict[str, Any]:
    """Remove the components from a pipeline's folder that its base has too, with equal files.

    Args:
        folder: what `save_pretrained` wrote.
        base: a bundled name, or the folder of a pipeline.
        keep: components that stay: the network, the scheduler.
        final: where the folder will be.

    Returns:
        The entry of model.json.

    Raises:
        BadInput: where the base has none of the components.
    """
    source, files = check_base(base), {}
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in keep):
        ours, theirs = contents(path), contents(source / path.name)
        if ours and ours == theirs:
            files[path.name] = digests(source / path.name)
            shutil.rmtree(path)
    if not files:
        names = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name not in keep))
        raise BadInput(f"components_from={base}: no component of the pipeline ({names}) has the same files there")
    named = str(base) if str(base) in zoo.cards() else os.path.relpath(source.resolve(), final.resolve())
    return {"model": named, "files": files}


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of the files of a component."""
    return {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def contents(folder: Path) -> dict[str, Any]:
    """What two folders of a component are compared by: as `digests`, but the entries of its configs."""
    found: dict[str, Any] = digests(folder)
    for name in found:
        if name.endswith("config.json") or name == "tokenizer.json":
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            found[name] = {
                key: value
                for key, value in config.items()
                if key not in OF_THE_RUN and (key not in DEFAULTS or value != DEFAULTS[key])
            }
    return found


def read_entry(folder: Path) -> dict[str, Any] | None:
    """What the model.json of a folder says of components from elsewhere; None where nothing."""
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    entry = description.get(ENTRY) if isinstance(description, dict) else None
    if entry is None:
        return None
    if not isinstance(entry, dict) or not entry.keys() >= {"model", "files"}:
        raise BadInput(f"{folder / DESCRIPTION}: {ENTRY} must name a model and files, found {entry!r}")
    return entry


def open_components(folder: Path) -> dict[str, Any]:
    """The components that the pipeline in a folder takes from its base, for `from_pretrained(folder, **components)`.

    Raises:
        BadInput: where the base is missing, or a file of it has changed.
    """
    if (entry := read_entry(folder)) is None:
        return {}
    base = find_base(str(entry["model"]), folder)
    for slot, expected in entry["files"].items():
        found = digests(base / slot)
        if differing := sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        ):
            raise BadInput(
                f"{folder} takes its {slot} from {base}, where {', '.join(differing[:3])} is not the file that it was "
                "made with: restore that, or save the model again"
            )
    index = json.loads((base / INDEX).read_text(encoding="utf-8"))
    components = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2}
    without = {name: None for name, kind in components.items() if name not in entry["files"] and kind[1] is not None}
    with without_loading_bars(), without_expected_messages():
        pipe = diffusers().DiffusionPipeline.from_pretrained(str(base), **without)
    return {slot: getattr(pipe, slot) for slot in entry["files"]}
