"""The state of a training run, its checkpoints and its log."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..distributed.ranks import Ranks
from ..errors import BadInput, HastenError
from ..files import append_json_line, atomic_open, first_difference, read_json_lines, write_atomic
from ..utils.environment import is_out_of_memory
from . import shards
from .ema import copy_for_average
from .trained_module import TrainedModule


class TrainingState:
    """The trained modules, their EMA and optimisers, the number of finished steps, and the seconds they took.

    Random numbers are not part of it: those of a step are a function of the seed and the step.

    Args:
        trained: what is trained, with different names. All processes start from the weights of the main process.
        device: where the modules are moved.
        ranks: the processes.
        shard: shard modules, EMA and optimiser states among the processes; checkpoints are written unsharded.

    Raises:
        BadInput: if two names are the same, or a module cannot be sharded.
    """

    def __init__(self, trained: list[TrainedModule], device: torch.device, ranks: Ranks, shard: bool = False) -> None:
        names = [t.name for t in trained]
        if not trained or len(set(names)) < len(names):
            raise BadInput(f"a run needs trained modules with different names, got {names}")
        parameters = [id(p) for t in trained for p in t.module.parameters() if p.requires_grad]
        if shard and len(set(parameters)) < len(parameters):
            raise BadInput(f"{' and '.join(names)} train the same weights, which cannot be sharded: leave out --fsdp")
        self.step, self.seconds, self.device = 0, 0.0, device
        for t in trained:
            t.module.to(device).train()
        self.modules: dict[str, nn.Module] = {t.name: t.module for t in trained}
        self.emas = {t.name: copy_for_average(t.module) for t in trained}
        self.unsharded: dict[str, nn.Module] = {}
        for module in (*self.modules.values(), *self.emas.values()):
            ranks.broadcast_parameters(module)
        for t in trained if shard else ():
            shards.check_shardable(t.name, t.module, t.optimiser, ranks)
            self.unsharded[t.name] = copy.deepcopy(self.emas[t.name]).cpu()
            shards.shard_module(t.module, ranks)
            shards.shard_module(self.emas[t.name], ranks)
        self.optimisers = {t.name: t.optimizer() for t in trained}
        self.peak_rates = {name: [g["lr"] for g in o.param_groups] for name, o in self.optimisers.items()}

    def save(self, path: Path, run: dict[str, Any], ranks: Ranks) -> None:
        """Write the checkpoint atomically, from the main process.

        Args:
            path: of the checkpoint.
            run: the settings that a resumed run must share.
            ranks: the processes; all must call it.

        Raises:
            HastenError: if it cannot be written.
        """
        states = {
            name: {
                "module": self.modules[name].state_dict(),
                "ema": self.emas[name].state_dict(),
                "optimiser": self.optimisers[name].state_dict(),
            }
            for name in self.modules
        }
        if self.unsharded:
            states = shards.full_state(states)
        if not ranks.is_main_process:
            return
        try:
            with atomic_open(path) as file:
                torch.save({"step": self.step, "seconds": self.seconds, "run": run, "players": states}, file)
        except (OSError, RuntimeError) as e:
            if is_out_of_memory(e):
                raise
            raise HastenError(f"cannot write the checkpoint {path}: {e}") from e

    def load(self, path: Path, run: dict[str, Any]) -> None:
        """Resume from the checkpoint `path`. Raises BadInput if it is damaged or belongs to a run of other settings."""
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            states, step, seconds = saved["players"], int(saved["step"]), float(saved["seconds"])
        except Exception as e:  # torch.load raises various exceptions for damaged files
            raise BadInput(f"cannot read the checkpoint {path} ({type(e).__name__}): remove it to start again") from e
        if set(states) != set(self.modules):
            raise BadInput(
                f"{path} trains {', '.join(states)}, this run {', '.join(self.modules)}: write to another folder"
            )
        different = first_difference(saved.get("run", {}), run, missing=False)
        if different is not None:
            key, old, new = different
            raise BadInput(
                f"{path} belongs to a run with {key} {old}, this one has {new}: "
                "use the same settings, write to another folder, or remove it to start again"
            )
        try:
            for name, state in states.items():
                shards.load_module(self.modules[name], state["module"])
                shards.load_module(self.emas[name], state["ema"])
                shards.load_optimiser(self.optimisers[name], state["optimiser"])
        except (RuntimeError, ValueError, KeyError) as e:
            reason = str(e).split("\n")[-1].strip()
            raise BadInput(f"{path} does not fit this network or optimiser ({reason}): write to another folder") from e
        self.step, self.seconds = step, seconds

    def averages(self) -> dict[str, nn.Module]:
        """The EMA of each module, unsharded."""
        if not self.unsharded:
            return self.emas
        return {
            name: shards.unsharded_copy(self.unsharded[name], shards.full_state(ema.state_dict()), self.device)
            for name, ema in self.emas.items()
        }


def save_modules(modules: Mapping[str, nn.Module], path: Path) -> None:
    """Write the modules' tensors into one safetensors file, atomically; `load_modules` reads it."""
    from safetensors.torch import save

    tensors = {
        f"{name}/{key}": value.detach().cpu().contiguous().clone()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    try:
        write_atomic(path, save(tensors))
    except OSError as e:
        raise HastenError(f"cannot write {path}: {e.strerror or e}") from e


def load_modules(modules: Mapping[str, nn.Module], path: Path) -> None:
    """Load the modules from a file of `save_modules`. Raises BadInput if it is damaged or holds other modules."""
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except Exception as e:  # safetensors raises various exceptions for damaged files
        raise BadInput(f"cannot read {path} ({type(e).__name__}): remove it to create it again") from e
    for name, module in modules.items():
        state = {key.partition("/")[2]: value for key, value in tensors.items() if key.partition("/")[0] == name}
        try:
            module.load_state_dict(state)
        except RuntimeError as e:
            reason = str(e).split("\n")[-1].strip()
            raise BadInput(f"{path} does not fit this run ({reason}): write to another folder") from e


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a JSONL training log, without truncated lines."""
    return [line for line in read_json_lines(path) if isinstance(line.get("step"), int)]


def trim_log(path: Path, step: int) -> None:
    """Remove the entries after `step`, so that a resumed run repeats none, and truncated lines."""
    if not path.is_file():
        return
    if any("step" not in line for line in read_json_lines(path)):
        raise BadInput(f"{path} is not a training log: write to another folder, or remove it")
    text = "".join(json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step)
    if text.encode() != path.read_bytes():
        with naming_file(path):
            write_atomic(path, text)


def append_log(path: Path, line: dict[str, Any]) -> None:
    """Append one entry to a JSONL log."""
    with naming_file(path):
        append_json_line(path, line)


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turn an OSError inside into a HastenError that names the file."""
    try:
        yield
    except OSError as e:
        raise HastenError(f"cannot write {path}: {e.strerror or e}") from e


def saved_run(path: Path) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint, with `step` and `seconds`; {} if there is none.

    The weights are not read. A damaged file gives {}; `TrainingState.load` reports it.
    """
    with contextlib.suppress(Exception):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {**saved.get("run", {}), "step": int(saved["step"]), "seconds": float(saved["seconds"])}
    return {}
