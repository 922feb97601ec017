"""What the exporters share: the network as a plain function, what it is asked, and a network that runs elsewhere."""

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
from ..nets.quantized import layers

if TYPE_CHECKING:
    from ..model.model import Model

__all__ = ["Asked", "Exported", "Flat", "exported", "needed"]

Asked = dict[str, Tensor]  # the inputs of a network: x (B, *S), time (B,), and its conditions, each (B, ...)
PRECISIONS = ("fp32", "fp16", "int8")
HELD_OUT = 2  # images on which an exported network is compared with the one it was made from


def needed(package: str, extra: str) -> Any:
    """A package by name. Raises BadInput where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise BadInput(f"{extra} networks need {e.name or package}: pip install 'hasten[{extra}]'") from e


class Flat(nn.Module):
    """A network as a function of tensors alone: `(x, time, *conditions)`, the conditions in the order of `names`."""

    def __init__(self, net: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.net, self.names = net, names

    def forward(self, x: Tensor, time: Tensor, *told: Tensor) -> Tensor:
        return self.net(x, time, **dict(zip(self.names, told)))


class Exported(nn.Module):
    """A network whose graph lies in files and is run by another library, `(B, *S), (B,), ... -> (B, *S)` float32.

    It has no layers of its own: two tensors only, `place`, which says on which device answers are wanted, and
    `digests` (files, 32) uint8, the sha256 of its files, by which a model's folder is checked.

    Args:
        files: their names in the model's folder, the graph first. inputs: the conditions and their dtypes.
        shape: S of the sample. precision: of the weights, "fp32", "fp16" or "int8".
        told: what the network that it was made from says of itself: channels, classes, null_label, guidance_range,
            step_counts, ...; kept in `config`.
    """

    runs_elsewhere: ClassVar[bool] = True  # nothing to compile and no layers to swap
    kind: ClassVar[str] = ""

    def __init__(
        self, files: list[str], inputs: dict[str, str], shape: list[int], precision: str = "fp32", **told: Any
    ) -> None:
        super().__init__()
        if not files or any(Path(name).name != name for name in files):
            raise BadInput(f"an exported network needs the names of its files, found {files!r}")
        self.config: dict[str, Any] = {
            "files": list(files), "inputs": dict(inputs), "shape": list(shape), "precision": precision, **told,
        }  # fmt: skip
        self.null_label = told.get("null_label")
        span, counts = told.get("guidance_range"), told.get("step_counts")
        self.guidance_range = None if span is None else (float(span[0]), float(span[1]))
        self.step_counts = None if counts is None else tuple(int(count) for count in counts)
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.register_buffer("digests", torch.zeros(len(files), 32, dtype=torch.uint8))
        self.folder: Path | None = None
        self.running: dict[Any, Any] = {}

    def adopt(self, folder: Path) -> Exported:
        """Take the files that lie in a folder, whatever they are."""
        self.folder, self.running = folder, {}
        found = [list(bytes.fromhex(sha256(folder / name))) for name in self.config["files"]]
        self.digests = torch.tensor(found, dtype=torch.uint8, device=self.place.device)
        return self

    def open_files(self, folder: Path) -> None:
        """Take the files that lie in a model's folder. Raises BadInput unless they are those that it was saved with."""
        for name, digest in zip(self.config["files"], self.digests.cpu().tolist()):
            if not (folder / name).is_file():
                raise BadInput(f"{folder / name} is missing: model.json names it")
            if (found := sha256(folder / name)) != bytes(digest).hex():
                expected = bytes(digest).hex()[:12]
                raise BadInput(f"{folder / name} is not the file that was saved: sha256 {found[:12]}, not {expected}")
        self.folder, self.running = folder, {}

    def write_files(self, folder: Path) -> None:
        """Copy the files into a model's folder that is being written."""
        for name in self.config["files"]:
            shutil.copyfile(self.graph().parent / name, folder / name)

    def graph(self) -> Path:
        """The file that is run. Raises BadInput where the network has none yet."""
        if self.folder is None:
            raise BadInput(f"this {type(self).__name__} has no files yet: load the model's folder")
        return self.folder / self.config["files"][0]

    def forward(self, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        """The raw output (B, *S), float32, on the device of `x`.

        Raises BadInput for a sample of another shape, for conditions that are missing or not known, and where a
        gradient is wanted: the graph has none.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise BadInput("an exported network has no gradient: use the model that it was made from")
        if list(x.shape[1:]) != self.config["shape"]:
            raise BadInput(f"this network was exported for samples {self.config['shape']}, found {list(x.shape[1:])}")
        told = {key: value for key, value in told.items() if value is not None}
        if self.null_label is not None and "label" in self.config["inputs"] and "label" not in told:
            told["label"] = torch.full((len(x),), self.null_label)
        if told.keys() != self.config["inputs"].keys():
            takes = ", ".join(self.config["inputs"]) or "no conditions"
            raise BadInput(f"this network was exported with {takes}, found {', '.join(told) or 'none'}")
        arrays = [array(x, "float32"), array(time, "float32")]
        arrays += [array(told[key], dtype) for key, dtype in self.config["inputs"].items()]
        return torch.from_numpy(self.run(arrays, x)).to(x.device)

    def run(self, arrays: list[np.ndarray], x: Tensor) -> np.ndarray:
        """The graph's output for its inputs in order; `x` tells the device and the number format that is wanted."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "running": {}}  # what runs it cannot be copied, and is made again


def array(value: Tensor, dtype: str) -> np.ndarray:
    return value.detach().to("cpu", getattr(torch, dtype)).contiguous().numpy()


class _Enough(Exception):
    """Ends a sampling of which enough was heard."""


def heard(model: Model, n: int, seed: int, calls: int | None = None) -> list[Asked]:
    """What the network is asked while n images are sampled in the way that the model recommends, or the first calls."""
    found: list[Asked] = []

    def hook(_net: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        x, time = positional
        found.append({"x": x, "time": time, **{key: value for key, value in named.items() if value is not None}})
        if calls is not None and len(found) >= calls:
            raise _Enough

    handle = model.denoiser.net.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with contextlib.suppress(_Enough):
            model.sample(n, seed=seed, batch_size=n)
    finally:
        handle.remove()
    for key, value in found[0].items():
        if not (isinstance(value, Tensor) and value.ndim and len(value) == len(found[0]["x"])):
            raise BadInput(f"{model.name} gives its network {key}, which has no entry for each sample: not exported")
    return [{key: value.detach().cpu() for key, value in asked.items()} for asked in found]


def told_of(net: nn.Module) -> dict[str, Any]:
    """What an exported network goes on saying of itself."""
    own = not type(net).__module__.startswith("hasten.")  # what "channels" means there is not known
    config = {} if own else getattr(net, "config", {})
    told = {key: config[key] for key in ("channels", "classes") if key in config}
    for key in ("null_label", "guidance_range", "step_counts"):
        value = getattr(net, key, None)
        told |= {} if value is None else {key: list(value) if isinstance(value, tuple) else value}
    return told


def error_of(net: nn.Module, other: nn.Module, asked: list[Asked]) -> float:
    """`||other - net|| / ||net||` over all these calls."""
    wrong = whole = 0.0
    for inputs in asked:
        inputs = dict(inputs)
        x, time = inputs.pop("x"), inputs.pop("time")
        truth = net(x, time, **inputs).double()
        wrong += float((other(x, time, **inputs).double() - truth).square().sum())
        whole += float(truth.square().sum())
    return (wrong / max(whole, 1e-300)) ** 0.5


@contextlib.contextmanager
def tracing(net: nn.Module) -> Iterator[None]:
    """Within the block what goes wrong is told in one line: exporters answer with pages."""
    try:
        yield
    except HastenError:
        raise
    except Exception as e:
        first = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise HastenError(f"{type(net).__name__} cannot be exported: {type(e).__name__}: {first[:300]}") from e


@holds_lock("path")
def exported(
    kind: type[Exported],
    model: Model,
    path: str | Path,
    precision: str,
    n: int,
    seed: int,
    write: Callable[[Flat, list[Asked], Path], None],
    **told: Any,
) -> Model:
    """The model with its network as `kind`, saved in the folder `path` and loaded from it.

    write(flat, asked, file): puts the graph of `flat` into `file`, and other files beside it; `asked` are the calls of
    n samplings for int8, else one call to trace with.
    """
    from ..storage.model_folder import check_savable

    check_savable(model, network=False)
    path, denoiser, net = Path(path), model.denoiser, model.denoiser.net
    if precision not in PRECISIONS:
        raise BadInput(f"cannot export in {precision!r}: {nearest(precision, PRECISIONS)}")
    if model.card.get("pipeline"):
        raise BadInput(
            f"{model.name} is a pipeline of diffusers, and an exported model's folder cannot hold its prompts and "
            "decoder: export pipelines with optimum (optimum-cli export onnx)"
        )
    if getattr(net, "runs_elsewhere", False):
        raise BadInput(f"{model.name} is exported already: export the model that it was made from")
    if next(layers(net), None) is not None:
        raise BadInput(
            f"{model.name} has integer layers, which no exporter knows: export the model that it was made from"
        )
    if path.suffix in (".onnx", ".xml", ".bin") or path.is_file():
        raise BadInput(f"{path} must be a folder, for model.json beside the graph: try {path.with_suffix('')}")
    before: dict[str, Any] = {}
    if found := describe_contents(path):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            before = dict(json.loads((path / "model.json").read_text(encoding="utf-8"))["card"]["exported"])
        if (before.get("to"), before.get("precision"), before.get("of")) != (kind.kind, precision, model.sha256):
            raise BadInput(f"{path} holds {found} already, and not this export: choose another folder, or remove it")
    if next(net.parameters()).device.type != "cpu" or net.training:
        net = copy.deepcopy(net).cpu().eval()
    model = replace(model, denoiser=denoiser.replace(net=net))
    int8 = precision == "int8"
    asked = heard(model, n, seed) if int8 else heard(model, HELD_OUT, seed, calls=1)
    names = tuple(key for key in asked[0] if key not in ("x", "time"))
    inputs = {key: str(asked[0][key].dtype).removeprefix("torch.") for key in names}
    with tempfile.TemporaryDirectory(prefix="hasten-") as scratch:
        own = f"-{uuid.uuid4().hex[:8]}" if before else ""  # beside the files of the export that it replaces
        first = Path(scratch) / f"network{own}{'.xml' if kind.kind == 'openvino' else '.onnx'}"
        with tracing(net), torch.no_grad():
            write(Flat(net, names), asked, first)
        files = [first.name, *sorted(file.name for file in Path(scratch).iterdir() if file != first)]
        made = kind(files, inputs, list(model.shape), precision, **told_of(net), **told).adopt(Path(scratch))
        with torch.no_grad():
            error = error_of(net, made, heard(model, HELD_OUT, seed + n) if int8 else asked)
            if not error < 1:  # NaN too
                raise HastenError(f"the exported network answers otherwise: relative error {error:.3g}, not written")
        size = sum((Path(scratch) / name).stat().st_size for name in files)
        note = {"to": kind.kind, "precision": precision, "error": error, "bytes": size, "of": model.sha256}
        note |= {"calibration": {"n": n, "seed": seed}} if int8 else {}
        result = replace(
            model,
            denoiser=denoiser.replace(net=made).eval().requires_grad_(False),
            name=f"{model.name}-{kind.kind}-{precision}",
            card={**model.card, "exported": note},
        )
        result.save(path)
    made.open_files(path)
    return result
