"""What a training run carries from one step to the next, and how it is kept on disk."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import BadInput, HastenError
from ..files import append_json_line, atomic_open, first_difference, read_json_lines, write_atomic
from ..utils.environment import is_out_of_memory
from . import shards

if TYPE_CHECKING:
    from ..distributed.ranks import Ranks
    from .player import TrainedModule


class State:
    """Players, their averages and optimisers, the number of finished steps, and the seconds they took.

    Random numbers are no part of it: each step's are a function of the seed and the number of the step.

    All processes begin with the weights of the first. shard: divide the players among them; what is written is whole.
    """

    def __init__(self, players: list[TrainedModule], device: torch.device, ranks: Ranks, shard: bool = False) -> None:
        names = [p.name for p in players]
        if not players or len(set(names)) < len(names):
            raise BadInput(f"a run needs players with different names, got {names}")
        self.step, self.seconds, self.device = 0, 0.0, device
        for p in players:
            p.module.to(device).train()
        self.modules: dict[str, nn.Module] = {p.name: p.module for p in players}
        self.emas = {p.name: copy.deepcopy(p.module).requires_grad_(False).eval() for p in players}
        self.undivided: dict[str, nn.Module] = {}
        for module in (*self.modules.values(), *self.emas.values()):
            ranks.broadcast_parameters(module)
        for p in players if shard else ():
            shards.check(p.name, p.module, p.optimiser, ranks)
            self.undivided[p.name] = copy.deepcopy(self.emas[p.name]).cpu()
            shards.divide(p.module, ranks)
            shards.divide(self.emas[p.name], ranks)
        self.optimisers = {p.name: p.optimizer() for p in players}
        self.peaks = {name: [g["lr"] for g in o.param_groups] for name, o in self.optimisers.items()}

    def save(self, path: Path, run: dict[str, Any], ranks: Ranks) -> None:
        """Write the whole checkpoint or none of it. `run`: what a resumed run must have in common with this one.

        Of several processes the first one writes.
        """
        players = {
            name: {
                "module": self.modules[name].state_dict(),
                "ema": self.emas[name].state_dict(),
                "optimiser": self.optimisers[name].state_dict(),
            }
            for name in self.modules
        }
        if self.undivided:
            players = shards.whole(players)
        if not ranks.is_main_process:
            return
        try:
            with atomic_open(path) as file:
                torch.save({"step": self.step, "seconds": self.seconds, "run": run, "players": players}, file)
        except (OSError, RuntimeError) as e:
            if is_out_of_memory(e):
                raise
            raise HastenError(f"cannot write the checkpoint {path}: {e}") from e

    def load(self, path: Path, run: dict[str, Any]) -> None:
        """Go on from the checkpoint `path`. BadInput where it is damaged or belongs to another run."""
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            players, step, seconds = saved["players"], int(saved["step"]), float(saved["seconds"])
        except Exception as e:  # a damaged file makes torch.load raise nearly anything
            raise BadInput(f"cannot read the checkpoint {path} ({type(e).__name__}): remove it to start afresh") from e
        if set(players) != set(self.modules):
            raise BadInput(
                f"{path} trains {', '.join(players)}, this run {', '.join(self.modules)}: write to another folder"
            )
        different = first_difference(saved.get("run", {}), run, missing=False)
        if different is not None:
            key, old, new = different
            raise BadInput(
                f"{path} belongs to a run with {key} {old}, this one has {new}: "
                "ask for the same, write to another folder, or remove it to start afresh"
            )
        try:
            for name, parts in players.items():
                shards.load_module(self.modules[name], parts["module"])
                shards.load_module(self.emas[name], parts["ema"])
                shards.load_optimiser(self.optimisers[name], parts["optimiser"])
        except (RuntimeError, ValueError, KeyError) as e:
            reason = str(e).split("\n")[-1].strip()
            raise BadInput(f"{path} does not fit this network or optimiser ({reason}): write to another folder") from e
        self.step, self.seconds = step, seconds

    def averages(self) -> dict[str, nn.Module]:
        """The averaged modules, each whole."""
        if not self.undivided:
            return self.emas
        return {name: shards.restored(self.undivided[name], shards.whole(ema.state_dict()), self.device)
                for name, ema in self.emas.items()}  # fmt: skip


def save_modules(modules: Mapping[str, nn.Module], path: Path) -> None:
    """Write the modules' tensors in one safetensors file, whole or not at all; `load_modules` reads it."""
    from safetensors.torch import save

    tensors = {
        f"{name}/{key}": value.detach().cpu().contiguous().clone()
        for name, module in modules.items() for key, value in module.state_dict().items()
    }  # fmt: skip
    try:
        write_atomic(path, save(tensors))
    except OSError as e:
        raise HastenError(f"cannot write {path}: {e.strerror or e}") from e


def load_modules(modules: Mapping[str, nn.Module], path: Path) -> None:
    """Fill the modules from a file of `save_modules`. BadInput where it is damaged or holds others."""
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except Exception as e:  # a damaged file makes safetensors raise nearly anything
        raise BadInput(f"cannot read {path} ({type(e).__name__}): remove it to make it again") from e
    for name, module in modules.items():
        mine = {key.partition("/")[2]: value for key, value in tensors.items() if key.partition("/")[0] == name}
        try:
            module.load_state_dict(mine)
        except RuntimeError as e:
            reason = str(e).split("\n")[-1].strip()
            raise BadInput(f"{path} does not fit this run ({reason}): write to another folder") from e


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL log; lines that were cut short are left out."""
    return [line for line in read_json_lines(path) if isinstance(line.get("step"), int)]


def trim_log(path: Path, step: int) -> None:
    """Drop what was logged after `step`, so that a resumed run repeats no line, and lines that were cut short."""
    if not path.is_file():
        return
    if any("step" not in line for line in read_json_lines(path)):
        raise BadInput(f"{path} is no log of a training: write to another folder, or remove it")
    text = "".join(json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step)
    if text.encode() != path.read_bytes():
        with writing(path):
            write_atomic(path, text)


def append_log(path: Path, line: dict[str, Any]) -> None:
    """Add one line."""
    with writing(path):
        append_json_line(path, line)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file it was that cannot be written."""
    try:
        yield
    except OSError as e:
        raise HastenError(f"cannot write {path}: {e.strerror or e}") from e


def saved_run(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run: the settings that `State.load` compares, `step` and `seconds`; {} without one.

    The weights are not read. A damaged file is left to `State.load`.
    """
    with contextlib.suppress(Exception):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {**saved.get("run", {}), "step": int(saved["step"]), "seconds": float(saved["seconds"])}
    return {}
