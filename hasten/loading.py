"""`hasten.load`: a model by name, by folder, or from a pipeline of `diffusers`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import zoo
from .adapters.diffusers.called import load_or_call
from .adapters.diffusers.pipelines import load_pipeline, open_saved
from .errors import BadInput, nearest
from .model.model import Model
from .progress import ignore_messages
from .storage.model_folder import DESCRIPTION, read_model
from .utils.random import preserve_rng_state


@preserve_rng_state()  # the initialisation of an empty network draws random numbers
def load(name: Any, device: Any = None, networks: Sequence[type] = (), trust_code: bool = False) -> Model:
    """Load a model.

    Args:
        name: of a bundled model, a model folder, or a pipeline of `diffusers`: the object, its folder or its hub id.
        device: Default: the CPU; a pipeline object stays where it is.
        networks: classes of user networks; one whose module this process has imported need not be given.
        trust_code: allow the import of the module of a network's class, which runs its code.

    Returns:
        The model, in evaluation mode, without gradients of its weights.

    Raises:
        BadInput: if there is no such model, and if a file in the folder is missing, damaged (its sha256 must be the one
            in model.json) or of another shape than the network's.
    """
    if names_pipeline(name):
        return load_pipeline(name, device=device)
    return Model(**read_model(find_model_folder(name), networks, trust_code, open_saved)).to(device or "cpu")


@preserve_rng_state()
def load_to_compare(name: Any, device: Any = None, report: Callable[[str], None] = ignore_messages) -> Model:
    """`load`; a pipeline of prompts that it refuses, such as FLUX, is sampled through its own call.

    Args:
        name: as for `load`.
        device: as for `load`.
        report: receives a line where a pipeline is called.

    Raises:
        BadInput: where neither is possible.
    """
    if not names_pipeline(name):
        return load(name, device)
    return load_or_call(name, device, report)


def names_pipeline(name: Any) -> bool:
    """Whether `name` is a pipeline of `diffusers`: the object, its folder, or a hub id.

    A hub id is `owner/name` where no folder `owner` exists.
    """
    if not isinstance(name, (str, Path)):
        return True
    folder, parts = Path(name), str(name).split("/")
    if folder.exists():
        return (folder / "model_index.json").is_file() and not (folder / DESCRIPTION).is_file()
    plain = len(parts) == 2 and all(re.fullmatch(r"\w[\w.-]*", part) for part in parts)
    return plain and not folder.parent.exists()


def find_model_folder(name: str | Path) -> Path:
    """The folder of a model: of a bundled one by name, else a path to a folder with a model.json.

    Raises:
        BadInput: where there is none, with the nearest name.
    """
    cards = zoo.cards()
    if str(name) in cards:
        return cards[str(name)].folder
    folder = Path(name)
    if (folder / DESCRIPTION).is_file():
        return folder
    if folder.is_dir():
        raise BadInput(f"no {DESCRIPTION} in {name}: not a model that hasten saved")
    if folder.exists():
        raise BadInput(f"{name} is a file: a model is a folder with a {DESCRIPTION}, or a bundled name")
    if "/" in str(name) or os.sep in str(name):
        raise BadInput(f"no folder {name} (bundled models: {', '.join(cards) or 'none'})")
    raise BadInput(f"unknown model {str(name)!r}: {nearest(str(name), cards)}, or a folder with a {DESCRIPTION}")
