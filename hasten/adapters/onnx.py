"""A model's network as an ONNX graph, run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..accelerators import FIRST_SEED
from ..errors import BadInput
from ._export import ExportedNetwork, FlatNetwork, NetworkInputs, export_network, require_package

if TYPE_CHECKING:
    from ..model.model import Model

__all__ = ["OnnxNet", "export"]

OPSETS = range(18, 24)
MAX_BYTES = 1_800_000_000  # of a single file of ONNX, whose format ends at 2 GiB
INT8 = ("Conv", "Gemm", "MatMul")


class OnnxNet(ExportedNetwork):
    """A network in the file network.onnx, run by ONNX Runtime: on the CPU with torch's number of threads, on a GPU
    through its CUDA provider where the model was moved there."""

    kind = "onnx"

    def run(self, arrays: list[np.ndarray], x: Tensor) -> np.ndarray:
        """The graph's output; a session is made at the first call on a device and with a number of threads."""
        key = x.device, torch.get_num_threads()
        if key not in self.running:
            self.running[key] = self._session(*key)
        session = self.running[key]
        return session.run(None, dict(zip((one.name for one in session.get_inputs()), arrays)))[0]

    def _session(self, device: torch.device, threads: int) -> Any:
        onnxruntime = require_package("onnxruntime", "onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda":
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                raise BadInput(
                    "this onnxruntime has no CUDA provider: pip install onnxruntime-gpu in its place, or use the cpu"
                )
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        elif device.type != "cpu":
            raise BadInput(f"onnx networks run on cpu or cuda, asked for {device.type}")
        try:
            return onnxruntime.InferenceSession(str(self.graph()), options, providers=providers)
        except Exception as e:  # its own classes, one a status code
            raise BadInput(f"onnxruntime cannot run {self.graph()}: {str(e).splitlines()[0]}") from e


def export(
    model: Model, path: str | Path, precision: str = "fp32", opset: int = 18, n: int = 8, seed: int = FIRST_SEED
) -> Model:
    """Write a model's folder with its network as network.onnx, and load it: a Model that samples as any other.

    The graph takes `x` (B, *S) and `time` (B,), float32, and the conditions by name (`label` (B,) int64), and gives
    `raw` (B, *S), for any B; other programs can run it too.

    Args:
        precision: "fp32", exact; "fp16": weights and arithmetic of half precision, for GPUs (CPUs convert, which costs
            time); "int8": convolutions and matrix products on 8-bit integers, weights per channel, activations by
            their range over calls of the network.
        opset: version of the ONNX operators.
        n, seed: of the images that calibrate int8.

    Raises:
        BadInput: for what cannot be, for a missing package.
        HastenError: where the network's graph cannot be exported.

    ONNX Runtime's static quantisation (QDQ); the format: https://onnx.ai.
    """
    if opset not in OPSETS:
        raise BadInput(f"opset must be {OPSETS[0]} to {OPSETS[-1]}, found {opset}")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require_package(package, "onnx")

    def write(flat: FlatNetwork, asked: list[NetworkInputs], file: Path) -> None:
        with silence_exporters():
            if precision == "fp32":
                export_graph(flat, asked[0], file, opset)
                return
            whole = file.with_name("whole.onnx")
            export_graph(flat, asked[0], whole, opset)
            if precision == "fp16":
                convert_to_half(whole, file)
            else:
                quantize_onnx(whole, file, flat, asked)
            for left in file.parent.glob("whole.onnx*"):
                left.unlink()

    return export_network(OnnxNet, model, path, precision, n, seed, write, opset=opset)


def export_graph(flat: FlatNetwork, asked: NetworkInputs, file: Path, opset: int) -> None:
    """Export with the batch left open; weights that are too large for one file go into another beside it."""
    batch = {0: torch.export.Dim.DYNAMIC}
    told = tuple(asked[name] for name in flat.names)
    program = torch.export.export(
        flat,
        (asked["x"], asked["time"], *told),
        dynamic_shapes={"x": batch, "time": batch} | ({"told": tuple(batch for _ in told)} if told else {}),
        strict=False,
    )
    large = sum(p.numel() * p.element_size() for p in flat.parameters()) > MAX_BYTES
    made = torch.onnx.export(
        program, dynamo=True, opset_version=opset, input_names=list(asked), output_names=["raw"],
        external_data=large, verbose=False,
    )  # fmt: skip
    assert made is not None
    made.save(str(file), external_data=large)
    onnx = require_package("onnx", "onnx")
    bare = onnx.load(str(file), load_external_data=False)
    for node in [*bare.graph.node, *(node for function in bare.functions for node in function.node)]:
        del node.metadata_props[:]  # from which line of source it came
        node.doc_string = ""
    onnx.save(bare, str(file))


def convert_to_half(whole: Path, file: Path) -> None:
    """The same graph in half precision between inputs and outputs that stay float32."""
    onnx, float16 = require_package("onnx", "onnx"), require_package("onnxruntime.transformers.float16", "onnx")
    onnx.save(float16.convert_float_to_float16(onnx.load(str(whole)), keep_io_types=True), str(file))


def quantize_onnx(whole: Path, file: Path, flat: FlatNetwork, asked: list[NetworkInputs]) -> None:
    """The same graph on 8-bit integers, with the ranges of activations over these calls."""
    quantization = require_package("onnxruntime.quantization", "onnx")

    class Calls(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.left = iter(asked)

        def get_next(self) -> dict[str, np.ndarray] | None:
            inputs = next(self.left, None)
            return None if inputs is None else {name: value.numpy() for name, value in inputs.items()}

    quantization.quantize_static(
        str(whole), str(file), Calls(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        op_types_to_quantize=list(INT8), activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip


@contextlib.contextmanager
def silence_exporters() -> Iterator[None]:
    """The exporters' warnings are about their own insides, and stdout is for results."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
