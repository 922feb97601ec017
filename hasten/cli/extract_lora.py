"""`hasten extract-lora`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ._common import open_model
from ._processes import on_main_process
from .terminal import print_result


@on_main_process
def extract_lora(
    base: str,
    student: str,
    *,
    out: Path,
    rank: int = 16,
    targets: str = "all",
    format: Literal["diffusers", "kohya"] = "diffusers",
    half: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Reduce a student, trained with all its weights, to a LoRA file of the model it was made from.

    Every layer's difference of weights is decomposed into singular values, of which the largest are kept. The error of
    what is left out is printed.

    Args:
        base: The model that the student was made from: a bundled name (see models) or a folder.
        student: The student's folder.
        out: The .safetensors file to write.
        rank: Of every layer's factors.
        targets: The layers that get factors: attention, conv, all, or names of modules, comma-separated.
        format: diffusers (and peft), or kohya, whose names other programs read.
        half: Factors as float16.
        json: Print the result as JSON.

    Returns:
        The file, its bytes, and the relative error: of all weights, and of every layer.
    """
    from ..workflows.lora import describe_lost
    from ..workflows.lora import extract_lora as extract

    models = open_model(base, "cpu"), open_model(student, "cpu")
    result = extract(*models, rank, out, targets=targets, layout=format, half=half)
    size = f"rank {result['rank']}, {result['layers']} layers, {result['bytes'] / 1e6:.2f} MB"
    lines = [
        f"{result['file']}: {size}; it leaves out {100 * result['total_error']:.2g} % of the difference of the weights "
        f"({100 * result['layers_error']:.2g} % of that of its layers), relative Frobenius norm"
    ]
    worst = sorted(result["errors"].items(), key=lambda item: -item[1])
    lines += [f"  {error:7.4f}  {name}" for name, error in worst]
    if lost := describe_lost(result):
        lines.append(f"  {lost}")
    print_result(result, "\n".join(lines), json)
    return result
