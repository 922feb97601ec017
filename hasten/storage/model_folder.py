"""The folder of a model: model.json, weights.safetensors, and what it has of plans, statistics and parts."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.model_like import ModelLike
from ..denoiser import Denoiser
from ..errors import BadInput
from ..files import locked, remove_leftovers, temporary_path
from ..plan.table import Plan
from ..predictions import prediction_from
from ..schedules.serialize import schedule_from_dict
from ..utils.finite import check_finite
from .atomic import replace_files
from .checks import check_reopens
from .weights import describe_network as network
from .weights import fill, is_diffusers, is_ours, refusal, restored, sha256, store

SCHEMA = 1
WAIT = 30.0  # seconds that a save waits for another one into the same folder
DESCRIPTION, WEIGHTS, PLAN, STATISTICS = "model.json", "weights.safetensors", "plan.json", "statistics.safetensors"


def save(model: ModelLike, folder: Path, half: bool = False) -> Path:
    """Write a model's folder; see `Model.save`."""
    as_pipeline = check_savable(model)
    try:
        with locked(folder, wait=WAIT):
            remove_leftovers(folder.parent, folder.name)  # of versions that wrote there
            return commit(model, folder, half, as_pipeline)
    except OSError as e:
        raise BadInput(f"cannot save the model in {folder}: {e.strerror or e}") from e


def commit(model: ModelLike, folder: Path, half: bool, as_pipeline: bool) -> Path:
    """Write all files of a model into a temporary folder, and exchange those of `folder` for them at once."""
    part = temporary_path(folder / "model")
    try:
        part.mkdir()
        replaced = write_network(model, part, half, as_pipeline)
        told = describe(model) | replaced
        if model.plan is not None:
            (part / PLAN).write_text(model.plan.to_json())
        for name, plan in model.plans.items():
            (part / "plans").mkdir(exist_ok=True)
            (part / told["plans"][name]).write_text(plan.to_json())
        if model.statistics:
            keep(model.statistics, part / STATISTICS)
            told["statistics"]["sha256"] = sha256(part / STATISTICS)
        for name, net in model.parts.items():
            (part / "parts").mkdir(exist_ok=True)
            store(net, part / told["parts"][name]["file"], half)
            told["parts"][name]["sha256"] = sha256(part / told["parts"][name]["file"])
        replace_files(part, folder, told)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def check_savable(model: ModelLike, network: bool = True) -> bool:
    """Refuse a model that could not be saved, before any work is done on it; whether it becomes a pipeline's folder.

    network: it keeps a network of its kind; False: it will be saved with one that diffusers cannot express (integer
    layers, a graph of another library, further inputs).

    Raises BadInput with the reason and what would work.
    """
    net = model.denoiser.net
    if is_diffusers(net) and model.pipeline is not None:
        from ..adapters.diffusers.saving import fits_pipeline

        if fits_pipeline(model, network):
            if why := refusal(net):
                raise BadInput(f"{model.name} cannot be saved: {why}")
            return True
    if model.conditioning is not None:
        raise BadInput(
            f"{model.name} takes prompts: its network can only be saved in its pipeline's folder, and diffusers has no "
            "place there for integer layers, exported graphs or further inputs: use them within a program, as in "
            "hasten.accelerate(pipe, 'quantize:weights=8')"
        )
    kept = model.denoiser if isinstance(model.denoiser, Denoiser) else None
    check_reopens(model.name, net, kept, tuple(model.shape), model.classes is not None)
    if model.decoder is not None and not hasattr(getattr(model.decoder, "vae", None), "save_pretrained"):
        raise BadInput(f"{model.name} cannot be saved: its decoder is no autoencoder of diffusers")
    for name, part in model.parts.items():
        if why := refusal(part):
            raise BadInput(f"{model.name} cannot be saved with its part {name}: {why}")
    return False


def write_network(model: ModelLike, part: Path, half: bool, as_pipeline: bool) -> dict[str, Any]:
    """Write the network's files into the folder `part`; what model.json says otherwise than `describe` does."""
    net = model.denoiser.net
    if as_pipeline:
        from ..adapters.diffusers.saving import save_pipeline

        description = save_pipeline(model, part)
        model.sha256 = sha256(part / description["file"])
        return {"net": description["net"], "weights": {"file": description["file"], "sha256": model.sha256}}
    store(net, part / WEIGHTS, half)
    if hasattr(net, "write_files"):  # one that another library runs, with a graph of its own
        net.write_files(part)
    model.sha256 = sha256(part / WEIGHTS)
    if model.decoder is None:
        return {"weights": {"file": WEIGHTS, "sha256": model.sha256}}
    from ..adapters.diffusers.saving import save_decoder

    save_decoder(model, part)
    return {"decoder": True, "weights": {"file": WEIGHTS, "sha256": model.sha256}}


def describe(model: ModelLike) -> dict[str, Any]:
    """What model.json holds, but for the hashes of the files of statistics and parts."""
    net, denoiser = model.denoiser.net, model.denoiser
    told = {
        "schema": SCHEMA,
        "name": model.name,
        "net": network(net),
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
        told["flow_clock"] = True  # the network is told sigma, not t
    if denoiser.guidance_range is not None:
        told["guidance_range"] = list(denoiser.guidance_range)
    if model.plans:
        told["plans"] = {name: f"plans/{checked(name)}.json" for name in sorted(model.plans)}
    if model.statistics:
        told["statistics"] = {"file": STATISTICS, "names": sorted(model.statistics)}
    if model.parts:
        told["parts"] = {
            name: {**network(part), "file": f"parts/{checked(name)}.safetensors"}
            for name, part in sorted(model.parts.items())
        }
    return told


def checked(name: str) -> str:
    """A name that can be a file's."""
    if not name or not all(letter.isalnum() or letter in "-_." for letter in name) or name.startswith("."):
        raise BadInput(f"{name!r} cannot name a file: use letters, digits, '-', '_' and '.'")
    return name


def keep(tensors: dict[str, Tensor], file: Path) -> None:
    """Write tensors as safetensors in their own precision."""
    from safetensors.torch import save as written

    file.write_bytes(written({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}))


def read(
    folder: Path,
    networks: Sequence[type] = (),
    trust_code: bool = False,
    open_base: Callable[[Path], ModelLike] | None = None,
) -> dict[str, Any]:
    """The arguments of `Model` for the model in a folder, checked part by part. networks, trust_code: see `load`.

    open_base: opens a pipeline's folder as a model; needed where model.json lies beside a pipeline.

    Where another process saves a new model there meanwhile, that one is read.
    """
    for attempt in range(10):
        with contextlib.ExitStack() as stack:
            if attempt > 2:  # it is saved again and again: between two saves
                with contextlib.suppress(BadInput, OSError):  # a folder that only others may write
                    stack.enter_context(locked(folder, wait=WAIT / 10))
            try:
                text = (folder / DESCRIPTION).read_text(encoding="utf-8")
            except (OSError, ValueError) as e:
                raise BadInput(f"cannot read {folder / DESCRIPTION}: {e}") from e
            error = fields = None
            try:
                fields = fields_of(folder, text, networks, trust_code, open_base)
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


def fields_of(
    folder: Path,
    text: str,
    networks: Sequence[type],
    trust_code: bool,
    open_base: Callable[[Path], ModelLike] | None = None,
) -> dict[str, Any]:
    """The arguments of `Model` that the text of a model.json amounts to."""
    try:
        told = json.loads(text)
    except ValueError as e:
        raise BadInput(f"cannot read {folder / DESCRIPTION}: {e}") from e
    if not isinstance(told, dict) or told.get("schema") != SCHEMA:
        found = told.get("schema") if isinstance(told, dict) else type(told).__name__
        raise BadInput(f"{folder / DESCRIPTION} has schema {found!r}, this version of hasten reads {SCHEMA}")
    try:
        base = None
        if "slot" in told["net"]:
            if open_base is None:
                raise BadInput(f"{folder} is the folder of a pipeline: open it with hasten.load")
            check_pipeline_weights(folder, told)
            base = open_base(folder)
        net = restored(told["net"], networks, trust_code) if base is None else base.denoiser.net
        denoiser = denoiser_of(net, told)
        denoiser.null_label = told["null_label"]  # None where the network has a row for it that was never trained
        fields = dict(
            denoiser=denoiser,
            shape=tuple(told["shape"]),
            classes=None if told["classes"] is None else tuple(told["classes"]),
            plan=plan_in(folder, told["plan"]) if told.get("plan") else None,
            plans={name: plan_in(folder, file) for name, file in (told.get("plans") or {}).items()},
            statistics=statistics_in(folder, told.get("statistics")),
            parts={
                name: part_in(folder, part, networks, trust_code) for name, part in (told.get("parts") or {}).items()
            },
            sha256=told["weights"]["sha256"],
            conditioning=None if base is None else base.conditioning,
            decoder=decoder_in(folder, told) if base is None else base.decoder,
            pipeline=None if base is None else base.pipeline,
            **{key: told[key] for key in ("name", "codec", "sampler", "times", "steps", "guidance_scale", "card")},
        )
        weights = folder / told["weights"]["file"]
        fits(fields)
    except KeyError as e:
        raise BadInput(f"{folder / DESCRIPTION} lacks {e}") from e
    except BadInput:
        raise
    except (TypeError, ValueError, AttributeError) as e:
        raise BadInput(f"{folder / DESCRIPTION} does not describe a model: {e}") from e
    if base is None:
        fill(net, weights, str(told["weights"]["sha256"]))
    if hasattr(net, "open_files"):
        net.open_files(folder)
    denoiser.eval().requires_grad_(False)
    return fields


def denoiser_of(net: torch.nn.Module, description: dict[str, Any]) -> Denoiser:
    """The network with its schedule and prediction, of the kind that model.json names."""
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
    """Refuse a pipeline's folder whose network's weights are not those that its model.json names."""
    file = folder / description["weights"]["file"]
    if not file.is_file():
        raise BadInput(f"{file} is missing: model.json names it")
    if (found := sha256(file)) != (expected := str(description["weights"]["sha256"])):
        raise BadInput(f"{file} is not the file that model.json names: sha256 {found[:12]}, expected {expected[:12]}")


def decoder_in(folder: Path, description: dict[str, Any]) -> Any:
    """The image decoder of a model of latents, where model.json names one."""
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


def statistics_in(folder: Path, told: dict[str, Any] | None) -> dict[str, Tensor]:
    """The tensors that model.json names, after their hash is checked."""
    from safetensors.torch import load_file

    if not told:
        return {}
    file = folder / told["file"]
    if not file.is_file():
        raise BadInput(f"{file} is missing: model.json names it")
    if (found := sha256(file)) != told["sha256"]:
        raise BadInput(f"{file} is not the file that model.json names: sha256 {found[:12]}, not {told['sha256'][:12]}")
    tensors = {name: value.to(torch.float64) for name, value in load_file(file).items()}
    check_finite(f"{file}: the statistics", tensors)
    return tensors


def part_in(
    folder: Path, told: dict[str, Any], networks: Sequence[type] = (), trust_code: bool = False
) -> torch.nn.Module:
    """A small network beside the model's own."""
    net = restored(told, networks, trust_code)
    fill(net, folder / told["file"], str(told["sha256"]))
    return net.eval().requires_grad_(False)


def fits(told: dict[str, Any]) -> None:
    """Refuse a shape or classes that the network was not built for, where the network tells."""
    name, net, classes = told["name"], told["denoiser"].net, told["classes"] or ()
    config, side = getattr(net, "config", {}), getattr(net, "multiple", 1)
    if not is_ours(net):
        return  # what another network's config means is not known
    if len(told["shape"]) != 3:
        if hasattr(net, "multiple"):
            raise BadInput(f"{name}: samples of shape {told['shape']} do not fit its network, which takes images")
        return
    channels, height, width = told["shape"]
    if config.get("channels", channels) != channels or height % side or width % side:
        raise BadInput(
            f"{name}: images of shape {told['shape']} do not fit its network, "
            f"which takes {config.get('channels', channels)} channels and sides that {side} divides"
        )
    if config.get("classes", len(classes)) != len(classes):
        raise BadInput(f"{name} names {len(classes)} classes, its network has {config['classes']}")
