"""`hasten.load`: a model by name, by folder, or from a pipeline of `diffusers`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import zoo
from .adapters.diffusers.pipelines import load_pipeline, open_saved
from .errors import BadInput, nearest
from .model.model import Model
from .storage.model_folder import DESCRIPTION, read
from .utils.random import preserve_rng_state


@preserve_rng_state()  # an empty network draws its first weights
def load(name: Any, device: Any = None, networks: Sequence[type] = (), trust_code: bool = False) -> Model:
    """A model by bundled name or by folder; or a pipeline of `diffusers`, itself, by its folder or by its hub id.

    device: by default the CPU; a pipeline itself stays where it is.
    networks: classes of one's own networks; one whose module this process has imported need not be given.
    trust_code: allow the import of the module of a network's class, which runs its code.

    Raises BadInput if there is no such model, and if a file in the folder is missing, damaged (its sha256 must be the
    one in model.json) or of another shape than the network.
    """
    if is_pipeline(name):
        return load_pipeline(name, device=device)
    return Model(**read(find(name), networks, trust_code, open_saved)).to(device or "cpu")


def is_pipeline(name: Any) -> bool:
    """Whether it is a pipeline of `diffusers`: itself, its folder, or what can only be a hub id, `owner/name` where no
    folder `owner` is."""
    if not isinstance(name, (str, Path)):
        return True
    folder, parts = Path(name), str(name).split("/")
    if folder.exists():
        return (folder / "model_index.json").is_file() and not (folder / DESCRIPTION).is_file()
    plain = len(parts) == 2 and all(re.fullmatch(r"\w[\w.-]*", part) for part in parts)
    return plain and not folder.parent.exists()


def find(name: str | Path) -> Path:
    """The folder of a model: a bundled name first, then a folder with a model.json."""
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
