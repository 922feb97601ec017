"""A model's network as an OpenVINO graph."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..accelerators import FIRST_SEED
from ..errors import BadInput, HastenError
from ._export import ExportedNetwork, FlatNetwork, NetworkInputs, export_network, require_package

if TYPE_CHECKING:
    from ..model.model import Model

__all__ = ["OpenVinoNet", "export"]

GRAPHS = 4  # batch sizes that get a graph of their own, which is about a tenth faster than one for any batch
CALLS = 64  # that calibrate
SETTINGS = {"PERFORMANCE_HINT": "LATENCY"}
# Snippets make an int8 graph of fixed batch a third faster, but with them 2026.4 crashes on some float32 attention
# (7 x 7 and 4 x 4 places), the whole process with it: such a graph is tried in a process of its own first.
SNIPPETS = "SNIPPETS_MODE"
TRIAL = """
import sys, json, numpy, openvino
path, batch, settings = json.loads(sys.argv[1])
graph = openvino.Core().read_model(path)
graph.reshape({k: [batch, *list(one.partial_shape)[1:]] for k, one in enumerate(graph.inputs)})
asked = [numpy.zeros(list(one.shape), one.element_type.to_dtype()) for one in graph.inputs]
openvino.Core().compile_model(graph, "CPU", settings).create_infer_request().infer(asked)
"""
PATIENCE = 300  # seconds that a trial may take


class OpenVinoNet(ExportedNetwork):
    """A network in the files network.xml and network.bin, run by OpenVINO on the CPU with torch's number of threads.

    Under bfloat16 autocast (runtime bf16) what is not int8 is computed in bfloat16, else in float32, whatever the
    precision of the weights. The first few sizes of batch are compiled for themselves, which takes seconds once; all
    others share a graph for any batch.
    """

    kind = "openvino"

    def run(self, arrays: list[np.ndarray], x: Tensor) -> np.ndarray:
        """The graph's output; it is compiled at the first call of a batch size, number format and count of threads."""
        device = x.device.type
        half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        settings = "bf16" if half else "f32", torch.get_num_threads()
        known = [size for *own, size in self.running if tuple(own) == settings and size]
        batch = len(arrays[0]) if len(arrays[0]) in known or len(known) < GRAPHS else 0
        key = (*settings, batch)
        if key not in self.running:
            self.running[key] = self._compiled(*key).create_infer_request()
        return self.running[key].infer(arrays, share_inputs=True)[0]

    def _compiled(self, format: str, threads: int, batch: int) -> Any:
        openvino = require_package("openvino", "openvino")
        try:
            core = openvino.Core()
            graph = core.read_model(str(self.graph()))
            if batch:
                graph.reshape({k: [batch, *list(one.partial_shape)[1:]] for k, one in enumerate(graph.inputs)})
            hints = {"INFERENCE_PRECISION_HINT": format, "INFERENCE_NUM_THREADS": threads}
            settings = {**SETTINGS, **hints, SNIPPETS: "ENABLE"}
            if not (
                batch and self.config["precision"] == "int8" and runs_in_subprocess(str(self.graph()), batch, settings)
            ):
                settings[SNIPPETS] = "DISABLE"
            return core.compile_model(graph, "CPU", settings)
        except RuntimeError as e:
            raise BadInput(f"openvino cannot run {self.graph()}: {str(e).strip().splitlines()[-1]}") from e


def runs_in_subprocess(path: str, batch: int, settings: dict[str, Any]) -> bool:
    """Whether a graph of this batch is compiled and answers, in a process of its own."""
    asked = [sys.executable, "-c", TRIAL, json.dumps([path, batch, settings])]
    try:
        return subprocess.run(asked, capture_output=True, timeout=PATIENCE).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def export(
    model: Model,
    path: str | Path,
    precision: str = "fp32",
    n: int = 8,
    seed: int = FIRST_SEED,
    keep: tuple[str, ...] = (),
) -> Model:
    """Write a model's folder with its network as network.xml and network.bin, and load it: a Model as any other.

    Args:
        precision: "fp32", exact; "fp16": weights of half precision, half the file, computed in float32; "int8":
            weights per channel and activations on 8-bit integers, by NNCF's quantisation after training. To compute
            in bfloat16 is no matter of the file: it is `runtime="bf16"` of sampling.
        n, seed: of the images that calibrate int8, in the way that the model recommends; at most 64 of the calls are
            used, evenly spread over the steps.
        keep: regular expressions: layers whose names match stay in floating point.

    Raises:
        BadInput: for what cannot be, for a missing package.
        HastenError: where the network's graph cannot be converted.

    https://docs.openvino.ai, https://github.com/openvinotoolkit/nncf.
    """
    require_package("openvino", "openvino")
    if precision == "int8":
        require_package("nncf", "openvino")

    def write(flat: FlatNetwork, asked: list[NetworkInputs], file: Path) -> None:
        openvino = require_package("openvino", "openvino")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about checks of shapes
            graph = openvino.convert_model(flat, example_input=tuple(asked[0].values()))
        if len(graph.inputs) != len(asked[0]):
            raise HastenError(f"the graph takes {len(graph.inputs)} inputs, the network {', '.join(asked[0])}")
        for port, (name, value) in zip(graph.inputs, asked[0].items()):
            port.get_tensor().set_names({name})
            port.get_node().set_partial_shape(openvino.PartialShape([-1, *value.shape[1:]]))
            port.get_node().set_friendly_name(name)
        graph.outputs[0].get_tensor().set_names({"raw"})
        graph.validate_nodes_and_infer_types()
        if precision == "int8":
            graph = quantize_openvino(graph, asked, keep)
        openvino.save_model(graph, str(file), compress_to_fp16=precision == "fp16")

    return export_network(OpenVinoNet, model, path, precision, n, seed, write)


def quantize_openvino(graph: Any, asked: list[NetworkInputs], keep: tuple[str, ...] = ()) -> Any:
    """The graph on 8-bit integers, with the ranges of activations over these calls."""
    nncf = require_package("nncf", "openvino")
    chosen = asked[:: -(-len(asked) // CALLS)]
    data = nncf.Dataset([[value.numpy() for value in inputs.values()] for inputs in chosen])
    left = nncf.IgnoredScope(
        names=float_operations(graph), types=["Add", "Multiply"], patterns=list(keep), validate=False
    )
    log = logging.getLogger("nncf")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where its bars belong
            return nncf.quantize(
                graph, data, subset_size=len(chosen), preset=nncf.QuantizationPreset.MIXED, ignored_scope=left
            )
    finally:
        log.setLevel(before)


def float_operations(graph: Any) -> list[str]:
    """The names of the operations that stay in floating point, for little of the time is spent there.

    The first and the last convolution; and what does not depend on the image, up to the matrix products that tell it to
    each block: a time of 8 bits before sines of many periods would be another time.
    """
    ops = graph.get_ordered_ops()
    after = {op.get_friendly_name(): [t.get_node() for o in op.outputs() for t in o.get_target_inputs()] for op in ops}

    def reached(starts: list[Any], but: set[str] = frozenset()) -> set[str]:  # type: ignore[assignment]
        found: set[str] = set()
        while starts:
            op = starts.pop()
            if (name := op.get_friendly_name()) not in found and name not in but:
                found.add(name)
                starts += after[name]
        return found

    image, *told = [port.get_node() for port in graph.inputs]
    aside = reached(told, but=reached([image]))
    leads: set[str] = set()  # to another matrix product aside
    for op in reversed(ops):
        following = [one for one in after[op.get_friendly_name()] if one.get_friendly_name() in aside]
        if any(one.get_type_name() == "MatMul" or one.get_friendly_name() in leads for one in following):
            leads.add(op.get_friendly_name())
    convolutions = [op.get_friendly_name() for op in ops if op.get_type_name() == "Convolution"]
    no = ("MatMul", "Parameter", "Result")
    light = {op.get_friendly_name() for op in ops if op.get_type_name() not in no}
    inputs = {port.get_node().get_friendly_name() for port in graph.inputs}
    return sorted({*(aside & (leads | light) - inputs), *convolutions[:1], *convolutions[-1:]})
