"""Which models a method can distil, checked before anything runs."""

from __future__ import annotations

from typing import Any

from ..distillers import Distiller
from ..errors import BadInput
from ..model.model import Model
from ..nets.lora import lora_layers
from ..nets.prequantized import check_original_weights
from ..nets.quantized import layers
from ..pick import method_names, pick
from ..storage.checks import check_trainable
from ..storage.model_folder import check_savable
from ..train.sadm import Sadm, structure_options


def check_models(model: Model, init: Model | None, distiller: Distiller, method: str) -> None:
    """Refuse, before anything runs, models that cannot be distilled so or whose students could not be saved."""
    name = method.partition(":")[0]
    for one in (model,) if init is None else (model, init):
        if next(layers(one.denoiser.net), None) is not None or getattr(one.denoiser.net, "runs_elsewhere", False):
            raise BadInput(
                f"{one.name} is quantised or exported, which cannot be trained: use the model it was made from"
            )
        check_original_weights(one.denoiser, f"{one.name} cannot be trained", "use the model it was made from")
        if one.denoiser.step_counts is not None:
            raise BadInput(
                f"{one.name} is one network for several numbers of steps, which no method can distil further"
            )
    first = model if init is None else init
    if model.conditioning is not None:
        check_prompts(first, distiller, method)
    if model.source_shape is not None and distiller.direction == "encode":
        raise BadInput(f"{name}: {model.name} reads a source image, and restyle has none: use another method")
    text_scale = model.conditioning is not None and distiller.adds_guidance_only  # a U-Net of diffusers can have it
    folded = model if lora_layers(first.denoiser.net) else first  # a LoRA is merged when the student is saved
    check_savable(folded, network=not distiller.adds_inputs or text_scale)
    for one in (model,) if init is None else (model, init):
        check_trainable(one.name, one.denoiser, one.shape, one.cond(2))
    before = model.card.get("distilled", {})
    if before and not (before.get("any_time") or before.get("stage") == "guidance"):
        needed, k = distiller.teacher_steps, before["steps"]
        direction = before.get("figures", {}).get("direction", "decode")
        if direction != distiller.direction:
            does = "encodes images into noise" if direction == "encode" else "makes images from noise"
            raise BadInput(f"{model.name} {does}, which {name} cannot learn from: use another teacher")
        if needed not in (0, k):
            start = f", or use {name} with start={k}" if isinstance(getattr(distiller, "start", None), int) else ""
            times = "at any time" if needed is None else f"at the times of {needed} steps"
            raise BadInput(
                f"{model.name} is a student of {k} steps and was trained at no other times, {name} evaluates its "
                f"teacher {times}: use the model it was distilled from as the teacher, and this one as --init "
                f"(init=){start}"
            )
    if init is None:
        return
    for what, mine, theirs in (
        ("shape", tuple(init.shape), tuple(model.shape)),
        ("classes", len(init.classes or ()), len(model.classes or ())),
        ("codec", (init.codec, init.residual_std), (model.codec, model.residual_std)),
        ("source images of shape", init.source_shape, model.source_shape),
        ("prompt embeddings", embedding_shapes(init), embedding_shapes(model)),
    ):
        if mine != theirs:
            raise BadInput(f"--init (init=) {init.name} has {what} {mine}, {model.name} has {theirs}")
    if init.classes != model.classes:
        raise BadInput(
            f"--init (init=) {init.name} has the classes of {model.name} under other names or in another order"
        )
    if init.denoiser.schedule.to_dict() != model.denoiser.schedule.to_dict():
        raise BadInput(f"--init (init=) {init.name} was trained on another schedule than {model.name}")


def distillation_structure(config: Any, distiller: Distiller) -> Sadm | None:
    """The structure term that a `DistillConfig` asks for; None without one.

    Raises:
        BadInput: for a method whose students have no targets to compare with, and what the term does not go with.
    """
    options = structure_options(config.structure, trained=True)
    if options is None:
        return None
    name = config.method.partition(":")[0]
    if not distiller.takes_structure:
        known = [method for method in method_names("distillers") if takes_structure(method)]
        raise BadInput(f"{name} has no targets of x0 whose relations structure could compare: use {', '.join(known)}")
    if config.fsdp:
        raise BadInput("structure compares whole batches in an encoder of its own: it does not go with fsdp")
    if options.times != Sadm().times:
        raise BadInput("structure: times is for training, students are trained at their own times: leave it out")
    return options


def takes_structure(method: str) -> bool:
    """Whether a method of distillation, by its name, takes a structure term."""
    return bool(pick("distillers", method).takes_structure)


def check_prompts(model: Model, distiller: Distiller, method: str) -> None:
    """Refuse a method whose students a pipeline with prompts has no place for."""
    name = method.partition(":")[0]
    if distiller.direction == "encode":
        raise BadInput(f"{name}: an encoder of a model with prompts cannot be saved: pipelines make images from noise")
    if distiller.needs_labels:
        random = "rcfd:features=random,beta=0" if name == "rcfd" else f"{name}:features=random"
        raise BadInput(f"{name} trains a classifier on labelled images, {model.name} takes prompts: use {random}")
    if not distiller.adds_inputs:
        return
    if not distiller.adds_guidance_only:
        raise BadInput(
            f"{method}: its students' networks have further inputs or are of another class, which the pipeline of "
            f"{model.name} has no place for: use guided with shared=false, progressive or consistency"
        )
    if model.denoiser.guidance_range is None and not hasattr(model.denoiser.net, "with_guidance"):
        raise BadInput(
            f"{method}: the network of {model.name} cannot take a guidance scale as an input (U-Nets can): use one, "
            f"{name}:guidance=none with --guidance-scale {model.guidance_scale:g}"
        )


def embedding_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The shapes of the conditions that a prompt becomes, by name; {} for a model that takes no prompts."""
    if model.conditioning is None:
        return {}
    return {name: tuple(value.shape[1:]) for name, value in model.conditions(1, "").items()}
