"""Pairs of noise and where the teacher takes it: made once, kept on disk, shared by the methods that learn from them.

A store is a folder. `pairs.json` says how the pairs were made and lists its blocks with their checksums;
`ends-00000.npy`, ... hold the ends of a block, `states-00000.npy`, ... what was passed on the way. The noise is not
stored: pair k starts from the noise of its own seed (`hasten.sampling.Noise`). A block is written under a temporary
name, renamed, and only then listed, so a run that was killed goes on after its last whole block, and what it
ends with is the same, byte for byte.

Luhman, Luhman 2021, arXiv:2101.02388, made a million such pairs; the probability-flow path is a map, so a pair
is a sample of it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, Wrapper
from ..distributed.ranks import Ranks
from ..errors import BadInput, HastenError, nearest
from ..pick import format_spec, pick
from ..plan.draw import draw
from ..progress import steps_progress
from ..sampling import Noise
from ._pair_store import DESCRIPTION, check, fingerprint, record, stored, write

# Seeds from here on are not those that people sample with. A generator of the CPU has 2^32 of them in all.
FIRST, SPAN, RUNS = 10_000_000, 10_000_000, 400
MEMORY = 2**28  # bytes of noise that are kept rather than drawn again
OPEN = 64  # files that are mapped at once
DTYPES = ("uint8", "float16", "float32")
SAMPLERS = ("ddim", "unipc", "dpm", "deis", "heun")  # deterministic ones: the end is a function of the noise
EXACT = ("ddim", "dpm", "deis")  # of these, the ones that ask the teacher about the very states they pass
LABELS = ("turns", "random")


class PairSource(Protocol):
    """What the making of pairs needs to know of a task; see `_task.Task`."""

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


class Pairs:
    """Pairs in memory-mapped files: `len(pairs)`, `pairs[k]`, `pairs[a:b]`, `pairs[indices]`.

    An entry is a dict, with a first dimension unless k is one number:
    `x` the teacher's end (*S), float32, images in [-1, 1]; `noise` (*S), standard normal, which times
    `schedule.prior_std(t_max)` is what the teacher started from; `label` int64, where there are classes; `states`
    (T, *S), the noisy samples that the teacher passed at the times `told["states"]`, where they were asked for.
    """

    def __init__(self, folder: Path, told: dict[str, Any], start: int, stop: int) -> None:
        self.folder, self.told, self.start, self.stop = folder, told, start, stop
        self._maps: OrderedDict[str, Any] = OrderedDict()  # of files, the last used ones: each holds a descriptor
        self._drawn: dict[int, Any] = {}
        # drawing noise from its seeds takes as long as a small network: kept, where there is room for all of it
        self._keep = 4 * (stop - start) * math.prod(told["shape"]) <= MEMORY

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int | None = None) -> Pairs:
        """The pairs start .. stop - 1 (None: all that follow). BadInput where that is none of them."""
        stop = len(self) if stop is None else stop
        if not 0 <= start < stop <= len(self):
            raise BadInput(f"a part of {len(self)} pairs needs 0 <= start < stop <= {len(self)}, got {start}, {stop}")
        found = Pairs(self.folder, self.told, self.start + start, self.start + stop)
        found._maps, found._drawn, found._keep = self._maps, self._drawn, self._keep
        return found

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> dict[str, Tensor]:
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"there are {len(self)} pairs, asked for number {index}")
            return {key: value[0] for key, value in self[[index % len(self)]].items()}
        if isinstance(index, slice):
            index = list(range(*index.indices(len(self))))
        chosen = torch.as_tensor(index, dtype=torch.long) + self.start
        ends = self._read("ends", chosen)
        found = {"x": ends.float() / 127.5 - 1 if ends.dtype == torch.uint8 else ends.float()}
        found["noise"] = self._read("noise", chosen) if self._keep else self._noise(chosen)
        if self.told["classes"]:
            found["label"] = labels_of(self.told, chosen)
        if self.told["states"]:
            found["states"] = self._read("states", chosen).float()
        return found

    def _read(self, kind: str, chosen: Tensor) -> Tensor:
        """Rows of the files `kind`, in the order asked for."""
        out: Tensor | None = None
        blocks = chosen // self.told["block"]
        for block in blocks.unique().tolist():
            values = self._kept(block) if kind == "noise" else self._map(f"{kind}-{block:05d}")
            where = (blocks == block).nonzero()[:, 0]
            rows = torch.from_numpy(values[(chosen[where] % self.told["block"]).numpy()])
            out = rows.new_empty(len(chosen), *rows.shape[1:]) if out is None else out
            out[where] = rows
        assert out is not None, "no pairs were asked for"
        return out

    def _map(self, key: str) -> np.ndarray:
        """A file as a map; at most `OPEN` are kept, as a system allows a process about a thousand open files."""
        if key not in self._maps:
            while len(self._maps) >= OPEN:
                self._maps.popitem(last=False)
            self._maps[key] = np.load(self.folder / f"{key}.npy", mmap_mode="r")
        self._maps.move_to_end(key)
        return self._maps[key]

    def _kept(self, block: int) -> np.ndarray:
        """The noise of a whole block, drawn once."""
        if block not in self._drawn:
            self._drawn[block] = self._noise(torch.arange(self.told["block"]) + block * self.told["block"]).numpy()
        return self._drawn[block]

    def _noise(self, chosen: Tensor) -> Tensor:
        return Noise((chosen + self.told["seed"]).tolist(), self.told["shape"]).initial()

    def batches(self, batch_size: int, seed: int = 0) -> PairBatches:
        """Batches without end, each pair once an epoch, in an order drawn from (seed, epoch)."""
        return PairBatches(self, batch_size, seed)


class PairBatches:
    """What a stage trains on: `batches[k]`, the batch of step k, is a function of (seed, k) alone.

    Epochs are permutations laid end to end and cut into batches, so that a batch may span two.
    """

    def __init__(self, pairs: Pairs, batch_size: int, seed: int = 0, part: int = 0, parts: int = 1) -> None:
        if batch_size < 1:
            raise BadInput(f"batch_size must be at least 1, got {batch_size}")
        if batch_size % parts:
            raise BadInput(f"batch_size must be a multiple of the {parts} parts (processes, times accumulate), got "
                           f"{batch_size}")  # fmt: skip
        self.pairs, self.batch_size, self.seed, self.part, self.parts = pairs, batch_size, seed, part, parts
        self._order: tuple[int, Tensor] | None = None

    def indices(self, step: int) -> Tensor:
        """The pairs of batch `step`, int64 (batch_size,)."""
        n, parts = len(self.pairs), []
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        while start < stop:
            epoch, offset = divmod(start, n)
            parts.append(self._permutation(epoch)[offset : offset + stop - start])
            start += len(parts[-1])
        return torch.cat(parts)

    def _permutation(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._order = epoch, torch.randperm(len(self.pairs), generator=generator)
        return self._order[1]

    def shard(self, part: int, parts: int) -> PairBatches:
        """Part `part` of `parts` of every batch."""
        return PairBatches(self.pairs, self.batch_size, self.seed, part, parts)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        share = self.batch_size // self.parts
        return self.pairs[self.indices(step)[self.part * share : (self.part + 1) * share]]


def labels_of(told: dict[str, Any], chosen: Tensor) -> Tensor:
    """The labels of the pairs `chosen`, int64: pair k has class k % C, or one drawn from the seed of its block.

    A null label among the classes is none of them: those above it move up by one.
    """
    null, count = told.get("null_label"), int(told["classes"])
    if null is not None:
        if count == 1:
            return torch.full_like(chosen, null)
        found = labels_of({**told, "classes": count - 1, "null_label": None}, chosen)
        return found + (found >= null).long()
    if told["labels"] == "turns":
        return chosen % count
    out, blocks = torch.empty_like(chosen), chosen // told["block"]
    for block in blocks.unique().tolist():
        # beyond all the seeds of noise
        seed = FIRST + RUNS * SPAN + (told["seed"] // SPAN) * 500_000 + block
        drawn = torch.randint(count, (told["block"],), generator=torch.Generator().manual_seed(seed))
        here = blocks == block
        out[here] = drawn[chosen[here] % told["block"]]
    return out


@torch.no_grad()
def make(
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
    """The first `count` pairs of the store in `folder`; those that it lacks are made.

    Args:
        steps, sampler, times: how the teacher samples: a method, or the name of one; it must be deterministic.
        states: times of the grid, above 0, at which to keep what the teacher passes (ddim, dpm, deis), as float16.
        dtype: of the stored ends: uint8 (images, rounded to 1/127.5 and clipped to [-1, 1]), float16 or float32; None:
            uint8 where the task says that its samples are images, float32 for others, such as latents.
        labels: "turns", pair k of class k % C, or "random". There are labels where the task's batches have them; where
            the null label is one of them, it is left out.
        teacher: what to sample from (None: the task's teacher). batch_size: in the network at once. block: in a file.

    Raises BadInput, before anything has run, where the store was made in another way or is damaged.
    """
    folder, teacher = Path(folder), task.teacher if teacher is None else teacher
    if not 1 <= count <= SPAN:
        raise BadInput(f"pairs: count must lie in 1..{SPAN}, got {count}")
    if block < 1 or not 1 <= batch_size <= block:
        raise BadInput(f"pairs: batch_size must lie in 1..block, got {batch_size} and block {block}")
    dtype = dtype or ("uint8" if task.codec == "image" and len(task.shape) == 3 else "float32")
    for name, value, known in (("dtype", dtype, DTYPES), ("labels", labels, LABELS)):
        if value not in known:
            raise BadInput(f"pairs: unknown {name} {value!r}: {nearest(value, known)}")
    method, law = named_sampler(sampler), named_times(times)
    grid = law(teacher.schedule, steps)
    if states and format_spec(method).partition(":")[0] not in EXACT:
        raise BadInput(f"pairs: {format_spec(method)} does not ask at the states it passes: with states, use one of "
                       f"{', '.join(EXACT)}")  # fmt: skip
    told = {
        "schema": 1,
        "teacher": fingerprint(teacher),
        "guidance_scale": task.guidance_scale,
        "sampler": format_spec(method),
        "times": format_spec(law),
        "grid": grid.tolist(),
        "states": on_grid(grid, states),
        "shape": list(task.shape),
        "dtype": dtype,
        "labels": labels,
        "classes": task.label_count,
        "seed": FIRST + SPAN * (task.seed % RUNS),
        "precision": task.precision,
        "batch_size": batch_size,
        "block": block,
    }
    null = getattr(task.denoiser, "null_label", None)
    if null is not None and null < told["classes"]:
        told["null_label"] = null
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"cannot write in {folder}: {e.strerror or e}") from e
    ranks = task.ranks
    blocks = ranks.on_main_process(lambda: check(folder, told))
    needed = [min(block, count - first) for first in range(0, count, block)]
    with steps_progress(task.show, f"pairs {folder.name}", count) as tick:
        for number, rows in enumerate(needed):
            if number < len(blocks) and blocks[number]["rows"] >= rows:
                tick(number * block + rows)
                continue
            files = drawn(task, teacher, method, grid, told, number, rows, tick)
            if files is None:  # the first process has them all
                continue
            entry = {"rows": rows, **{kind: write(folder, f"{kind}-{number:05d}", a) for kind, a in files.items()}}
            blocks[number : number + 1] = [entry]
            record(folder, told, blocks)
    ranks.barrier()
    if not (folder / DESCRIPTION).is_file():
        raise BadInput(f"process {ranks.rank} does not see {folder}: all processes need the same folder")
    return Pairs(folder, told, 0, count)


def drawn(
    task: PairSource, teacher: nn.Module, method: Any, grid: Tensor, told: dict[str, Any], number: int, rows: int,
    tick: Callable[[int], None],
) -> dict[str, np.ndarray] | None:  # fmt: skip
    """The arrays of block `number`, whose batches begin where it does: they do not depend on what was made before.

    Several processes share the batches, and the first one gets the arrays.
    """
    parameter = next((p for p in teacher.parameters()), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    size = told["batch_size"]

    def batch(index: int) -> tuple[Tensor, ...]:
        chosen = torch.arange(index * size, min((index + 1) * size, rows)) + number * told["block"]
        seeds = (chosen + told["seed"]).tolist()
        cond = {"label": labels_of(told, chosen).to(device)} if told["classes"] else {}
        seen = Passed(teacher, told["states"])
        with torch.autocast(device.type, torch.bfloat16, enabled=told["precision"] == "bf16"):
            x = draw(seen, method, grid, Noise(seeds, told["shape"], device=device), **cond)
        if not bool(x.isfinite().all()):
            raise HastenError(f"the teacher's samples are not finite: try another sampler than {told['sampler']}")
        ends = torch.from_numpy(stored(x, told["dtype"]))
        return (ends, torch.stack(seen.found(), 1).to("cpu", torch.float16)) if told["states"] else (ends,)

    def progress(done: int, total: int) -> None:
        tick(number * told["block"] + min(done * size, rows))

    made = task.ranks.distribute(-(-rows // size), batch, tick=progress)
    if not task.ranks.is_main_process:
        return None
    columns = [torch.cat(column).numpy() for column in zip(*[piece for piece in made if piece is not None])]
    return dict(zip(("ends", "states"), columns))


class Passed(Wrapper):
    """A denoiser that keeps what it is asked about at the times `states`."""

    def __init__(self, denoiser: nn.Module, states: Sequence[float]) -> None:
        super().__init__(denoiser)
        self.states = list(states)
        self._seen: dict[float, Tensor] = {}

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The inner denoiser's x0 (B, *S)."""
        for state in self.states:
            if state not in self._seen and abs(float(torch.as_tensor(t).flatten()[0]) - state) < 1e-9:
                self._seen[state] = x_t.detach().clone()
        return self.denoiser(x_t, t, **cond)

    def found(self) -> list[Tensor]:
        """The states, in the order asked for."""
        return [self._seen[state] for state in self.states]


def on_grid(grid: Tensor, states: Sequence[float]) -> list[float]:
    """`states`, each of which must be a time of the grid above its end, as the grid has it."""
    inside = grid[:-1].tolist()
    for state in states:
        if min(abs(t - state) for t in inside) > 1e-6:
            closest = min(inside, key=lambda t: abs(t - state))
            raise BadInput(f"pairs: the teacher's grid of {len(inside)} steps does not pass t = {state:g}: nearest is "
                           f"{closest:.6g}")  # fmt: skip
    return [min(inside, key=lambda t: abs(t - state)) for state in states]


def named_sampler(sampler: Any) -> Any:
    """A deterministic sampler by its name, with its own defaults, or one as it is."""
    if not isinstance(sampler, str):
        return sampler
    if sampler not in SAMPLERS:
        raise BadInput(f"pairs: unknown sampler {sampler!r}: {nearest(sampler, SAMPLERS)}")
    return pick("samplers", sampler)


def named_times(times: Any) -> Any:
    """A time grid by its name, or one as it is."""
    return pick("times", times) if isinstance(times, str) else times
