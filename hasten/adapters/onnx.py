"""Networks exported to ONNX graphs and run by ONNX Runtime."""

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
MAX_BYTES = 1_800_000_000  # in a single ONNX file, whose format is limited to 2 GiB
INT8 = ("Conv", "Gemm", "MatMul")


class OnnxNet(ExportedNetwork):
    """A network in the file network.onnx, run by ONNX Runtime.

    On the CPU it uses torch's number of threads; on a GPU, where the model was moved there, the CUDA provider.
    """

    kind = "onnx"

    def run(self, arrays: list[np.ndarray], x: Tensor) -> np.ndarray:
        """Run the graph; a session is created at the first call for each device and number of threads."""
        key = x.device, torch.get_num_threads()
        if key not in self.sessions:
            self.sessions[key] = self._session(*key)
        session = self.sessions[key]
        return session.run(None, dict(zip((one.name for one in session.get_inputs()), arrays)))[0]

    def _session(self, device: torch.device, threads: int) -> Any:
        """A session of ONNX Runtime for this device and number of threads."""
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
            raise BadInput(f"onnx networks run on cpu or cuda, found {device.type}")
        try:
            return onnxruntime.InferenceSession(str(self.graph()), options, providers=providers)
        except Exception as e:  # one class per status code
            raise BadInput(f"onnxruntime cannot run {self.graph()}: {str(e).splitlines()[0]}") from e


def export(
    model: Model, path: str | Path, precision: str = "fp32", opset: int = 18, n: int = 8, seed: int = FIRST_SEED
) -> Model:
    """Write a model folder with its network as network.onnx.

    The graph takes `x` (B, *S) and `time` (B,), float32, and the conditions by name (`label` (B,) int64), and returns
    `raw` (B, *S), for any B; other programs can run it too.

    Args:
        model: to export.
        path: folder to write.
        precision: "fp32", exact; "fp16": weights and arithmetic in half precision, for GPUs (CPUs convert, which costs
            time); "int8": convolutions and matrix products on 8-bit integers, weights per channel, activations by
            their range over the calibration samples (static quantisation in QDQ format).
        opset: version of the ONNX operators, 18 to 23.
        n: images sampled to calibrate int8.
        seed: of their sampling.

    Returns:
        The exported model, which samples as any other.

    Raises:
        BadInput: for what cannot be exported, and for a missing package.
        HastenError: where the network's graph cannot be exported.

    References:
        https://onnx.ai, https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
    """
    if opset not in OPSETS:
        raise BadInput(f"opset must be {OPSETS[0]} to {OPSETS[-1]}, found {opset}")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require_package(package, "onnx")

    def write(flat: FlatNetwork, inputs: list[NetworkInputs], file: Path) -> None:
        with silence_exporters():
            if precision == "fp32":
                export_graph(flat, inputs[0], file, opset)
                return
            exact = file.with_name("exact.onnx")
            export_graph(flat, inputs[0], exact, opset)
            if precision == "fp16":
                convert_to_half(exact, file)
            else:
                quantize_onnx(exact, file, inputs)
            for temporary in file.parent.glob("exact.onnx*"):
                temporary.unlink()

    return export_network(OnnxNet, model, path, precision, n, seed, write, opset=opset)


def export_graph(flat: FlatNetwork, inputs: NetworkInputs, file: Path, opset: int) -> None:
    """Export with a dynamic batch size; weights that are too large for one file go into another beside it.

    Args:
        flat: the network.
        inputs: to trace it with.
        file: to write.
        opset: version of the ONNX operators.
    """
    batch = {0: torch.export.Dim.DYNAMIC}
    conditions = tuple(inputs[name] for name in flat.names)
    shapes: dict[str, Any] = {"x": batch, "time": batch}
    shapes |= {"conditions": tuple(batch for _ in conditions)} if conditions else {}
    program = torch.export.export(
        flat,
        (inputs["x"], inputs["time"], *conditions),
        dynamic_shapes=shapes,
        strict=False,
    )
    large = sum(p.numel() * p.element_size() for p in flat.parameters()) > MAX_BYTES
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        input_names=list(inputs),
        output_names=["raw"],
        external_data=large,
        verbose=False,
    )
    assert exported is not None
    exported.save(str(file), external_data=large)
    onnx = require_package("onnx", "onnx")
    proto = onnx.load(str(file), load_external_data=False)
    for node in [*proto.graph.node, *(node for function in proto.functions for node in function.node)]:
        del node.metadata_props[:]  # paths and lines of source
        node.doc_string = ""
    onnx.save(proto, str(file))


def convert_to_half(exact: Path, file: Path) -> None:
    """Write the graph in half precision; inputs and outputs stay float32."""
    onnx, float16 = require_package("onnx", "onnx"), require_package("onnxruntime.transformers.float16", "onnx")
    onnx.save(float16.convert_float_to_float16(onnx.load(str(exact)), keep_io_types=True), str(file))


def quantize_onnx(exact: Path, file: Path, inputs: list[NetworkInputs]) -> None:
    """Write the graph on 8-bit integers, with the ranges of activations over the calibration inputs."""
    quantization = require_package("onnxruntime.quantization", "onnx")

    remaining = iter(inputs)

    def get_next(_self: Any = None) -> dict[str, np.ndarray] | None:
        each = next(remaining, None)
        return None if each is None else {name: value.numpy() for name, value in each.items()}

    reader = type("Reader", (quantization.CalibrationDataReader,), {"get_next": get_next})
    quantization.quantize_static(
        str(exact),
        str(file),
        reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        op_types_to_quantize=list(INT8),
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )


@contextlib.contextmanager
def silence_exporters() -> Iterator[None]:
    """Suppress the exporters' warnings about their internals, and send what they print to stderr."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
