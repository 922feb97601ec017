"""Fitted classifiers on disk: `few_shot.json` and the stacked factors in `adapters.safetensors`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._version import __version__
from ...errors import BadInput
from ...files import check_writable, write_file
from ...model.lora import lora_file
from ...model.model import Model
from ...storage.lora_files import base_hash, write_lora
from .adapters import ClassAdapters
from .classifier import RULES, DiffusionClassifier, FewShotClassifier

__all__ = ["export_loras", "load_classifier", "save_classifier"]

DESCRIPTION, FACTORS = "few_shot.json", "adapters.safetensors"
KINDS = {kind.__name__: kind for kind in (FewShotClassifier, DiffusionClassifier)}
NOT_SAVED = ("model", "device")


def save_classifier(classifier: FewShotClassifier, folder: str | Path) -> Path:
    """Write a fitted classifier, without the model that it was fitted on.

    Args:
        classifier: fitted.
        folder: is created.

    Raises:
        BadInput: before `fit`, for an elimination of the user's own, and where the folder cannot be written.
    """
    classifier._fitted()
    folder, rule = Path(folder), classifier.elimination
    if not isinstance(rule, str) and type(rule) not in RULES.values():
        raise BadInput(f"the elimination {type(rule).__name__} is of a class of your own, which cannot be saved")
    params = {key: value for key, value in classifier.get_params().items() if key not in NOT_SAVED}
    if not isinstance(rule, str):
        name = next(name for name, kind in RULES.items() if kind is type(rule))
        params["elimination"] = {"rule": name, **dataclasses.asdict(rule)}  # type: ignore[call-overload]
    model, adapters, classes = classifier.model_, classifier.adapters_, classifier.classes_
    source = classifier.model if isinstance(classifier.model, (str, Path)) else model.name
    description: dict[str, Any] = {
        "schema": 1, "hasten": __version__, "kind": type(classifier).__name__, "params": params,
        "model": str(source), "base_sha256": None, "classes": classes.tolist(), "size": classifier.size_,
    }  # fmt: skip
    if adapters is not None:
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        for name, (down, up) in adapters.factors.items():
            tensors |= {f"{name}.lora_A": down.cpu().contiguous(), f"{name}.lora_B": up.cpu().contiguous()}
        data = save(tensors)
        description |= {
            "base_sha256": base_hash(model.denoiser.net, adapters.factors), "alpha": adapters.alpha,
            "adapters_sha256": hashlib.sha256(data).hexdigest(),
        }  # fmt: skip
        write_file(check_writable(folder / FACTORS), data)
    write_file(check_writable(folder / DESCRIPTION), json.dumps(description, indent=1).encode())
    return folder


def load_classifier(folder: str | Path, model: Any = None, device: Any = None) -> FewShotClassifier:
    """Read a fitted classifier.

    Args:
        folder: of `save_classifier`.
        model: that it was fitted on, a `Model` or what `hasten.load` takes; None: by the name that was saved.
        device: of a model that is loaded.

    Raises:
        BadInput: for another folder, damaged files, and a model with other weights.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file():
        raise BadInput(f"{folder} holds no fitted few-shot classifier (no {DESCRIPTION})")
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        kind, params, names = KINDS[description["kind"]], dict(description["params"]), description["classes"]
        if isinstance(rule := params.get("elimination"), dict):
            params["elimination"] = RULES[rule.pop("rule")](**rule)
        classifier = kind(model=description["model"] if model is None else model, device=device, **params)
        base, size = description["base_sha256"], description["size"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{folder / DESCRIPTION} does not describe a few-shot classifier: {error}") from error
    loaded = classifier._checked()
    classifier._set(loaded, np.asarray(names))
    classifier._set_times(None, None, size)
    if base is not None:
        classifier.adapters_ = _read_factors(folder, description, loaded)
    return classifier


def _read_factors(folder: Path, description: dict[str, Any], model: Model) -> ClassAdapters:
    """The adapters, checked against the file's hash and the model's weights."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = (folder / FACTORS).read_bytes()
        tensors = load(data)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot read {folder / FACTORS}: {' '.join(str(error).split())[:120]}") from error
    if hashlib.sha256(data).hexdigest() != description.get("adapters_sha256"):
        raise BadInput(f"{folder / FACTORS} is damaged: its sha256 is not the one in {DESCRIPTION}")
    layers = list(dict.fromkeys(key.rpartition(".")[0] for key in tensors))
    try:
        same = base_hash(model.denoiser.net, layers) == description["base_sha256"]
    except (KeyError, AttributeError):
        same = False
    if not same:
        raise BadInput(f"{folder} was fitted on {description['model']}, whose weights are others than {model.name}'s")
    factors = {name: (tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]) for name in layers}
    return ClassAdapters(factors, float(description["alpha"])).to(model.device)


def export_loras(classifier: FewShotClassifier, folder: str | Path) -> dict[Any, Path]:
    """Write each class's adapter as a LoRA file, which diffusers and `hasten sample --lora` load.

    Args:
        classifier: fitted, with adapters.
        folder: of the files, named by class.

    Returns:
        The file of each class.

    Raises:
        BadInput: without adapters.
    """
    classifier._fitted()
    adapters = classifier.adapters_
    if adapters is None:
        raise BadInput(f"this {type(classifier).__name__} has no adapters")
    files: dict[Any, Path] = {}
    with torch.no_grad():
        for k, name in enumerate(classifier.classes_.tolist()):
            stem = f"{k}-{re.sub(r'[^A-Za-z0-9_-]+', '_', str(name))}"
            lora = lora_file(classifier.model_, adapters.to("cpu").low_rank(k))
            files[name] = write_lora(lora, Path(folder) / f"{stem}.safetensors")
    return files
