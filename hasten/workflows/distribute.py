"""Many images on several processes: whole batches are distributed, so that the images are those of one process."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..accelerators import with_defaults
from ..distributed.heartbeat import peer_errors
from ..distributed.ranks import Piece, ProcessLost, Ranks
from ..errors import check_int
from ..images import to_image_tensor
from ..model.model import Label, Model
from ..model.resolve import Resolved
from ..pick import pick
from ..plan.config import SamplingConfig, SamplingOptions
from ..sampling import Progress
from ..storage.batches import SavedBatches
from ..storage.provenance import model_hash

if TYPE_CHECKING:
    from typing_extensions import Unpack

JOINT = frozenset({"space", "branches"})  # claims of accelerators that share one sampling among the processes


class SampleManyOptions(SamplingOptions, total=False):
    """Further keyword arguments of `sample_many`, beside the fields of `SamplingConfig`."""

    images: Tensor | None
    keep: SavedBatches | None
    everywhere: bool
    accelerated: Sequence[Any]
    progress: Progress | None


def sample_many(
    model: Model,
    n: int,
    label: Label = None,
    seed: int = 0,
    batch_size: int = 64,
    *,
    ranks: Ranks,
    config: SamplingConfig | Resolved | None = None,
    **options: Unpack[SampleManyOptions],
) -> Tensor | None:
    """`model.sample(n, ...)` on all processes of a run: the same images, bit for bit where each has as many threads.

    Batch b, the images b `batch_size` and on, is sampled whole by whichever process is free, so the rounding of its
    sums is that of one process; guides that look at a batch see the same one. Where an accelerator claims "space" or
    "branches", the processes that share an image sample their batches together. (n below `batch_size` times the
    processes leaves some without work.)

    Args:
        n, label, seed, batch_size: as for `Model.sample`.
        ranks: `Ranks.start(device)`; all processes call this with the same arguments.
        config: how to sample. Its precision must not be "auto", which processes could choose differently:
            `ranks.on_main_process(lambda: model.precision_for("auto", batch_size))`.
        options: fields of `SamplingConfig`; `images` and `progress` as for `Model.sample`; `everywhere`: all processes
            get the images, not the main one alone; `keep`: where finished batches are saved, and looked for;
            `accelerated`: accelerators that are in the model already.

    Returns:
        The images (n, C, H, W) float32 on the CPU; None in the other processes, unless `everywhere`.

    Raises:
        ProcessLost: where another process ends early. KeyboardInterrupt: when stopped. Both say what was saved.
    """
    check_int("batch_size", batch_size, 1)
    images = options.pop("images", None)
    saved, everywhere = options.pop("keep", None), options.pop("everywhere", False)
    accelerated, progress = tuple(options.pop("accelerated", ())), options.pop("progress", None)
    images = None if images is None else to_image_tensor(images, model.shape if model.decoder is None else None)
    resolved = model.resolve(config, batch_size=min(n, batch_size), **options)  # type: ignore[misc]
    if ranks.world == 1 and (saved is None or not saved.folder.exists()):
        return model.sample(n, label, seed, resolved, batch_size=batch_size, progress=progress, images=images)
    starts = range(0, n, batch_size)
    group = sharing((*accelerated, *resolved.config.accelerators), ranks)
    leads = group is None or group.leads
    mine = [saved.get(first, min(batch_size, n - first)) if saved and leads else None for first in starts]
    finished = {number: images for number, images in enumerate(mine) if images is not None}

    def batch(number: int) -> Piece:
        first, count = starts[number], min(batch_size, n - starts[number])
        if number in finished:
            return (finished[number],)
        labels = part_of(model, n, label, slice(first, first + count))
        source = None if images is None else images[first : first + count]
        result = model.sample(count, labels, seed + first, resolved, batch_size=batch_size, images=source)
        if saved is not None and leads:
            saved.put(first, result)
        return (result,)

    with reporting(saved, n):
        if group is None:
            pieces = ranks.distribute(len(starts), batch, finished, everywhere, progress)
        else:
            pieces = in_groups(ranks, group, len(starts), batch, finished, everywhere, progress)
    batches = [piece[0] for piece in pieces if piece is not None]
    return torch.cat(batches) if everywhere or ranks.is_main_process else None


@dataclass(frozen=True)
class Sharing:
    """Processes that sample a batch together: group `number` of `count`. leads: whether this one saves the images, and
    sends them to the others of the run."""

    number: int
    count: int
    leads: bool


def sharing(accelerators: Sequence[Any], ranks: Ranks) -> Sharing | None:
    """The processes that this one samples with; None where each samples by itself."""
    methods = [pick("accelerators", one) if isinstance(one, str) else one for one in accelerators]
    claims = {claim for one in methods for claim in with_defaults(one).claims}
    if ranks.world == 1 or not claims & JOINT:
        return None
    row = ranks.world // 2 if claims >= JOINT else ranks.world  # the two halves of the processes have a branch each
    sizes = [with_defaults(one).size for one in methods if "space" in with_defaults(one).claims]
    size = min([row, *(size for size in sizes if size is not None)])
    return Sharing(ranks.rank % row // size, row // size, ranks.rank < row and ranks.rank % size == 0)


def in_groups(
    ranks: Ranks,
    group: Sharing,
    count: int,
    batch: Callable[[int], Piece],
    finished: Iterable[int],
    everywhere: bool,
    progress: Progress | None,
) -> list[Piece | None]:
    """As `Ranks.distribute`, but a batch is sampled by a whole group, whose leaders alone have finished ones."""
    owners = ranks.owners(finished)
    mine = {number: batch(number) for number, rank in owners.items() if rank == ranks.rank}
    missing = [number for number in range(count) if number not in owners]
    for turn, number in enumerate(missing[group.number :: group.count], 1):
        with peer_errors(sure=False):
            piece = batch(number)
        if group.leads:
            mine[number] = piece
        if progress is not None:
            progress(min(len(owners) + turn * group.count, count), count)
    ranks.barrier()
    pieces: list[Piece | None] = ranks.collect(count, mine, everywhere)
    return pieces


def part_of(model: Model, n: int, label: Label, part: slice) -> Label:
    """The labels, or the prompts, of some of `n` images, as `Model.sample` takes them."""
    if model.conditioning is not None:
        texts = getattr(model.conditioning, "texts", None)
        return label if texts is None else texts(n, label)[part]
    labels = model.labels(n, label)
    return None if labels is None else labels[part]


def saved_batches(
    folder: str | Path, ranks: Ranks, model: Model, resolved: Resolved, request: dict[str, Any]
) -> SavedBatches | None:
    """Where this run saves its batches. None for one process, unless `folder` has some of a run of several.

    request: n, label, seed, batch_size and images of the sampling.
    """
    if ranks.world == 1 and not Path(folder).exists():
        return None
    shared = sharing(resolved.config.accelerators, ranks) is not None
    return SavedBatches(folder, sampling_metadata(model, resolved, request, ranks.world if shared else 1))


def sampling_metadata(model: Model, resolved: Resolved, request: dict[str, Any], processes: int = 1) -> dict[str, Any]:
    """All that the images depend on, for `SavedBatches`. processes: how many share an image."""
    images, label = request.get("images"), request.get("label")
    return {
        "hasten": __version__,
        "torch": torch.__version__,
        "device": model.device.type,
        "model": model.name,
        "weights": model_hash(model),
        "beside": [part_digest(model.conditioning), part_digest(model.decoder)],
        "plan": None if resolved.plan is None else resolved.plan.to_json(),
        "sampling": {key: value for key, value in resolved.settings().items() if key != "plan"},
        **request,
        "label": label.tolist() if isinstance(label, Tensor) else label,
        "processes": processes,
        "images": None if images is None else hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest(),
    }


def part_digest(part: Any) -> str | None:
    """16 hexadecimal digits of what belongs to a model beside its network: a decoder or text encoders."""
    if part is None:
        return None
    digest = hashlib.sha256(type(part).__name__.encode())
    values = {**vars(part), **getattr(getattr(part, "pipe", None), "components", {})}
    for name, value in sorted(values.items()):
        if isinstance(value, nn.Module):
            for key, tensor in value.state_dict().items():
                digest.update(f"{name}.{key}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, (str, int, float, tuple)):
            digest.update(f"{name} {value}".encode())
    return digest.hexdigest()[:16]


def idle_processes(ranks: Ranks, n: int, batch_size: int) -> str | None:
    """A line for the main process where some processes will have nothing to do."""
    batches = -(-n // batch_size)
    if not ranks.is_main_process or batches >= ranks.world:
        return None
    return (
        f"{n} images are {batches} batch{'es' if batches > 1 else ''} of {batch_size}, for {ranks.world} "
        f"processes: --batch-size {max(n // ranks.world, 1)} would give work to all"
    )


@contextlib.contextmanager
def reporting(saved: SavedBatches | None, n: int) -> Iterator[None]:
    """The message of an early end says how many images are saved."""

    def line(reason: str) -> str:
        if saved is None:
            return reason
        return f"{reason}; {saved.count()} of {n} images are saved in {saved.folder}: the same command resumes"

    try:
        yield
    except ProcessLost as e:
        raise ProcessLost(line(str(e))) from e
    except KeyboardInterrupt as e:
        raise KeyboardInterrupt(line(str(e) or "stopped")) from e
