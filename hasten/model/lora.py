"""LoRA files merged into a model, and what a file says of a student."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from .. import zoo
from .._version import __version__
from ..adapters.diffusers.library import network_of
from ..adapters.model_like import ModelLike
from ..denoiser import Denoiser
from ..errors import BadInput, Notice, check_number
from ..nets.lora import LowRank, attach_lora, innermost, merge_factors, trimmed
from ..nets.prequantized import check_original_weights
from ..nets.quantized import layers as integer_layers
from ..pick import pick
from ..plan.table import plan as compile_plan
from ..predictions import prediction_from
from ..storage.lora_files import LoRAFile, base_hash, read_lora
from ..storage.lora_names import flat, from_original

__all__ = ["load_lora_weights", "lora_file", "parse_lora_argument", "resolve_layers", "with_trainable_lora"]

M = TypeVar("M")  # a `Model`
NETWORKS = ("unet", "transformer")  # components that are the denoising network
TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")


def load_lora_weights(model: M, lora: str | Path | LoRAFile | Sequence[str | Path | LoRAFile], scale: float = 1.0) -> M:
    """A copy of a model with LoRAs merged into its weights, and into its text encoders' where a file has such parts.

    The LoRA of a student brings its steps, sampler, times and built-in guidance scale with it; the model then
    recommends these, and refuses other scales as every student does.

    Args:
        model: in floating point; it stays as it is.
        lora: a file (`hasten.storage.lora_files.read_lora`), its contents, or several. A file may be followed by a
            scale, `"style.safetensors:0.7"`.
        scale: factor of the change of the weights, for files that name none.

    Returns:
        The model, in memory of its own.

    Raises:
        BadInput: for a LoRA of another model, parts that the model has no place for, and a second student.

    Notes:
        A LoRA made for other weights of the same shapes (a fine-tune's base) is merged with a `Notice`.
    """
    for one in lora if isinstance(lora, (list, tuple)) else (lora,):
        if isinstance(one, LoRAFile):
            model = cast(M, merged_model(model, one, scale, "the LoRA"))
        else:
            path, own = parse_lora_argument(one)
            model = cast(M, merged_model(model, read_lora(path), scale if own is None else own, str(path)))
    return model


def with_trainable_lora(model: M, path: str | Path) -> M:
    """A copy of a model with a LoRA whose factors are layers' parameters, not merged: what trains it further.

    Args:
        model: that the LoRA was made for, in floating point; it stays as it is, and its weights are shared.
        path: the file, or the name of a bundled one.

    Raises:
        BadInput: as `load_lora_weights`, and for a LoRA of text encoders, or of several ranks.
    """
    path, scale = parse_lora_argument(path)
    lora = read_lora(path)
    if scale not in (None, 1.0):
        raise BadInput(f"{path} is trained further as it is: without the scale {scale:g}")
    if others := [name for name in lora.components if name not in NETWORKS]:
        raise BadInput(f"{path} changes the {others[0]} too: only a LoRA of the denoising network is trained further")
    if len(lora.ranks) > 1:
        raise BadInput(f"{path} has layers of the ranks {lora.ranks}: a LoRA of one rank is trained further")
    merged: Any = merged_model(model, lora, 1.0, str(path))
    owned = cast(Any, model).denoiser
    net = copy.deepcopy(owned.net, {id(p): p for p in owned.net.parameters()})
    (factors,) = lora.components.values()
    attach_lora(net, resolve_layers(innermost(net), factors, str(path)))
    return cast(M, replace(merged, denoiser=merged.denoiser.replace(net=net)))


def parse_lora_argument(argument: str | Path) -> tuple[Path, float | None]:
    """The file (or the name of a bundled one) and the scale of `FILE` or `FILE:SCALE`; None without one."""
    path, colon, number = str(argument).rpartition(":")
    if not colon or Path(argument).exists() or "/" in number or "\\" in number or number.endswith(".safetensors"):
        return zoo.find_file(argument), None
    try:
        return zoo.find_file(path), check_number("the scale of a LoRA", float(number))
    except ValueError as e:
        raise BadInput(f"{argument}: a LoRA is FILE or FILE:SCALE, and {number!r} is no scale") from e


def merged_model(model: Any, lora: LoRAFile, scale: float, path: str) -> Any:
    """A copy of a model with one LoRA."""
    scale = check_number("the scale of a LoRA", scale)
    net = innermost(model.denoiser.net)
    if next(integer_layers(net), None) is not None or getattr(model.denoiser.net, "runs_elsewhere", False):
        raise BadInput(f"{model.name} is quantised or exported: merge the LoRA into the model that it was made from")
    check_original_weights(
        net, f"{path} cannot be merged", "load_lora_weights of the pipeline keeps a LoRA beside quantised weights"
    )
    student = lora.info.get("distilled") is not None
    if student and "distilled" in model.card:
        raise BadInput(f"{path} makes a student of a model, and {model.name} is one already: use the teacher")
    parts = {name: component_of(model, name, path) for name in lora.components}
    layers = {name: resolve_layers(parts[name], lora.components[name], path) for name in lora.components}
    transfer = check_lora_base(model, lora, layers, path)
    denoiser = copy.deepcopy(model.denoiser)
    pipe, conditioning = copy.copy(model.pipeline), model.conditioning
    for name, factors in layers.items():
        if name in NETWORKS:
            merge_factors(denoiser.net, factors, scale)
            continue
        vars(pipe)[name] = copy.deepcopy(parts[name])
        merge_factors(vars(pipe)[name], factors, scale)
        conditioning = copy.copy(model.conditioning)
        conditioning.pipe = pipe
    entry = {"file": Path(path).name, "scale": scale, "base": lora.info.get("base"), "transfer": transfer}
    card = {**model.card, "lora": [*model.card.get("lora", []), entry]}
    measured = [key for key in ("plan", "plans", "statistics", "parts") if getattr(model, key)]
    if measured:
        warnings.warn(
            f"the {', '.join(measured)} of {model.name}, found for its weights without {path}, are left out",
            Notice,
            stacklevel=3,
        )
    name = f"{model.name}+{Path(path).stem}"
    result = replace(
        model, denoiser=denoiser, name=name, card=card, sha256=None, pipeline=pipe, conditioning=conditioning,
        plan=None, plans={}, statistics={}, parts={},
    )  # fmt: skip
    if student and scale != 1:
        warnings.warn(
            f"{path} is the LoRA of a student: its {lora.info.get('steps')} steps and guidance hold at scale 1, "
            f"not {scale:g}",
            Notice,
            stacklevel=3,
        )
    return as_student(result, lora.info, path) if student else result


def component_of(model: Any, name: str, path: str) -> nn.Module:
    """The network or text encoder of a model that a component of a LoRA changes."""
    if name in NETWORKS:
        return innermost(model.denoiser.net)
    encoder = getattr(model.pipeline, name, None) if name in TEXT else None
    if encoder is None:
        raise BadInput(f"{path} changes the {name} too, which {model.name} does not have: use a LoRA without it")
    return cast(nn.Module, encoder)


def resolve_layers(net: nn.Module, factors: Mapping[str, LowRank], path: str = "the LoRA") -> dict[str, LowRank]:
    """The factors by the names of the layers in a network, whichever spelling the file has.

    Args:
        net: the network or text encoder.
        factors: by name, with dots or `_`, of diffusers or of the original code.
        path: of the file, for messages.

    Raises:
        BadInput: where the LoRA is for another network.
    """
    modules = {name: one for name, one in net.named_modules() if hasattr(one, "weight")}
    by_flat = {flat(name): name for name in modules}
    count = getattr(getattr(net, "config", None), "layers_per_block", 2)
    names = {name: from_original(flat(name), count if isinstance(count, int) else max(count)) for name in factors}
    found = {name: by_flat[one] for name, one in names.items() if one in by_flat}
    if missing := [name for name in factors if name not in found]:
        raise BadInput(
            f"{path} is a LoRA for another model: {len(missing)} of its {len(factors)} layers are not in this "
            f"{type(net).__name__}, first {missing[0]}"
        )
    for name, layer in found.items():
        shape = tuple(modules[layer].get_parameter("weight").shape)
        if trimmed(shape) != trimmed(factors[name].shape):
            raise BadInput(
                f"{path} is a LoRA for another model: it changes weights {factors[name].shape} of {layer}, those of "
                f"this {type(net).__name__} are {shape}"
            )
    return {layer: factors[name] for name, layer in found.items()}


def check_lora_base(model: Any, lora: LoRAFile, layers: Mapping[str, Mapping[str, LowRank]], path: str) -> bool:
    """Whether a LoRA was made for other weights (a `Notice`). BadInput for another schedule or prediction."""
    info, denoiser = lora.info, model.denoiser
    if info.get("distilled") is not None:
        if info.get("schedule_sha256") != schedule_hash(denoiser):
            raise BadInput(f"{path} makes a student on another noise schedule than that of {model.name}")
        if info.get("base_prediction") != denoiser.prediction.to_dict():
            raise BadInput(
                f"{path} was made for a network that predicts {info.get('base_prediction')}, {model.name} predicts "
                f"{denoiser.prediction.to_dict()}"
            )
    expected = info.get("base_sha256")
    changed = [name for one in NETWORKS for name in layers.get(one, ())]
    if expected is None or expected == base_hash(denoiser.net, changed):
        return False
    warnings.warn(
        f"{path} was made for {info.get('base')}, whose weights are others than those of {model.name}: it is "
        "transferred",
        Notice,
        stacklevel=4,
    )
    return True


def as_student(model: Any, info: dict[str, Any], path: str) -> Any:
    """A model that samples as the student whose LoRA it has."""
    try:
        span = tuple(float(scale) for scale in info["distilled"]["guidance_scale"])
        sampler, times, steps = str(info["sampler"]), str(info["times"]), int(info["steps"])
        prediction = prediction_from(info["prediction"])
        denoiser = model.denoiser.replace(prediction=prediction, guidance_range=span).eval().requires_grad_(False)
        method = pick("samplers", sampler)
        grid = pick("times", times)(denoiser.schedule, steps)
        plan = compile_plan(method, denoiser.schedule, grid) if method.linear else None
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise BadInput(f"the metadata of {path} do not describe a student: {type(e).__name__}: {e}") from e
    scale = min(max(float(info.get("guidance_scale", span[0])), span[0]), span[-1])
    return replace(
        model, denoiser=denoiser, sampler=sampler, times=times, steps=steps, guidance_scale=scale, plan=plan,
        card={**model.card, "distilled": info["distilled"]},
    )  # fmt: skip


def lora_file(base: ModelLike, factors: Mapping[str, LowRank], student: ModelLike | None = None) -> LoRAFile:
    """Factors as the contents of a file that says for which weights they are, and how the student is sampled.

    Args:
        base: the model without the LoRA.
        factors: by name of the layer.
        student: the model that the LoRA makes of it, where that is a student of few steps.
    """
    slot = "unet" if base.pipeline is None else network_of(base.pipeline)[0]
    info: dict[str, Any] = {
        "schema": 1,
        "hasten": __version__,
        "base": base.name,
        "base_sha256": base_hash(base.denoiser.net, factors),
    }
    if student is not None and (distilled := student.card.get("distilled")) is not None:
        info |= {
            "schedule_sha256": schedule_hash(base.denoiser),
            "base_prediction": base.denoiser.prediction.to_dict(),
            "prediction": student.denoiser.prediction.to_dict(),
            **{key: getattr(student, key) for key in ("sampler", "times", "steps", "guidance_scale")},
            "distilled": distilled,
        }
    return LoRAFile({slot: dict(factors)}, info)


def schedule_hash(denoiser: Denoiser) -> str:
    """sha256 of a denoiser's noise schedule."""
    return hashlib.sha256(json.dumps(denoiser.schedule.to_dict(), sort_keys=True).encode()).hexdigest()
