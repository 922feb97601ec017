"""Networks exported to OpenVINO graphs and run by OpenVINO."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Collection
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

GRAPHS = 4  # batch sizes that get a graph of their own, about a tenth faster than one for any batch
CALIBRATION_INPUTS = 64  # at most
SETTINGS = {"PERFORMANCE_HINT": "LATENCY"}
# Snippets make an int8 graph of fixed batch a third faster, but with them OpenVINO 2026.4 crashes the process on some
# float32 attention (of 7 x 7 and 4 x 4 tokens): such a graph is run in a subprocess first.
SNIPPETS = "SNIPPETS_MODE"
TRIAL = """
import sys, json, numpy, openvino
path, batch, settings = json.loads(sys.argv[1])
graph = openvino.Core().read_model(path)
graph.reshape({k: [batch, *list(one.partial_shape)[1:]] for k, one in enumerate(graph.inputs)})
inputs = [numpy.zeros(list(one.shape), one.element_type.to_dtype()) for one in graph.inputs]
openvino.Core().compile_model(graph, "CPU", settings).create_infer_request().infer(inputs)
"""
TRIAL_SECONDS = 300  # limit of the subprocess


class OpenVinoNet(ExportedNetwork):
    """A network in the files network.xml and network.bin, run by OpenVINO on the CPU with torch's number of threads.

    Under bfloat16 autocast (precision bf16) what is not int8 is computed in bfloat16, else in float32, whatever the
    precision of the weights. A graph is compiled for each of the first few batch sizes, which takes seconds once; all
    others share a graph for any batch size.
    """

    kind = "openvino"

    def run(self, arrays: list[np.ndarray], x: Tensor) -> np.ndarray:
        """Run the graph; it is compiled at the first call for a batch size, dtype and number of threads."""
        device = x.device.type
        half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        settings = "bf16" if half else "f32", torch.get_num_threads()
        known = [size for *own, size in self.sessions if tuple(own) == settings and size]
        batch = len(arrays[0]) if len(arrays[0]) in known or len(known) < GRAPHS else 0
        key = (*settings, batch)
        if key not in self.sessions:
            self.sessions[key] = self._compiled(*key).create_infer_request()
        return self.sessions[key].infer(arrays, share_inputs=True)[0]

    def _compiled(self, format: str, threads: int, batch: int) -> Any:
        """The graph compiled for these settings; batch 0: any batch size."""
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
    """Whether a graph of this batch size compiles and runs, tried in a subprocess."""
    command = [sys.executable, "-c", TRIAL, json.dumps([path, batch, settings])]
    try:
        return subprocess.run(command, capture_output=True, timeout=TRIAL_SECONDS).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def export(
    model: Model,
    path: str | Path,
    precision: str = "fp32",
    n: int = 8,
    seed: int = FIRST_SEED,
    exclude: tuple[str, ...] = (),
    keep: tuple[str, ...] = (),
) -> Model:
    """Write a model folder with its network as network.xml and network.bin.

    Args:
        model: to export.
        path: folder to write.
        precision: "fp32", exact; "fp16": weights in half precision, half the file, computed in float32; "int8":
            weights per channel and activations on 8-bit integers, by NNCF's post-training quantisation. To compute in
            bfloat16 is not a property of the file but of sampling (precision bf16).
        n: images sampled, with the recommended method, to calibrate int8; at most 64 evaluations are used, evenly
            spread over the steps.
        seed: of their sampling.
        exclude: regular expressions: layers whose names match stay in floating point.
        keep: deprecated, the same as `exclude`.

    Returns:
        The exported model, which samples as any other.

    Raises:
        BadInput: for what cannot be exported, and for a missing package.
        HastenError: where the network's graph cannot be converted.

    References:
        https://docs.openvino.ai, https://github.com/openvinotoolkit/nncf
    """
    if keep:
        warnings.warn("openvino.export(keep=) is now exclude=", DeprecationWarning, stacklevel=2)
        exclude = (*exclude, *keep)
    require_package("openvino", "openvino")
    if precision == "int8":
        require_package("nncf", "openvino")

    def write(flat: FlatNetwork, inputs: list[NetworkInputs], file: Path) -> None:
        openvino = require_package("openvino", "openvino")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about shape checks
            graph = openvino.convert_model(flat, example_input=tuple(inputs[0].values()))
        if len(graph.inputs) != len(inputs[0]):
            raise HastenError(f"the graph takes {len(graph.inputs)} inputs, the network {', '.join(inputs[0])}")
        for port, (name, value) in zip(graph.inputs, inputs[0].items()):
            port.get_tensor().set_names({name})
            port.get_node().set_partial_shape(openvino.PartialShape([-1, *value.shape[1:]]))
            port.get_node().set_friendly_name(name)
        graph.outputs[0].get_tensor().set_names({"raw"})
        graph.validate_nodes_and_infer_types()
        if precision == "int8":
            graph = quantize_openvino(graph, inputs, exclude)
        openvino.save_model(graph, str(file), compress_to_fp16=precision == "fp16")

    return export_network(OpenVinoNet, model, path, precision, n, seed, write)


def quantize_openvino(graph: Any, inputs: list[NetworkInputs], exclude: tuple[str, ...] = ()) -> Any:
    """The graph on 8-bit integers, with the ranges of activations over the calibration inputs."""
    nncf = require_package("nncf", "openvino")
    subset = inputs[:: -(-len(inputs) // CALIBRATION_INPUTS)]
    data = nncf.Dataset([[value.numpy() for value in each.values()] for each in subset])
    names, kinds = float_operations(graph), ["Add", "Multiply"]
    ignored = nncf.IgnoredScope(names=names, types=kinds, patterns=list(exclude), validate=False)
    log = logging.getLogger("nncf")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # its progress bars
            return nncf.quantize(
                graph, data, subset_size=len(subset), preset=nncf.QuantizationPreset.MIXED, ignored_scope=ignored
            )
    finally:
        log.setLevel(before)


def float_operations(graph: Any) -> list[str]:
    """The names of the operations that stay in floating point, where little of the time is spent.

    These are the first and the last convolution, and what does not depend on the image, up to the matrix products that
    inject it into each block: an 8-bit time before sines of many periods would be another time.
    """
    ops = graph.get_ordered_ops()
    after = {op.get_friendly_name(): [t.get_node() for o in op.outputs() for t in o.get_target_inputs()] for op in ops}

    def descendants(starts: list[Any], but: Collection[str] = ()) -> set[str]:
        names: set[str] = set()
        while starts:
            op = starts.pop()
            if (name := op.get_friendly_name()) not in names and name not in but:
                names.add(name)
                starts += after[name]
        return names

    image, *conditions = [port.get_node() for port in graph.inputs]
    imageless = descendants(conditions, but=descendants([image]))
    leads: set[str] = set()  # to another matrix product that does not depend on the image
    for op in reversed(ops):
        following = [one for one in after[op.get_friendly_name()] if one.get_friendly_name() in imageless]
        if any(one.get_type_name() == "MatMul" or one.get_friendly_name() in leads for one in following):
            leads.add(op.get_friendly_name())
    convolutions = [op.get_friendly_name() for op in ops if op.get_type_name() == "Convolution"]
    no = ("MatMul", "Parameter", "Result")
    light = {op.get_friendly_name() for op in ops if op.get_type_name() not in no}
    inputs = {port.get_node().get_friendly_name() for port in graph.inputs}
    return sorted({*(imageless & (leads | light) - inputs), *convolutions[:1], *convolutions[-1:]})
