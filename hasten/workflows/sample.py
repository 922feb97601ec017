"""Many images on several processes: whole batches are dealt, so that the images are those of one process."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..distributed.heartbeat import peer_errors
from ..distributed.ranks import Piece, ProcessLost, Ranks
from ..errors import BadInput, check_int
from ..images import to_image_tensor
from ..metrics import Measure, Reference, evaluate_features, evaluate_images, extract, feature_net, net_name
from ..metrics.fashion import CLASSES as FASHION
from ..model.model import Label, Model
from ..pick import format_spec, pick
from ..sampling import Progress
from ..storage.batches import SavedBatches
from ..storage.provenance import fingerprint

JOINT = frozenset({"space", "branches"})  # claims of accelerators that share one sampling among the processes


def kept(
    folder: str | Path, ranks: Ranks, model: Model, n: int, label: Label, seed: int, batch_size: int,
    setting: dict[str, Any], images: Tensor | None = None,
) -> SavedBatches | None:  # fmt: skip
    """Where this run keeps its batches. None for one process, unless `folder` has some of a run of several."""
    if ranks.world == 1 and not Path(folder).exists():
        return None
    shared = sharing(setting.get("accelerators", ()), ranks) is not None
    return SavedBatches(
        folder, sampling_metadata(model, n, label, seed, batch_size, setting, images, ranks.world if shared else 1)
    )


def sample_many(
    model: Model,
    n: int,
    label: Label = None,
    seed: int = 0,
    batch_size: int = 64,
    *,
    ranks: Ranks,
    keep: SavedBatches | None = None,
    everywhere: bool = False,
    accelerated: Sequence[Any] = (),
    progress: Progress | None = None,
    images: Tensor | None = None,
    **setting: Any,
) -> Tensor | None:
    """`model.sample(n, ...)` on all processes of a run: the same images, bit for bit where each has as many threads.

    Batch b, the images b `batch_size` and on, is sampled whole by whoever is free, so the rounding of its sums is that
    of one process; guides that look at a batch see the same one. Where an accelerator claims "space" or "branches", the
    processes that share an image sample their batches together. (n below `batch_size` times the processes leaves some
    without work.)

    ranks: `Ranks.start(device)`; all call this with the same arguments. keep: where batches are kept as they are
    finished, and looked for. everywhere: all processes get the images, not the first alone (the others get None).
    accelerated: accelerators that are in the model already.
    The other arguments are those of `Model.sample`; `runtime` must not be `auto`, which processes could take
    differently: `ranks.on_main_process(lambda: model.runtime_for(...))`.

    Raises ProcessLost where another process ends early, KeyboardInterrupt when stopped: both say what is kept.
    """
    check_int("batch_size", batch_size, 1)
    images = None if images is None else to_image_tensor(images, model.shape if model.decoder is None else None)
    if ranks.world == 1 and (keep is None or not keep.folder.exists()):
        return model.sample(n, label, seed, batch_size=batch_size, progress=progress, images=images, **setting)
    starts = range(0, n, batch_size)
    team = sharing((*accelerated, *setting.get("accelerators", ())), ranks)
    leads = team is None or team.leads
    mine = [keep.get(first, min(batch_size, n - first)) if keep and leads else None for first in starts]
    found = {number: made for number, made in enumerate(mine) if made is not None}

    def drawn(number: int) -> Piece:
        first, count = starts[number], min(batch_size, n - starts[number])
        if number in found:
            return (found[number],)
        named = part_of(model, n, label, slice(first, first + count))
        given = None if images is None else images[first : first + count]
        made = model.sample(count, named, seed + first, batch_size=batch_size, images=given, **setting)
        if keep is not None and leads:
            keep.put(first, made)
        return (made,)

    with saying(keep, n):
        if team is None:
            pieces = ranks.distribute(len(starts), drawn, found, everywhere, progress)
        else:
            pieces = together(ranks, team, len(starts), drawn, found, everywhere, progress)
    made = [piece[0] for piece in pieces if piece is not None]
    return torch.cat(made) if everywhere or ranks.is_main_process else None


@dataclass(frozen=True)
class Sharing:
    """Processes that sample a batch together: group `number` of `count`. leads: whether this one keeps what they draw,
    and gives it to the others of the run."""

    number: int
    count: int
    leads: bool


def sharing(accelerators: Sequence[Any], ranks: Ranks) -> Sharing | None:
    """With whom this process samples; None where each samples by itself."""
    chosen = [pick("accelerators", one) if isinstance(one, str) else one for one in accelerators]
    claims = {claim for one in chosen for claim in one.claims}
    if ranks.world == 1 or not claims & JOINT:
        return None
    row = ranks.world // 2 if claims >= JOINT else ranks.world  # the two halves of the processes have a branch each
    size = min([row, *(one.size for one in chosen if "space" in one.claims and getattr(one, "size", None))])
    return Sharing(ranks.rank % row // size, row // size, ranks.rank < row and ranks.rank % size == 0)


def together(
    ranks: Ranks, team: Sharing, count: int, drawn: Callable[[int], Piece], found: Iterable[int], everywhere: bool,
    progress: Progress | None,
) -> list[Piece | None]:  # fmt: skip
    """As `Ranks.distribute`, but a number is taken by a whole group, whose leaders alone have found some already."""
    owners = ranks.owners(found)
    mine = {number: drawn(number) for number, rank in owners.items() if rank == ranks.rank}
    missing = [number for number in range(count) if number not in owners]
    for turn, number in enumerate(missing[team.number :: team.count], 1):
        with peer_errors(sure=False):
            made = drawn(number)
        if team.leads:
            mine[number] = made
        if progress is not None:
            progress(min(len(owners) + turn * team.count, count), count)
    ranks.barrier()
    return ranks.collect(count, mine, everywhere)


def part_of(model: Model, n: int, label: Label, part: slice) -> Label:
    """The labels, or the prompts, of some of `n` images, as `Model.sample` takes them."""
    if model.conditioning is not None:
        texts = getattr(model.conditioning, "texts", None)
        return label if texts is None else texts(n, label)[part]
    labels = model.labels(n, label)
    return None if labels is None else labels[part]


def sampling_metadata(
    model: Model,
    n: int,
    label: Label,
    seed: int,
    batch_size: int,
    setting: dict[str, Any],
    images: Tensor | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """All that the images depend on, for `Kept`. processes: which share an image."""
    way = model.way(**{key: value for key, value in setting.items() if key != "runtime"})
    spelled = {key: value if isinstance(value, (str, int, float, type(None))) else names(value)
               for key, value in setting.items() if key != "plan"}  # fmt: skip
    return {
        "hasten": __version__, "torch": torch.__version__, "device": model.device.type, "model": model.name,
        "weights": fingerprint(model), "beside": [beside(model.conditioning), beside(model.decoder)],
        "plan": None if way.plan is None else way.plan.to_json(), "setting": spelled,
        "label": label.tolist() if isinstance(label, Tensor) else label,
        "n": n, "seed": seed, "batch_size": batch_size, "processes": processes,
        "images": None if images is None else hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest(),
    }  # fmt: skip


def names(methods: Any) -> Any:
    """Methods as they are spelled."""
    if isinstance(methods, (list, tuple)):
        return [names(one) for one in methods]
    return methods if isinstance(methods, str) else format_spec(methods)


def beside(part: Any) -> str | None:
    """What lies beside the network, a decoder or text encoders, in a few digits."""
    if part is None:
        return None
    digest = hashlib.sha256(type(part).__name__.encode())
    held = {**vars(part), **getattr(getattr(part, "pipe", None), "components", {})}
    for name, value in sorted(held.items()):
        if isinstance(value, nn.Module):
            for key, tensor in value.state_dict().items():
                digest.update(f"{name}.{key}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, (str, int, float, tuple)):
            digest.update(f"{name} {value}".encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def saying(keep: SavedBatches | None, n: int) -> Iterator[None]:
    """An early end tells how many images are kept."""

    def line(what: str) -> str:
        if keep is None:
            return what
        return f"{what}; {keep.count()} of {n} images are kept in {keep.folder}: the same command goes on from there"

    try:
        yield
    except ProcessLost as e:
        raise ProcessLost(line(str(e))) from e
    except KeyboardInterrupt as e:
        raise KeyboardInterrupt(line(str(e) or "stopped")) from e


def evaluate_distributed(
    images: Tensor,
    labels: Tensor | None,
    features: str | nn.Module,
    known: Reference | None,
    seeds: range,
    ranks: Ranks,
    classes: Sequence[str] | None = None,
) -> dict[str, Measure] | None:
    """`evaluate_images` with the looking done by all processes, each with all the images (N, C, H, W) in [-1, 1].

    known: needed by the first process alone, which gets the figures; the others get None. classes: what `labels` are
    indices of, matched by name to the classes of the feature network (None: these are the same).
    """
    labels = labels if classes is None else classifier_labels(labels, classes, features)
    if ranks.world == 1:
        assert known is not None
        return evaluate_images(images, labels, features, known, seeds, device=ranks.device)
    net, size = feature_net(features), 256
    net = net.to(ranks.device) if isinstance(features, str) else net
    if known is not None and net_name(net) != known.features:
        raise BadInput(f"the reference holds {known.features} features: {net_name(net)} cannot judge against it")

    def look(number: int) -> tuple[Tensor, ...]:
        seen, logits = extract(net, images[number * size : (number + 1) * size], size)
        return (seen,) if logits is None else (seen, logits)

    found = ranks.distribute(-(-len(images) // size), look)
    if not ranks.is_main_process or known is None:
        return None
    columns = [torch.cat(column) for column in zip(*[piece for piece in found if piece is not None])]
    return evaluate_features(columns[0], known, columns[1] if len(columns) > 1 else None, labels, seeds)


def classifier_labels(labels: Tensor | None, classes: Sequence[str], features: str | nn.Module) -> Tensor | None:
    """Labels (n,) of a model's `classes` as those of a classifier, matched by name.

    None, which is printed, where class accuracy cannot be measured: it does not know them all, or an image has none.
    """
    from ..train.names import class_of, is_number
    from ..train.notes import listed, note

    names = FASHION if features == "fashion" else getattr(features, "classes", None)
    if labels is None:
        return None
    used = sorted(set(labels.tolist()))
    if used and used[-1] >= len(classes):
        note("class accuracy is not measured: some images were drawn without a class")
        return None
    if names is None or isinstance(names, int):
        return labels
    index = {k: class_of(k, classes, names) for k in used}
    if all(map(is_number, classes)) and None in index.values() and len(classes) == len(names):
        index = {k: class_of(int(classes[k]), names, names) if int(classes[k]) < len(names) else None for k in used}
    lost = [classes[k] for k, found in index.items() if found is None]
    if lost:
        note(f"class accuracy is not measured: the feature network does not know the classes {listed(lost)}")
        return None
    return torch.tensor([index[k] for k in labels.tolist()])
