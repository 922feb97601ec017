"""`hasten merge-lora`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ._common import open_model
from ._processes import on_main_process
from .terminal import print_result


@on_main_process
def merge_lora(model: str, lora: list[str], *, out: Path, device: str = "cpu", json: bool = False) -> dict[str, Any]:
    """Merge LoRA files into a model's weights and save it, a pipeline as a pipeline that diffusers opens too.

    Args:
        model: A bundled name (see models), a folder or a pipeline.
        lora: LoRA files, in the layout of diffusers or with kohya's names, each FILE or FILE:SCALE.
        out: The folder to write.
        device: auto, cpu, cuda, cuda:1, mps or xpu.
        json: Print the result as JSON.

    Returns:
        The folder, the LoRAs, and how the model is sampled.
    """
    from ..workflows.lora import merge_lora_files

    result = merge_lora_files(open_model(model, device), lora, out)
    files = ", ".join(f"{one['file']} (scale {one['scale']:g})" for one in result["lora"])
    print_result(result, f"{out}: {files} merged; try hasten sample {out}", json)
    return result
