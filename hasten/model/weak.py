"""Further models that a method uses and that are given by name: the weaker one of `AutoGuidance`, generators."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import zoo
from ..adapters.model_like import ModelLike
from ..denoiser import device_of
from ..errors import BadInput
from ..guides.autoguidance import AutoGuidance
from ..storage.model_folder import DESCRIPTION, read_model

__all__ = ["fields_of", "with_weak_model"]


def with_weak_model(guide: Any, model: ModelLike) -> Any:
    """The guide, with the denoiser in the place of the name of its weak model; other guides as they are.

    Args:
        guide: any guide.
        model: that is guided.

    Raises:
        BadInput: for a name without a model that hasten saved, or of other classes.
    """
    if not isinstance(guide, AutoGuidance) or not isinstance(guide.weak, (str, Path)):
        return guide
    other = "of a pipeline pass the denoiser: AutoGuidance(weak=hasten.load(FOLDER).denoiser)"
    fields = fields_of("autoguidance", guide.weak, other)
    if fields.get("classes") != model.classes:
        raise BadInput(f"autoguidance: {guide.weak} has other classes than {model.name}")
    return replace(guide, weak=fields["denoiser"].to(device_of(model.denoiser.net)))


def fields_of(method: str, name: str | Path, other: str) -> dict[str, Any]:
    """The arguments of the `Model` of a name.

    Args:
        method: that uses it, for the message.
        name: a bundled one, or the folder of a model that hasten saved.
        other: what to do with other models, for the message.

    Raises:
        BadInput: where there is no such model.
    """
    cards = zoo.cards()
    folder = cards[str(name)].folder if str(name) in cards else Path(name)
    if not (folder / DESCRIPTION).is_file():
        raise BadInput(f"{method}: {name} is not a bundled name or the folder of a model that hasten saved; {other}")
    return read_model(folder, (), False, None)
