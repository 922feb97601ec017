"""Common parts of the exporters: the network as a plain function, its sample inputs, and the exported network."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BadInput, HastenError, nearest
from ..files import describe_contents, holds_lock, sha256
from ..nets.prequantized import check_original_weights
from ..nets.quantized import layers

if TYPE_CHECKING:
    from ..model.model import Model

__all__ = ["ExportedNetwork", "FlatNetwork", "NetworkInputs", "export_network", "require_package"]

NetworkInputs = dict[str, Tensor]  # of one evaluation: x (B, *S), time (B,), and the conditions, each (B, ...)
PRECISIONS = ("fp32", "fp16", "int8")
CHECK_IMAGES = 2  # sampled to compare the exported network with the original


def require_package(package: str, extra: str) -> Any:
    """Import a package.

    Args:
        package: its name.
        extra: the extra of hasten that installs it.

    Raises:
        BadInput: where it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise BadInput(f"{extra} networks need {e.name or package}: pip install 'hasten[{extra}]'") from e


class FlatNetwork(nn.Module):
    """A network as a function of tensors alone: `(x, time, *conditions)`, the conditions in the order of `names`."""

    def __init__(self, net: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.net, self.names = net, names

    def forward(self, x: Tensor, time: Tensor, *conditions: Tensor) -> Tensor:
        """The raw output (B, *S)."""
        return self.net(x, time, **dict(zip(self.names, conditions)))


class ExportedNetwork(nn.Module):
    """A network whose graph is in files and run by another library, `(B, *S), (B,), ... -> (B, *S)` float32.

    It has no layers of its own, only two tensors: `place`, whose device is that of the output, and `digests`
    (files, 32) uint8, the sha256 of its files, by which a model folder is checked.

    Args:
        files: their names in the model folder, the graph first.
        inputs: the dtype of each condition, by name.
        shape: S of the sample.
        precision: of the weights, "fp32", "fp16" or "int8".
        settings: attributes of the original network: channels, classes, null_label, guidance_range, step_counts, ...
            They are part of `config`.

    Raises:
        BadInput: where `files` are not plain names.
    """

    runs_elsewhere: ClassVar[bool] = True  # nothing to compile and no layers to swap
    kind: ClassVar[str] = ""

    def __init__(
        self, files: list[str], inputs: dict[str, str], shape: list[int], precision: str = "fp32", **settings: Any
    ) -> None:
        super().__init__()
        if not files or any(Path(name).name != name for name in files):
            raise BadInput(f"an exported network needs the names of its files, found {files!r}")
        self.config: dict[str, Any] = {
            "files": list(files),
            "inputs": dict(inputs),
            "shape": list(shape),
            "precision": precision,
            **settings,
        }
        self.null_label = settings.get("null_label")
        span, counts = settings.get("guidance_range"), settings.get("step_counts")
        self.guidance_range = None if span is None else (float(span[0]), float(span[1]))
        self.step_counts = None if counts is None else tuple(int(count) for count in counts)
        for name in ("source_channels", "source_factor", "multiple"):
            if name in settings:
                setattr(self, name, int(settings[name]))
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.register_buffer("digests", torch.zeros(len(files), 32, dtype=torch.uint8))
        self.folder: Path | None = None
        self.sessions: dict[Any, Any] = {}

    def adopt(self, folder: Path) -> ExportedNetwork:
        """Use the files of a folder, whatever their hashes, which become the expected ones."""
        self.folder, self.sessions = folder, {}
        digests = [list(bytes.fromhex(sha256(folder / name))) for name in self.config["files"]]
        self.digests = torch.tensor(digests, dtype=torch.uint8, device=self.place.device)
        return self

    def open_files(self, folder: Path) -> None:
        """Use the files of a model folder.

        Raises:
            BadInput: unless they are those that it was saved with.
        """
        for name, digest in zip(self.config["files"], self.digests.cpu().tolist()):
            if not (folder / name).is_file():
                raise BadInput(f"{folder / name} is missing: model.json names it")
            if (present := sha256(folder / name)) != bytes(digest).hex():
                expected = bytes(digest).hex()[:12]
                raise BadInput(f"{folder / name} is not the file that was saved: sha256 {present[:12]}, not {expected}")
        self.folder, self.sessions = folder, {}

    def write_files(self, folder: Path) -> None:
        """Copy the files into a model folder that is being written."""
        for name in self.config["files"]:
            shutil.copyfile(self.graph().parent / name, folder / name)

    def graph(self) -> Path:
        """The file of the graph.

        Raises:
            BadInput: where the network has none yet.
        """
        if self.folder is None:
            raise BadInput(f"this {type(self).__name__} has no files yet: load the model's folder")
        return self.folder / self.config["files"][0]

    def forward(self, x: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        """Evaluate the graph.

        Args:
            x: (B, *S).
            time: (B,).
            conditions: each (B, ...); those that are None are ignored.

        Returns:
            The raw output (B, *S), float32, on the device of `x`.

        Raises:
            BadInput: for a sample of another shape, for missing or unknown conditions, and where `x` requires a
                gradient, which the graph does not have.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise BadInput("an exported network has no gradient: use the model that it was made from")
        if list(x.shape[1:]) != self.config["shape"]:
            raise BadInput(f"this network was exported for samples {self.config['shape']}, found {list(x.shape[1:])}")
        conditions = {key: value for key, value in conditions.items() if value is not None}
        if self.null_label is not None and "label" in self.config["inputs"] and "label" not in conditions:
            conditions["label"] = torch.full((len(x),), self.null_label)
        if conditions.keys() != self.config["inputs"].keys():
            takes = ", ".join(self.config["inputs"]) or "no conditions"
            raise BadInput(f"this network was exported with {takes}, found {', '.join(conditions) or 'none'}")
        arrays = [array(x, "float32"), array(time, "float32")]
        arrays += [array(conditions[key], dtype) for key, dtype in self.config["inputs"].items()]
        return torch.from_numpy(self.run(arrays, x)).to(x.device)

    def run(self, arrays: list[np.ndarray], x: Tensor) -> np.ndarray:
        """Run the graph.

        Args:
            arrays: its inputs in order.
            x: the sample, whose device and autocast state choose the session.
        """
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sessions": {}}  # sessions cannot be copied, and are created again


def array(value: Tensor, dtype: str) -> np.ndarray:
    """A tensor as a contiguous array of this dtype."""
    return value.detach().to("cpu", getattr(torch, dtype)).contiguous().numpy()


class _EnoughInputs(Exception):
    """Ends a sampling once enough inputs are recorded."""


def record_inputs(model: Model, n: int, seed: int, evaluations: int | None = None) -> list[NetworkInputs]:
    """The inputs of the network while n images are sampled with the model's recommended method.

    Args:
        model: to sample.
        n: images.
        seed: of the sampling.
        evaluations: stop after so many; None: record all.

    Returns:
        One entry per evaluation, on the CPU.

    Raises:
        BadInput: where a condition has no batch dimension.
    """
    inputs: list[NetworkInputs] = []

    def hook(_net: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        x, time = positional
        inputs.append({"x": x, "time": time, **{key: value for key, value in named.items() if value is not None}})
        if evaluations is not None and len(inputs) >= evaluations:
            raise _EnoughInputs

    handle = model.denoiser.net.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with contextlib.suppress(_EnoughInputs):
            model.sample(n, seed=seed, batch_size=n, images=recorded_sources(model, n))
    finally:
        handle.remove()
    for key, value in inputs[0].items():
        if not (isinstance(value, Tensor) and value.ndim and len(value) == len(inputs[0]["x"])):
            raise BadInput(f"{model.name} gives its network {key}, which has no entry for each sample: not exported")
    return [{key: value.detach().cpu() for key, value in each.items()} for each in inputs]


def recorded_sources(model: Model, n: int) -> Tensor | None:
    """The source images of n samples; None for a model that reads none.

    Where it has no calibration sources, noise: the graph is the same, and is compared on it.
    """
    shape = model.source_shape
    if shape is None or not model.denoiser.source_channels:
        return None
    sources = model.calibration_sources
    if sources is None:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(n, *shape, generator=generator) * 2 - 1
    return sources[torch.arange(n) % len(sources)]


def exported_config(net: nn.Module) -> dict[str, Any]:
    """The attributes of a network that its exported form has too, as keyword arguments of `ExportedNetwork`."""
    own = not type(net).__module__.startswith("hasten.")  # "channels" may mean anything there
    config: Any = {} if own else getattr(net, "config", {})
    settings = {key: config[key] for key in ("channels", "classes") if key in config}
    for key in ("null_label", "guidance_range", "step_counts", "source_channels", "source_factor", "multiple"):
        value = getattr(net, key, None)
        settings |= {} if value is None else {key: list(value) if isinstance(value, tuple) else value}
    return settings


def export_error(net: nn.Module, other: nn.Module, evaluations: list[NetworkInputs]) -> float:
    """The relative error `||other - net|| / ||net||` over all these evaluations."""
    difference = norm = 0.0
    for inputs in evaluations:
        inputs = dict(inputs)
        x, time = inputs.pop("x"), inputs.pop("time")
        truth = net(x, time, **inputs).double()
        difference += float((other(x, time, **inputs).double() - truth).square().sum())
        norm += float(truth.square().sum())
    return (difference / max(norm, 1e-300)) ** 0.5


@contextlib.contextmanager
def one_line_errors(net: nn.Module) -> Iterator[None]:
    """Shorten the errors of the block, of which exporters print pages, to a HastenError of one line."""
    try:
        yield
    except HastenError:
        raise
    except Exception as e:
        first = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise HastenError(f"{type(net).__name__} cannot be exported: {type(e).__name__}: {first[:300]}") from e


def check_exportable(model: Model, path: Path, precision: str) -> None:
    """Refuse what cannot be exported, before any work.

    Raises:
        BadInput: with the reason.
    """
    from ..model.sources import refuse_process
    from ..storage.model_folder import check_savable

    refuse_process(model, "exporting", bridges_only=True, sources=True)
    check_savable(model, network=False)
    if precision not in PRECISIONS:
        raise BadInput(f"cannot export in {precision!r}: {nearest(precision, PRECISIONS)}")
    if model.card.get("pipeline"):
        raise BadInput(
            f"{model.name} is a pipeline of diffusers, and an exported model's folder cannot hold its prompts and "
            "decoder: export pipelines with optimum (optimum-cli export onnx)"
        )
    if getattr(model.denoiser.net, "runs_elsewhere", False):
        raise BadInput(f"{model.name} is exported already: export the model that it was made from")
    if next(layers(model.denoiser.net), None) is not None:
        raise BadInput(
            f"{model.name} has integer layers, which no exporter knows: export the model that it was made from"
        )
    check_original_weights(model.denoiser.net, f"{model.name} cannot be exported", "export the model it was made from")
    if path.suffix in (".onnx", ".xml", ".bin") or path.is_file():
        raise BadInput(f"{path} must be a folder, for model.json beside the graph: try {path.with_suffix('')}")


def previous_export(kind: type[ExportedNetwork], model: Model, path: Path, precision: str) -> dict[str, Any]:
    """The record of the same export in the folder, empty where the folder is.

    Raises:
        BadInput: where the folder holds anything else.
    """
    record: dict[str, Any] = {}
    if present := describe_contents(path):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = dict(json.loads((path / "model.json").read_text(encoding="utf-8"))["card"]["exported"])
        if (record.get("to"), record.get("precision"), record.get("of")) != (kind.kind, precision, model.sha256):
            raise BadInput(f"{path} holds {present} already, and not this export: choose another folder, or remove it")
    return record


@holds_lock("path")
def export_network(
    kind: type[ExportedNetwork],
    model: Model,
    path: str | Path,
    precision: str,
    n: int,
    seed: int,
    write: Callable[[FlatNetwork, list[NetworkInputs], Path], None],
    **settings: Any,
) -> Model:
    """Export the network of a model, check it, and save the model with it.

    Args:
        kind: class of the exported network.
        model: the original.
        path: folder to write.
        precision: of the weights.
        n: images sampled to calibrate int8.
        seed: of their sampling.
        write: `write(flat, inputs, file)` writes the graph of `flat` into `file`, and other files beside it. `inputs`
            are those of n samplings for int8, else of one evaluation.
        settings: further entries of the exported network's config.

    Returns:
        The model, with its network loaded from the folder.

    Raises:
        BadInput: for what cannot be exported.
        HastenError: where the export fails, or the exported network has another output.
    """
    path, denoiser, net = Path(path), model.denoiser, model.denoiser.net
    check_exportable(model, path, precision)
    before = previous_export(kind, model, path, precision)
    if next(net.parameters()).device.type != "cpu" or net.training:
        net = copy.deepcopy(net).cpu().eval()
    model = replace(model, denoiser=denoiser.replace(net=net))
    int8 = precision == "int8"
    if int8 and model.denoiser.source_channels and model.calibration_sources is None:
        raise BadInput(f"{model.name} reads a source image: give --data, from which those that calibrate int8 are made")
    inputs = record_inputs(model, n, seed) if int8 else record_inputs(model, CHECK_IMAGES, seed, evaluations=1)
    names = tuple(key for key in inputs[0] if key not in ("x", "time"))
    dtypes = {key: str(inputs[0][key].dtype).removeprefix("torch.") for key in names}
    with tempfile.TemporaryDirectory(prefix="hasten-") as scratch:
        own = f"-{uuid.uuid4().hex[:8]}" if before else ""  # beside the files of the export that it replaces
        first = Path(scratch) / f"network{own}{'.xml' if kind.kind == 'openvino' else '.onnx'}"
        with one_line_errors(net), torch.no_grad():
            write(FlatNetwork(net, names), inputs, first)
        files = [first.name, *sorted(file.name for file in Path(scratch).iterdir() if file != first)]
        network = kind(files, dtypes, list(model.shape), precision, **exported_config(net), **settings)
        network.adopt(Path(scratch))
        with torch.no_grad():
            error = export_error(net, network, record_inputs(model, CHECK_IMAGES, seed + n) if int8 else inputs)
            if not error < 1:  # NaN too
                raise HastenError(f"the exported network has another output: relative error {error:.3g}, not written")
        size = sum((Path(scratch) / name).stat().st_size for name in files)
        record = {"to": kind.kind, "precision": precision, "error": error, "bytes": size, "of": model.sha256}
        record |= {"calibration": {"n": n, "seed": seed}} if int8 else {}
        result = replace(
            model,
            denoiser=denoiser.replace(net=network).eval().requires_grad_(False),
            name=f"{model.name}-{kind.kind}-{precision}",
            card={**model.card, "exported": record},
        )
        result.save(path)
    network.open_files(path)
    return result
