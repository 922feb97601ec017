"""The weaker model of `AutoGuidance`, where it is given by name."""

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

__all__ = ["with_weak_model"]


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
    cards = zoo.cards()
    folder = cards[str(guide.weak)].folder if str(guide.weak) in cards else Path(guide.weak)
    if not (folder / DESCRIPTION).is_file():
        raise BadInput(
            f"autoguidance: {guide.weak} is not a bundled name or the folder of a model that hasten saved; of a "
            "pipeline pass the denoiser: AutoGuidance(weak=hasten.load(FOLDER).denoiser)"
        )
    fields = read_model(folder, (), False, None)
    if fields.get("classes") != model.classes:
        raise BadInput(f"autoguidance: {guide.weak} has other classes than {model.name}")
    return replace(guide, weak=fields["denoiser"].to(device_of(model.denoiser.net)))
