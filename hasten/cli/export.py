"""`export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ._common import command_for, open_model
from ._processes import on_main_process
from .terminal import print_result


@on_main_process
def export(
    model: str,
    *,
    out: Path,
    lora: list[str] | None = None,
    to: Literal["openvino", "onnx"] = "openvino",
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    opset: int | None = None,
    n: int = 8,
    data: Path | None = None,
    degrade: str | None = None,
    seed: int = 2_000_000,
    json: bool = False,
) -> dict[str, Any]:
    """Export a model with its network as an ONNX or OpenVINO graph, to run faster or in other programs.

    The folder is a model as any other: sample, compare and show take it. It needs the packages of hasten[openvino] or
    hasten[onnx], here and where it runs.

    Args:
        model: A bundled name (see models) or a folder.
        out: The folder to write, with the graph beside its model.json.
        lora: A LoRA file that is merged into the weights, or FILE:SCALE; may be given several times. That of a student
            brings its steps, sampler and guidance scale.
        to: openvino, the fastest on processors, or onnx, the most widely read.
        precision: fp32 is exact; fp16 halves the file; int8 is faster and less exact, and the error is reported. bf16
            is chosen when an openvino model is sampled (--precision bf16), not here.
        opset: Version of the ONNX operators. Default: 18.
        n: Images that calibrate int8.
        data: Of a model that reads a source image: folder, zip or array of images, from which the sources of the
            calibration are made.
        degrade: What makes the sources. Default: as in the training of the model.
        seed: Of the first of these; far from the seeds that sample and compare start with.
        json: Print the result as JSON.

    Returns:
        The folder, its files, their bytes, and the error of the outputs against those of the model.
    """
    from ..errors import BadInput, check_int

    check_int("n", n, 1)
    check_int("seed", seed, 0)
    if opset is not None and to != "onnx":
        raise BadInput(f"--opset is ONNX's: leave it out with --to {to}")
    loaded = open_model(model, "cpu", lora)
    if data is not None:
        from ..workflows.source_data import PairSettings, calibration_sources

        loaded = calibration_sources(
            loaded, data, None if degrade is None else PairSettings.of(loaded, degrade=degrade)
        )
    if to == "onnx":
        from ..adapters import onnx

        exported = onnx.export(loaded, out, precision, **({} if opset is None else {"opset": opset}), n=n, seed=seed)
    else:
        from ..adapters import openvino

        exported = openvino.export(loaded, out, precision, n=n, seed=seed)
    note, config = exported.card["exported"], dict(exported.denoiser.net.config)  # type: ignore[arg-type]
    result = {"folder": str(out), "files": config["files"], **note}
    line = f"{out}: {to} {precision}, {note['bytes'] / 1e6:.1f} MB, error {note['error']:.1e}"
    print_result(result, f"{line}; try {command_for(loaded, out)}", json)
    return result
