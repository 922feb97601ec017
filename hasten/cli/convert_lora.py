"""`hasten convert-lora`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ._common import open_model
from ._processes import on_main_process
from .terminal import print_result


@on_main_process
def convert_lora(
    lora: Path,
    *,
    out: Path,
    to: Literal["diffusers", "kohya"],
    model: str | None = None,
    half: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Write a LoRA file in another format: that of diffusers and peft, or with kohya's names.

    Args:
        lora: The file, of either format.
        out: The .safetensors file to write.
        to: diffusers or kohya.
        model: The model that it is for, which has the names of the layers. Needed for files that name them as SDXL's
            original code does.
        half: Factors as float16.
        json: Print the result as JSON.

    Returns:
        The file, its layers and ranks.
    """
    from ..workflows.lora import convert_lora as convert

    result = convert(lora, out, to, None if model is None else open_model(model, "cpu"), half)
    layers = ", ".join(f"{count} layers of the {name}" for name, count in result["layers"].items())
    print_result(result, f"{result['file']}: {layers}, rank {', '.join(map(str, result['ranks']))}", json)
    return result
