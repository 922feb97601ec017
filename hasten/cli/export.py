"""`export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ._common import open_model
from ._processes import on_main_process
from .terminal import print_result


@on_main_process
def export(
    model: str,
    *,
    out: Path,
    to: Literal["openvino", "onnx"] = "openvino",
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    opset: int | None = None,
    n: int = 8,
    seed: int = 2_000_000,
    json: bool = False,
) -> dict[str, Any]:
    """Write a model with its network as a graph that another library runs: faster, and readable by other programs.

    The folder is a model as any other: sample, compare and show take it. It needs the packages of hasten[openvino] or
    hasten[onnx], here and where it is run.

    Args:
        model: A bundled name (see models) or a folder.
        out: The folder to write, with the graph beside its model.json.
        to: openvino, the fastest on processors, or onnx, the most widely read.
        precision: fp32 is exact; fp16 halves the file; int8 is faster and less exact, by how much is told. To compute
            in bf16 is a matter of sampling an openvino model (--precision bf16), not of the file.
        opset: Version of the ONNX operators, 18 if left out.
        n: Images that calibrate int8.
        seed: Of the first of them; far from the seeds that sample and compare start with.
        json: Print the result as JSON.

    Returns:
        The folder, its files, their bytes, and the error of the answers against those of the model.
    """
    from ..errors import BadInput, check_int

    check_int("n", n, 1)
    check_int("seed", seed, 0)
    if opset is not None and to != "onnx":
        raise BadInput(f"--opset is ONNX's: leave it out with --to {to}")
    loaded = open_model(model, "cpu")
    if to == "onnx":
        from ..adapters import onnx

        made = onnx.export(loaded, out, precision, **({} if opset is None else {"opset": opset}), n=n, seed=seed)
    else:
        from ..adapters import openvino

        made = openvino.export(loaded, out, precision, n=n, seed=seed)
    note = made.card["exported"]
    result = {"folder": str(out), "files": made.denoiser.net.config["files"], **note}
    said = f"{out}: {to} {precision}, {note['bytes'] / 1e6:.1f} MB, error {note['error']:.1e}"
    print_result(result, f"{said}; try hasten sample {out}", json)
    return result
