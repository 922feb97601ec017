"""LoRAs as files: extracted from a student by SVD, merged into a model, converted from one format to the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..distillers import Distiller
from ..errors import BadInput, check_choice, check_int
from ..model.lora import component_of, lora_file, resolve_layers
from ..model.model import Model
from ..nets.lora import innermost, target_layers
from ..nets.lora_svd import extract_low_rank
from ..pick import format_spec
from ..storage.lora_files import FORMATS, read_lora, write_lora
from ..storage.model_folder import check_savable

__all__ = ["check_lora", "convert_lora", "describe_lora", "extract_lora", "merge_lora_files"]

LOST = 3  # parameters without a place in the LoRA that a line names


def check_lora(
    base: Model, distiller: Distiller | None, rank: int | None, targets: str | None, sharded: bool = False
) -> None:
    """Refuse a LoRA that cannot be trained, before anything runs.

    Args:
        base: what it changes.
        distiller: the method of distillation; None: plain training.
        rank: of the LoRA; None: there is none.
        targets: its layers.
        sharded: the network is sharded among processes.

    Raises:
        BadInput: with the reason, and what would work.
    """
    if rank is None:
        if targets is not None:
            raise BadInput("lora_targets are the layers of a LoRA: set its rank too, such as 16")
        return
    check_int("the rank of a LoRA", rank, 1)
    if distiller is not None and distiller.adds_inputs:
        raise BadInput(
            f"{pick_name(distiller)} gives its students' networks further inputs or another class, which a LoRA cannot "
            "hold: use a method that keeps the network, such as progressive, guided with guidance=none, tract or dmd"
        )
    if sharded:
        raise BadInput("a LoRA is trained without fsdp: its factors and their optimiser are small")
    if base.denoiser.net_takes_guidance:
        raise BadInput(f"{base.name} takes the guidance scale as an input, which a LoRA file cannot describe")
    target_layers(innermost(base.denoiser.net), targets)


def pick_name(distiller: Distiller) -> str:
    """The name of a method, without its options."""
    return format_spec(distiller).partition(":")[0]


def extract_lora(
    base: Model, student: Model, rank: int, out: str | Path, *, targets: str | Sequence[str] | None = "all",
    layout: str = "diffusers", half: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Reduce a student, trained with all its weights, to a LoRA of its base by truncated SVD, and write it.

    Args:
        base: the model that the student was made from, or begins as.
        student: of the same network.
        rank: of every layer's factors.
        out: the .safetensors file, or a folder.
        targets: the layers, see `hasten.nets.lora.target_layers`.
        layout: `diffusers` or `kohya`.
        half: factors as float16.

    Returns:
        The file, its bytes, rank, layers, and the errors (`hasten.nets.lora_svd.Extraction`): relative Frobenius norms
        of what is left out of the difference of the weights, `total_error` over all parameters, `layers_error` over
        those of the LoRA, `errors` by layer; `lost`, the norm of the change of parameters that a LoRA cannot hold.

    Raises:
        BadInput: for models of different networks, and students whose network has further inputs.
    """
    check_choice("LoRA format", layout, FORMATS)
    for one in (base, student):
        if one.denoiser.net_takes_guidance or one.denoiser.step_counts is not None:
            raise BadInput(
                f"{one.name} has the guidance scale or the number of steps as an input: no LoRA can add that"
            )
    nets = [innermost(one.denoiser.net) for one in (base, student)]
    if type(nets[0]) is not type(nets[1]):
        raise BadInput(
            f"{base.name} is a {type(nets[0]).__name__} and {student.name} a {type(nets[1]).__name__}: a LoRA needs "
            "two models of one network"
        )
    extraction = extract_low_rank(nets[0], nets[1], rank, targets)
    lora = lora_file(base, extraction.factors, student)
    lora.info["extracted"] = {"student": student.name, "total_error": extraction.total}
    file = write_lora(lora, out, layout, half)
    ranks = {"rank": max(lora.ranks), "layers": len(extraction.factors)}
    return {"file": str(file), "bytes": file.stat().st_size, **ranks, **extraction.report()}


def describe_lost(result: dict[str, Any]) -> str:
    """A line about what a LoRA could not hold; "" where there is nothing."""
    lost = sorted(result["lost"].items(), key=lambda item: -item[1])
    if not lost:
        return ""
    names = ", ".join(f"{name} ({norm:.2g})" for name, norm in lost[:LOST])
    more = f" and {len(lost) - LOST} more" if len(lost) > LOST else ""
    return f"the changes of {len(lost)} parameters have no place in it and are lost, with their norms: {names}{more}"


def describe_lora(file: str | Path) -> tuple[dict[str, Any], list[str]]:
    """What a LoRA file holds, as a dict (layers by component, ranks, names, info) and as lines of text."""
    lora = read_lora(file)
    layers = {name: len(one) for name, one in lora.components.items()}
    result = {"layers": layers, "ranks": lora.ranks, "names": lora.names, "info": lora.info}
    counts = ", ".join(f"{count} layers of the {name}" for name, count in layers.items())
    lines = [f"{file}: {counts}, rank {', '.join(map(str, lora.ranks))}, names of {lora.names}"]
    lines += [f"  {key}: {value}" for key, value in lora.info.items() if not isinstance(value, dict)]
    distilled = lora.info.get("distilled")
    if isinstance(distilled, dict):
        keys = ("method", "teacher", "steps", "guidance_scale", "date")
        lines += [f"  distilled: {', '.join(f'{key} {distilled[key]}' for key in keys if key in distilled)}"]
    return result, lines


def merge_lora_files(model: Model, lora: Sequence[str | Path], out: str | Path) -> dict[str, Any]:
    """Merge LoRA files into a model and save it: as a pipeline where the model is one.

    Args:
        model: the base.
        lora: files, each `FILE` or `FILE:SCALE`.
        out: the folder to write.

    Returns:
        The folder, name, and how it samples.
    """
    merged = replace(model.with_lora(list(lora)), name=Path(out).resolve().name)
    check_savable(merged)
    merged.save(out)
    how = {key: getattr(merged, key) for key in ("sampler", "times", "steps", "guidance_scale")}
    return {"folder": str(out), "model": merged.name, "lora": merged.card["lora"], **how}


def convert_lora(
    file: str | Path, out: str | Path, layout: str, model: Model | None = None, half: bool = False
) -> dict[str, Any]:
    """Write a LoRA file in the other format, with the same changes of the weights.

    Args:
        file: of either format.
        out: the file to write.
        layout: `diffusers` or `kohya`.
        model: whose layers have the names; None: names of kohya are read as those of diffusers' U-Nets.
        half: factors as float16.

    Returns:
        The file, its components with their layers and ranks.
    """
    lora = read_lora(file)
    if model is not None:
        parts = {name: component_of(model, name, str(file)) for name in lora.components}
        lora.components = {name: resolve_layers(parts[name], one, str(file)) for name, one in lora.components.items()}
    elif any(name.startswith(("input.", "output.", "middle.")) for one in lora.components.values() for name in one):
        raise BadInput(f"{file} names blocks as the original code of SDXL does: name the model too, to translate them")
    written = write_lora(lora, out, layout, half)
    layers = {name: len(one) for name, one in lora.components.items()}
    return {"file": str(written), "bytes": written.stat().st_size, "layers": layers, "ranks": lora.ranks}
