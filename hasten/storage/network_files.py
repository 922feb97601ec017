"""The files of a model's network: of a pipeline's folder, or of a hasten folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.model_like import HasFiles, ModelLike
from .weights import sha256, write_weights

WEIGHTS = "weights.safetensors"


def write_pipeline(model: ModelLike, folder: Path, components_from: str | Path | None, final: Path) -> dict[str, Any]:
    """Write the files of a pipeline; returns the entries of model.json that differ from `model_description`."""
    from ..adapters.diffusers.saving import save_pipeline

    entries = save_pipeline(model, folder, components_from, final)
    file = entries.pop("file")
    model.sha256 = sha256(folder / file)
    return {**entries, "weights": {"file": file, "sha256": model.sha256}}


def write_network(model: ModelLike, folder: Path, half: bool) -> dict[str, Any]:
    """Write the network's files; returns the entries of model.json that differ from `model_description`."""
    net = model.denoiser.net
    write_weights(net, folder / WEIGHTS, half)
    if isinstance(net, HasFiles):
        net.write_files(folder)
    model.sha256 = sha256(folder / WEIGHTS)
    if model.conditioning is not None:
        from ..adapters.diffusers.components import save_components
        from ..adapters.diffusers.library import network_of

        entry = save_components(model.pipeline, network_of(model.pipeline)[0], folder)
        return {"pipeline": entry, "weights": {"file": WEIGHTS, "sha256": model.sha256}}
    if model.decoder is None:
        return {"weights": {"file": WEIGHTS, "sha256": model.sha256}}
    from ..adapters.diffusers.saving import save_decoder

    save_decoder(model, folder)
    return {"decoder": True, "weights": {"file": WEIGHTS, "sha256": model.sha256}}
