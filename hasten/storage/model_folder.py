"""Model folders: model.json, weights.safetensors, and optional plans, statistics and parts."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.model_like import HasFiles, ModelLike
from ..denoiser import Denoiser
from ..errors import BadInput
from ..files import locked, remove_leftovers, temporary_path
from ..nets.quantized import layers
from ..plan.table import Plan
from ..predictions import prediction_from
from ..schedules.serialize import schedule_from_dict
from ..utils.finite import check_finite
from .atomic import replace_files
from .checks import check_reopens
from .network_files import WEIGHTS, write_network, write_pipeline
from .weights import (
    describe_network,
    is_diffusers,
    is_hasten_network,
    load_weights,
    network_from_description,
    save_refusal,
    sha256,
    write_weights,
)

SCHEMA = 1
WAIT = 30.0  # seconds that a save waits for another one into the same folder
DESCRIPTION, PLAN, STATISTICS = "model.json", "plan.json", "statistics.safetensors"
SAME_NAMES = ("name", "codec", "sampler", "times", "steps", "guidance_scale", "card")  # in model.json and in Model


def save(model: ModelLike, folder: Path, half: bool = False, components_from: str | Path | None = None) -> Path:
    """Write a model folder.

    Args:
        model: to save; its `sha256` is set.
        folder: see `Model.save`.
        half: floating-point weights as float16.
        components_from: see `Model.save`.

    Returns:
        The folder.

    Raises:
        BadInput: where the model cannot be saved or the folder not be written.
    """
    as_pipeline = check_savable(model)
    if components_from is not None:
        if not as_pipeline:
            raise BadInput(f"components_from={components_from}: {model.name} is not saved as the folder of a pipeline")
        from ..adapters.diffusers.shared_components import check_base

        check_base(components_from)
    try:
        with locked(folder, wait=WAIT):
            remove_leftovers(folder.parent, folder.name)  # of earlier versions
            return write_model(model, folder, half, as_pipeline, components_from)
    except OSError as e:
        raise BadInput(f"cannot save the model in {folder}: {e.strerror or e}") from e


def write_model(
    model: ModelLike, folder: Path, half: bool, as_pipeline: bool, components_from: str | Path | None
) -> Path:
    """Write all files of a model into a temporary folder, then replace those of `folder` atomically."""
    scratch = temporary_path(folder / "model")
    try:
        scratch.mkdir()
        if as_pipeline:
            overrides = write_pipeline(model, scratch, components_from, folder)
        else:
            overrides = write_network(model, scratch, half)
        description = model_description(model) | overrides
        if model.plan is not None:
            (scratch / PLAN).write_text(model.plan.to_json())
        for name, plan in model.plans.items():
            (scratch / "plans").mkdir(exist_ok=True)
            (scratch / description["plans"][name]).write_text(plan.to_json())
        if model.statistics:
            write_tensors(model.statistics, scratch / STATISTICS)
            description["statistics"]["sha256"] = sha256(scratch / STATISTICS)
        for name, net in model.parts.items():
            entry = description["parts"][name]
            (scratch / "parts").mkdir(exist_ok=True)
            write_weights(net, scratch / entry["file"], half)
            entry["sha256"] = sha256(scratch / entry["file"])
        replace_files(scratch, folder, description)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def check_savable(model: ModelLike, network: bool = True, integers: bool = False) -> bool:
    """Refuse a model that could not be saved, before any work is done on it.

    Args:
        model: to save.
        network: its network stays of its kind; False: it will be saved with one that diffusers cannot express (integer
            layers, an exported graph, further inputs).
        integers: these are integer layers, which are saved with the other components of a pipeline.

    Returns:
        Whether it is saved as the folder of a pipeline.

    Raises:
        BadInput: with the reason and what would work.
    """
    net = model.denoiser.net
    if is_diffusers(net) and model.pipeline is not None:
        from ..adapters.diffusers.saving import fits_pipeline

        if fits_pipeline(model, network):
            if why := save_refusal(net):
                raise BadInput(f"{model.name} cannot be saved: {why}")
            return True
    integers = integers or next(layers(net), None) is not None
    if model.conditioning is not None and not (integers and model.pipeline is not None):
        raise BadInput(
            f"{model.name} takes prompts: its network can only be saved in its pipeline's folder, and diffusers has no "
            "place there for exported graphs or further inputs: use them within a program"
        )
    denoiser = model.denoiser if isinstance(model.denoiser, Denoiser) else None
    check_reopens(model.name, net, denoiser, tuple(model.shape), model.classes is not None)
    if model.decoder is not None and not hasattr(getattr(model.decoder, "vae", None), "save_pretrained"):
        raise BadInput(f"{model.name} cannot be saved: its decoder is no autoencoder of diffusers")
    for name, part in model.parts.items():
        if why := save_refusal(part):
            raise BadInput(f"{model.name} cannot be saved with its part {name}: {why}")
    return False


def model_description(model: ModelLike) -> dict[str, Any]:
    """The contents of model.json, without the hashes of statistics and parts."""
    net, denoiser = model.denoiser.net, model.denoiser
    description = {
        "schema": SCHEMA,
        "name": model.name,
        "net": describe_network(net),
        "schedule": denoiser.schedule.to_dict(),
        "prediction": denoiser.prediction.to_dict(),
        "clock": denoiser.clock,
        "shape": list(model.shape),
        "classes": None if model.classes is None else list(model.classes),
        "null_label": denoiser.null_label,
        "codec": model.codec,
        "sampler": model.sampler,
        "times": model.times,
        "steps": model.steps,
        "guidance_scale": model.guidance_scale,
        "plan": None if model.plan is None else PLAN,
        "weights": {"file": WEIGHTS, "sha256": model.sha256},
        "card": model.card,
    }
    if type(denoiser).__name__ == "FlowDenoiser":
        description["flow_clock"] = True  # the time input of the network is sigma, not t
    if denoiser.guidance_range is not None:
        description["guidance_range"] = list(denoiser.guidance_range)
    for name in ("start", "residual_std"):
        if getattr(model, name, None) is not None:
            description[name] = getattr(model, name)
    if model.plans:
        description["plans"] = {name: f"plans/{check_file_name(name)}.json" for name in sorted(model.plans)}
    if model.statistics:
        description["statistics"] = {"file": STATISTICS, "names": sorted(model.statistics)}
    if model.parts:
        description["parts"] = {
            name: {**describe_network(part), "file": f"parts/{check_file_name(name)}.safetensors"}
            for name, part in sorted(model.parts.items())
        }
    return description


def check_file_name(name: str) -> str:
    """The name, which must be usable as a file name."""
    if not name or not all(letter.isalnum() or letter in "-_." for letter in name) or name.startswith("."):
        raise BadInput(f"{name!r} cannot name a file: use letters, digits, '-', '_' and '.'")
    return name


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write tensors as safetensors in their own precision."""
    from safetensors.torch import save as written

    file.write_bytes(written({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}))


def read_model(
    folder: Path,
    networks: Sequence[type] = (),
    trust_code: bool = False,
    open_base: Callable[[Path], ModelLike] | None = None,
) -> dict[str, Any]:
    """Read and check a model folder; where another process saves a new model there meanwhile, that one is read.

    Args:
        folder: of the model.
        networks: see `hasten.load`.
        trust_code: see `hasten.load`.
        open_base: opens the folder of a pipeline as a model; needed where model.json lies beside a pipeline.

    Returns:
        The arguments of `Model`.

    Raises:
        BadInput: where a file is missing, damaged or does not fit.
    """
    for attempt in range(10):
        with contextlib.ExitStack() as stack:
            if attempt > 2:  # it is being saved repeatedly: read between two saves
                with contextlib.suppress(BadInput, OSError):  # no permission to write the lock
                    stack.enter_context(locked(folder, wait=WAIT / 10))
            try:
                text = (folder / DESCRIPTION).read_text(encoding="utf-8")
            except (OSError, ValueError) as e:
                raise BadInput(f"cannot read {folder / DESCRIPTION}: {e}") from e
            error = fields = None
            try:
                fields = read_fields(folder, text, networks, trust_code, open_base)
            except (BadInput, OSError, RuntimeError) as e:  # RuntimeError: torch, where a file is gone
                error = e
            with contextlib.suppress(OSError, ValueError):
                if (folder / DESCRIPTION).read_text(encoding="utf-8") != text:
                    continue  # what was read may be of both models
            if error is not None:
                raise error
            assert fields is not None
            return fields
    raise BadInput(f"cannot read {folder / DESCRIPTION}: it changes all the time")


def read_fields(
    folder: Path,
    text: str,
    networks: Sequence[type],
    trust_code: bool,
    open_base: Callable[[Path], ModelLike] | None = None,
) -> dict[str, Any]:
    """The arguments of `Model` for the text of a model.json."""
    try:
        description = json.loads(text)
    except ValueError as e:
        raise BadInput(f"cannot read {folder / DESCRIPTION}: {e}") from e
    if not isinstance(description, dict) or description.get("schema") != SCHEMA:
        schema = description.get("schema") if isinstance(description, dict) else type(description).__name__
        raise BadInput(f"{folder / DESCRIPTION} has schema {schema!r}, this version of hasten reads {SCHEMA}")
    if "pipeline" in description and "schedule" not in description:
        raise BadInput(f"{folder} holds a quantised pipeline of diffusers: open it with hasten.open_quantized")
    try:
        base = None
        if "slot" in description["net"]:
            if open_base is None:
                raise BadInput(f"{folder} is the folder of a pipeline: open it with hasten.load")
            check_pipeline_weights(folder, description)
            base = open_base(folder)
        net = network_from_description(description["net"], networks, trust_code) if base is None else base.denoiser.net
        denoiser = denoiser_of(net, description)
        denoiser.null_label = description["null_label"]  # None also where the network's row for it was never trained
        entries = description.get("parts") or {}
        fields = dict(
            denoiser=denoiser,
            shape=tuple(description["shape"]),
            classes=None if description["classes"] is None else tuple(description["classes"]),
            plan=plan_in(folder, description["plan"]) if description.get("plan") else None,
            plans={name: plan_in(folder, file) for name, file in (description.get("plans") or {}).items()},
            statistics=statistics_in(folder, description.get("statistics")),
            parts={name: part_in(folder, entry, networks, trust_code) for name, entry in entries.items()},
            sha256=description["weights"]["sha256"],
            start=description.get("start"),
            residual_std=description.get("residual_std"),
            decoder=decoder_in(folder, description) if base is None else base.decoder,
            **{key: getattr(base, key, None) for key in ("conditioning", "pipeline")},
            **{key: description[key] for key in SAME_NAMES},
        )
        weights = folder / description["weights"]["file"]
        check_shapes(fields)
        if entry := description.get("pipeline"):
            from ..adapters.diffusers.components import components_of_model

            fields |= components_of_model(folder, entry, net, fields["shape"])
    except KeyError as e:
        raise BadInput(f"{folder / DESCRIPTION} lacks {e}") from e
    except BadInput:
        raise
    except (TypeError, ValueError, AttributeError) as e:
        raise BadInput(f"{folder / DESCRIPTION} does not describe a model: {e}") from e
    if base is None:
        load_weights(net, weights, str(description["weights"]["sha256"]))
    if isinstance(net, HasFiles):
        net.open_files(folder)
    denoiser.eval().requires_grad_(False)
    return fields


def denoiser_of(net: torch.nn.Module, description: dict[str, Any]) -> Denoiser:
    """The network with the schedule and prediction of model.json."""
    kind = Denoiser
    if description.get("flow_clock"):
        from ..adapters.diffusers.schedules import FlowDenoiser

        kind = FlowDenoiser
    return kind(
        net,
        schedule_from_dict(description["schedule"]),
        prediction_from(description["prediction"]),
        clock=description["clock"],
        null_label=description["null_label"],
        guidance_range=description.get("guidance_range"),
    )


def check_pipeline_weights(folder: Path, description: dict[str, Any]) -> None:
    """Check that the network's weights in a pipeline's folder are those that model.json names."""
    file = folder / description["weights"]["file"]
    if not file.is_file():
        raise BadInput(f"{file} is missing: model.json names it")
    if (digest := sha256(file)) != (expected := str(description["weights"]["sha256"])):
        raise BadInput(f"{file} is not the file that model.json names: sha256 {digest[:12]}, expected {expected[:12]}")


def decoder_in(folder: Path, description: dict[str, Any]) -> Any:
    """The image decoder of a latent model, None where model.json names none."""
    if not description.get("decoder"):
        return None
    from ..adapters.diffusers.saving import open_decoder

    return open_decoder(folder)


def plan_in(folder: Path, file: str) -> Plan:
    """A plan that model.json names."""
    try:
        return Plan.from_json((folder / file).read_text())
    except OSError as e:
        raise BadInput(f"{folder / file} is missing: model.json names it") from e
    except BadInput as e:
        raise BadInput(f"{folder / file}: {e}") from e


def statistics_in(folder: Path, entry: dict[str, Any] | None) -> dict[str, Tensor]:
    """The statistics that model.json names, float64, after their hash is checked."""
    from safetensors.torch import load_file

    if not entry:
        return {}
    file = folder / entry["file"]
    if not file.is_file():
        raise BadInput(f"{file} is missing: model.json names it")
    if (digest := sha256(file)) != entry["sha256"]:
        raise BadInput(
            f"{file} is not the file that model.json names: sha256 {digest[:12]}, not {entry['sha256'][:12]}"
        )
    tensors = {name: value.to(torch.float64) for name, value in load_file(file).items()}
    check_finite(f"{file}: the statistics", tensors)
    return tensors


def part_in(
    folder: Path, entry: dict[str, Any], networks: Sequence[type] = (), trust_code: bool = False
) -> torch.nn.Module:
    """An auxiliary network that model.json names."""
    net = network_from_description(entry, networks, trust_code)
    load_weights(net, folder / entry["file"], str(entry["sha256"]))
    return net.eval().requires_grad_(False)


def check_shapes(fields: dict[str, Any]) -> None:
    """Check the shape and classes of a model against its network's config, where that has them."""
    name, net, classes = fields["name"], fields["denoiser"].net, fields["classes"] or ()
    shape = fields["shape"]
    config, side = getattr(net, "config", {}), getattr(net, "multiple", 1)
    if not is_hasten_network(net):
        return  # the config of another network may mean anything
    if len(shape) != 3:
        if hasattr(net, "multiple"):
            raise BadInput(f"{name}: samples of shape {shape} do not fit its network, which takes images")
        return
    channels, height, width = shape
    if config.get("channels", channels) != channels or height % side or width % side:
        raise BadInput(
            f"{name}: images of shape {shape} do not fit its network, "
            f"which takes {config.get('channels', channels)} channels and sides that {side} divides"
        )
    if config.get("classes", len(classes)) != len(classes):
        raise BadInput(f"{name} names {len(classes)} classes, its network has {config['classes']}")
