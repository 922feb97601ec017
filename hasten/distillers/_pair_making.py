"""Generation of pairs of noise and the teacher's samples: once, into a store that `_pairs.Pairs` reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, Wrapper
from ..distributed.ranks import Ranks
from ..errors import BadInput, HastenError, check_choice
from ..pick import format_spec, pick
from ..plan.draw import draw
from ..progress import steps_progress
from ..sampling import Noise
from ._conditions import ConditionSource
from ._pair_store import DESCRIPTION, teacher_fingerprint, to_storage, verify_blocks, write_block, write_description
from ._pairs import FIRST_SEED, SEED_RANGES, SEED_SPAN, Pairs, pair_captions, pair_labels

DTYPES = ("uint8", "float16", "float32")
SAMPLERS = ("ddim", "unipc", "dpm", "deis", "heun")  # deterministic: the sample is a function of the noise
STATE_SAMPLERS = ("ddim", "dpm", "deis")  # those that evaluate the teacher at the states of the path itself
LABELS = ("turns", "random")


class PairSource(Protocol):
    """What the generation of pairs needs of a task; see `_task.DistillTask`."""

    teacher: nn.Module
    denoiser: Denoiser
    shape: tuple[int, ...]
    guidance_scale: float
    codec: str | None
    seed: int
    precision: str
    show: bool
    ranks: Ranks

    @property
    def label_count(self) -> int: ...

    @property
    def condition_source(self) -> ConditionSource | None: ...


@torch.no_grad()
def make_pairs(
    task: PairSource,
    folder: str | Path,
    count: int,
    *,
    steps: int = 16,
    sampler: Any = "unipc",
    times: Any = "angle",
    states: Sequence[float] = (),
    dtype: str | None = None,
    labels: str = "turns",
    teacher: nn.Module | None = None,
    batch_size: int = 128,
    block: int = 1024,
) -> Pairs:
    """The first `count` pairs of the store in a folder; missing ones are generated.

    Args:
        task: the teacher and the run's settings.
        folder: of the store.
        count: number of pairs.
        steps, sampler, times: how the teacher samples: methods or their names; the sampler must be deterministic.
        states: times of the grid, above 0, at which intermediate states are stored (ddim, dpm, deis), as float16.
        dtype: of the stored samples: `"uint8"` (images, rounded to 1/127.5 and clipped to [-1, 1]), `"float16"` or
            `"float32"`; None: uint8 for images, float32 for others, such as latents.
        labels: `"turns"`, pair k of class k % C, or `"random"`; of captions likewise, in a random order. There are
            labels where the task's batches have them; a null label among them is not used.
        teacher: to sample from; None: the task's.
        batch_size: samples per evaluation of the network.
        block: samples in a file.

    Returns:
        The pairs.

    Raises:
        BadInput: before anything runs, where the store has other settings or is damaged.
    """
    folder, teacher = Path(folder), task.teacher if teacher is None else teacher
    if not 1 <= count <= SEED_SPAN:
        raise BadInput(f"pairs: count must lie in 1..{SEED_SPAN}, got {count}")
    if block < 1 or not 1 <= batch_size <= block:
        raise BadInput(f"pairs: batch_size must lie in 1..block, got {batch_size} and block {block}")
    dtype = dtype or ("uint8" if task.codec == "image" and len(task.shape) == 3 else "float32")
    check_choice("dtype of pairs", dtype, DTYPES)
    check_choice("labels of pairs", labels, LABELS)
    method, time_grid = deterministic_sampler(sampler), resolve_times(times)
    grid = time_grid(teacher.schedule, steps)
    if states and format_spec(method).partition(":")[0] not in STATE_SAMPLERS:
        raise BadInput(
            f"pairs: {format_spec(method)} evaluates the teacher elsewhere than at the states of its path: with "
            f"states, use one of {', '.join(STATE_SAMPLERS)}"
        )
    config = {
        "schema": 1,
        "teacher": teacher_fingerprint(teacher),
        "guidance_scale": task.guidance_scale,
        "sampler": format_spec(method),
        "times": format_spec(time_grid),
        "grid": grid.tolist(),
        "states": states_on_grid(grid, states),
        "shape": list(task.shape),
        "dtype": dtype,
        "labels": labels,
        "classes": task.label_count,
        "seed": FIRST_SEED + SEED_SPAN * (task.seed % SEED_RANGES),
        "precision": task.precision,
        "batch_size": batch_size,
        "block": block,
    }
    null = getattr(task.denoiser, "null_label", None)
    if null is not None and null < config["classes"]:
        config["null_label"] = null
    captions = task.condition_source
    if captions is not None:
        config |= {"captions": len(captions), "captions_digest": captions.digest()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"cannot write in {folder}: {e.strerror or e}") from e
    ranks = task.ranks
    blocks = ranks.on_main_process(lambda: verify_blocks(folder, config))
    needed = [min(block, count - first) for first in range(0, count, block)]
    with steps_progress(task.show, f"pairs {folder.name}", count) as tick:
        for number, rows in enumerate(needed):
            if number < len(blocks) and blocks[number]["rows"] >= rows:
                tick(number * block + rows)
                continue
            files = sample_block(task, teacher, method, grid, config, number, rows, tick, captions)
            if files is None:  # the main process has them
                continue
            entry = {
                "rows": rows,
                **{kind: write_block(folder, f"{kind}-{number:05d}", a) for kind, a in files.items()},
            }
            blocks[number : number + 1] = [entry]
            write_description(folder, config, blocks)
    ranks.barrier()
    if not (folder / DESCRIPTION).is_file():
        raise BadInput(f"process {ranks.rank} does not see {folder}: all processes must share the folder")
    return Pairs(folder, config, 0, count, captions)


def sample_block(
    task: PairSource,
    teacher: nn.Module,
    method: Any,
    grid: Tensor,
    config: dict[str, Any],
    number: int,
    rows: int,
    tick: Callable[[int], None],
    captions: ConditionSource | None = None,
) -> dict[str, np.ndarray] | None:
    """The arrays of block `number`. Its batches start where it does, so they do not depend on earlier runs.

    Several processes share the batches; the main process gets the arrays, the others None.
    """
    parameter = next((p for p in teacher.parameters()), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    size = config["batch_size"]

    def batch(index: int) -> tuple[Tensor, ...]:
        indices = torch.arange(index * size, min((index + 1) * size, rows)) + number * config["block"]
        seeds = (indices + config["seed"]).tolist()
        cond = {"label": pair_labels(config, indices)} if config["classes"] else {}
        if captions is not None:
            cond |= captions(pair_captions(config, indices))
        cond = {key: value.to(device) for key, value in cond.items()}
        recorder = StateRecorder(teacher, config["states"])
        with torch.autocast(device.type, torch.bfloat16, enabled=config["precision"] == "bf16"):
            x = draw(recorder, method, grid, Noise(seeds, config["shape"], device=device), cond=cond)
        if not bool(x.isfinite().all()):
            raise HastenError(f"the teacher's samples are not finite: use another sampler than {config['sampler']}")
        ends = torch.from_numpy(to_storage(x, config["dtype"]))
        return (ends, torch.stack(recorder.recorded(), 1).to("cpu", torch.float16)) if config["states"] else (ends,)

    def progress(done: int, total: int) -> None:
        tick(number * config["block"] + min(done * size, rows))

    pieces = task.ranks.distribute(-(-rows // size), batch, tick=progress)
    if not task.ranks.is_main_process:
        return None
    columns = [torch.cat(column).numpy() for column in zip(*[piece for piece in pieces if piece is not None])]
    return dict(zip(("ends", "states"), columns))


class StateRecorder(Wrapper):
    """A denoiser that records its input at given times.

    Args:
        denoiser: to evaluate.
        states: the times.
    """

    def __init__(self, denoiser: nn.Module, states: Sequence[float]) -> None:
        super().__init__(denoiser)
        self.states = list(states)
        self._recorded: dict[float, Tensor] = {}

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The inner denoiser's x0 (B, *S)."""
        for state in self.states:
            if state not in self._recorded and abs(float(torch.as_tensor(t).flatten()[0]) - state) < 1e-9:
                self._recorded[state] = x_t.detach().clone()
        return self.denoiser(x_t, t, **cond)

    def recorded(self) -> list[Tensor]:
        """The states (B, *S), in the order of `states`."""
        return [self._recorded[state] for state in self.states]


def states_on_grid(grid: Tensor, states: Sequence[float]) -> list[float]:
    """The times `states` as the grid has them. BadInput where one is not a time of the grid above its end."""
    inside = grid[:-1].tolist()
    for state in states:
        if min(abs(t - state) for t in inside) > 1e-6:
            closest = min(inside, key=lambda t: abs(t - state))
            raise BadInput(
                f"pairs: t = {state:g} is not on the teacher's grid of {len(inside)} steps: nearest is {closest:.6g}"
            )
    return [min(inside, key=lambda t: abs(t - state)) for state in states]


def deterministic_sampler(sampler: Any) -> Any:
    """A deterministic sampler by its name, or the sampler itself."""
    if not isinstance(sampler, str):
        return sampler
    return pick("samplers", check_choice("sampler of pairs", sampler, SAMPLERS))


def resolve_times(times: Any) -> Any:
    """A time grid by its name, or the grid itself."""
    return pick("times", times) if isinstance(times, str) else times
