"""`Ranks`: collectives, distribution of work, heartbeats, and what happens when a process dies."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten.distributed.heartbeat import Peers, is_alive
from hasten.distributed.ranks import ProcessLost, Ranks, launched, own_device
from hasten.errors import BadInput
from hasten.storage.batches import SavedBatches
from hasten.workflows.distribute import Sharing, part_of, sample_many, sampling_metadata, saved_batches, sharing

from .process_groups import spawn

SETTING: dict[str, Any] = {
    "sampler": "ddim",
    "times": "uniform",
    "steps": 1,
    "guidance_scale": 1.0,
    "precision": "fp32",
}
CPU = Ranks(torch.device("cpu"))


@dataclass(frozen=True)
class Shared:
    """In place of an accelerator that splits one image between processes."""

    claims: frozenset[str] = frozenset({"space"})
    size: int | None = None


def run_collectives(rank: int, folder: str) -> None:
    """One of three processes: every method of `Ranks`, and at the end one process dies."""
    ranks = Ranks.start("cpu")
    assert (ranks.rank, ranks.world, ranks.local, ranks.is_main_process) == (rank, 3, rank, rank == 0)
    assert Ranks.start("cpu") == ranks and Ranks.connect().world == 3
    assert ranks.broadcast_object(f"from {rank}") == "from 0"
    called: list[int] = []
    assert ranks.on_main_process(lambda: called.append(rank) or [1, 2]) == [1, 2]
    assert called == ([0] if rank == 0 else [])
    assert ranks.gather({rank: "x" * rank}) == [{0: ""}, {1: "x"}, {2: "xx"}]
    assert ranks.sync_training_state(10.0 + rank, rank == 2, rank == 1) == (10.0, True, False)
    with ranks.main_process_first():
        order = time.monotonic()
    orders = ranks.gather(order)
    assert min(orders) == orders[0]

    # each index once, by any process; cached indices by the process that has them; tensors of any dtype
    done: list[int] = []

    def work(number: int) -> tuple[torch.Tensor, ...]:
        done.append(number)
        time.sleep(0.02)
        return torch.full((number + 1, 2), number, dtype=torch.float16), torch.tensor([number], dtype=torch.int64)

    pieces = ranks.distribute(7, work, done=[5] if rank == 2 else [])
    every = ranks.gather(done)
    assert sorted(number for mine in every for number in mine) == list(range(7)) and 5 in every[2]
    assert all(len(mine) >= 1 for mine in every)
    if rank == 0:
        assert [int(piece[1]) for piece in pieces] == list(range(7))  # type: ignore[index]
        assert all(torch.equal(p[0], torch.full((k + 1, 2), k, dtype=torch.float16)) for k, p in enumerate(pieces))  # type: ignore[index]
    else:
        assert [k for k, piece in enumerate(pieces) if piece is not None] == sorted(done)
    pieces = ranks.distribute(4, lambda k: (torch.tensor([float(k)]),), everywhere=True)
    assert [float(piece[0]) for piece in pieces] == [0, 1, 2, 3]  # type: ignore[index]

    module = torch.nn.Linear(2, 1)
    ranks.broadcast_parameters(module)
    assert len({json.dumps(weights) for weights in ranks.gather(module.weight.tolist())}) == 1
    unused = torch.nn.Parameter(torch.ones(2))
    module.weight.grad = torch.full((1, 2), float(rank))
    module.bias.grad = torch.tensor([3.0]) if rank == 1 else None
    loss = ranks.all_reduce_gradients([*module.parameters(), unused], torch.tensor(3.0 * rank))
    assert loss == 3.0 and module.weight.grad.tolist() == [[1.0, 1.0]] and module.bias.grad.tolist() == [1.0]  # type: ignore[union-attr]
    assert unused.grad is None  # AdamW would decay a parameter whose gradient is zero

    # 10 images of the bundled model in batches of 4 (the last is smaller): equal to those of one process
    model = hasten.load("fashion")
    store = SavedBatches(folder, {"a": 1})
    images = sample_many(model, 10, ["bag", 3], seed=5, batch_size=4, ranks=ranks, keep=store, **SETTING)
    assert (images is None) == (rank > 0) and store.count() == 10
    if images is not None:
        torch.save(images, f"{folder}/three.pt")
    # saved batches are not sampled again, by any number of processes; shared samplings give the same images
    marked = store.get(4, 4)
    assert marked is not None
    ranks.barrier()
    if rank == 0:
        store.put(4, marked + 1)
    ranks.barrier()
    request = (model, 10, ["bag", 3], 5, 4)
    first = torch.load(f"{folder}/three.pt")
    for how in ([Shared()], [Shared(size=1)], []):
        again = sample_many(*request, ranks=ranks, keep=store, everywhere=True, accelerated=how, **SETTING)
        assert again is not None
        assert torch.equal(again[4:8], first[4:8] + 1) and torch.equal(again[8:], first[8:])
    # folders that differ: only the leader of a group reads and writes, so that the whole group does the same
    own, seen = SavedBatches(Path(folder, f"own{rank}"), {}), []
    if rank == 2:
        own.put(4, marked)
    for how, keep, batches in (
        (Shared(), own, [4, 4, 2]),
        (Shared(), own, []),
        (Shared(size=1), None, [[4], [4], [2]][rank]),
    ):
        seen.clear()
        handle = model.denoiser.net.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
        joined = sample_many(*request, ranks=ranks, keep=keep, accelerated=[how], **SETTING)
        handle.remove()
        assert (joined is None) == (rank > 0) and (joined is None or torch.equal(joined, first))
        assert seen == batches and own.count() == (10, 0, 4)[rank]

    # rank 2 is killed; the others raise ProcessLost, and the lowest rank reports it
    ranks.barrier()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(ProcessLost, match="rank 2 of the 3 processes of this run has died"):
        ranks.barrier()
    assert time.monotonic() - began < 15
    if rank == 1:
        Path(folder, "quiet").write_text(str(ranks.should_report(own=False)))
    else:
        time.sleep(0.5)  # the first to notice is not the one that reports
        assert ranks.should_report(own=False) and not ranks.should_report(own=True)
    Path(folder, f"fine{rank}").touch()


def stop_sending(rank: int, folder: str) -> None:
    os.environ["HASTEN_TIMEOUT"] = "2"
    ranks = Ranks.start("cpu")
    ranks.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        ranks.broadcast_object(None) if rank else ranks.barrier()
    except ProcessLost as e:
        Path(folder, "silent").write_text(str(e))


def test_collectives_of_three_processes(tmp_path: Path) -> None:
    assert spawn(run_collectives, 3, str(tmp_path)) == [0, 0, -signal.SIGKILL]
    assert len(list(tmp_path.glob("fine*"))) == 2 and (tmp_path / "quiet").read_text() == "False"
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the processes has
    one = hasten.load("fashion").sample(10, ["bag", 3], 5, batch_size=4, **SETTING)
    torch.set_num_threads(before)
    assert torch.equal(one, torch.load(tmp_path / "three.pt"))


@pytest.mark.slow
def test_a_process_without_heartbeats_is_lost(tmp_path: Path) -> None:
    began = time.monotonic()
    spawn(stop_sending, 2, str(tmp_path), seconds=20)
    assert time.monotonic() - began < 40
    assert (tmp_path / "silent").read_text() == (
        "rank 1 of the 2 processes of this run has given no sign of life for 2 s"
    )


def test_without_torchrun_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == 1
    ranks = Ranks.start("cpu")
    assert (ranks.rank, ranks.world, ranks.is_main_process) == (0, 1, True) and not torch.distributed.is_initialized()
    assert ranks.distribute(3, lambda k: (torch.tensor(k),))[2] == (torch.tensor(2),)
    assert (
        ranks.on_main_process(lambda: 5) == ranks.broadcast_object(5) == 5
        and ranks.gather(1) == [1]
        and ranks.should_report(False)
    )
    monkeypatch.setenv("WORLD_SIZE", "2")  # set without a rank
    assert launched() == 1
    monkeypatch.setenv("RANK", "1")  # the shell of a cluster, without a launcher
    assert launched() == 1 and Ranks.start("cpu").is_main_process
    for name, value in (("WORLD_SIZE", "two"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=r"\$WORLD_SIZE must be a whole number, found 'two'"):
        Ranks.start("cpu")


def test_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device(None, 1) == own_device("cuda", 1) == own_device("cuda:1", 1) == torch.device("cuda:1")
    assert own_device("cuda:1", None) == torch.device("cuda:1") and own_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(BadInput, match="a GPU of its own: use cuda, not cuda:1"):
        own_device("cuda:1", 0)
    with pytest.raises(BadInput, match="process 3 of this host finds no GPU of its own, there are 2"):
        own_device(None, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="torch finds no GPU here"):
        own_device("cuda", 0)


def test_saved_batches(tmp_path: Path) -> None:
    store = SavedBatches(tmp_path / "saved", {"seed": 1})
    x = torch.randn(3, 1, 2, 2)
    store.put(4, x)
    found = store.get(4, 3)
    assert found is not None and torch.equal(found, x) and store.count() == 3
    assert store.get(4, 2) is None and store.get(0, 3) is None
    assert SavedBatches(tmp_path / "saved", {"seed": 2}).get(4, 3) is None
    file = next(store.folder.glob("*.npy"))
    file.write_bytes(file.read_bytes()[:-5])
    assert store.get(4, 3) is None
    store.clear()
    assert not (tmp_path / "saved").exists()
    store.clear()  # again: no error


def test_the_key_of_saved_images_covers_all_that_they_depend_on() -> None:
    model = hasten.load("fashion")
    request: dict[str, Any] = {"n": 8, "label": None, "seed": 0, "batch_size": 4}

    def key(changes: dict[str, Any] = {}, **options: Any) -> dict[str, Any]:  # noqa: B006
        return sampling_metadata(model, model.resolve(None, **{**SETTING, **options}), {**request, **changes})

    base = key()
    assert base == key()
    others = [{"n": 9}, {"label": "bag"}, {"seed": 1}, {"batch_size": 8}, {"images": torch.zeros(8, 1, 28, 28)}]
    for other in others:
        assert key(other) != base, other
    changed = {"steps": 2, "sampler": "heun", "precision": "bf16", "guidance_scale": 2.0, "times": "lambda"}
    for name, value in changed.items():
        assert key(**{name: value}) != base, name
    with torch.no_grad():
        next(model.denoiser.parameters()).flatten()[0] += 1
    assert key() != base
    assert (
        saved_batches("/nowhere", CPU, model, model.resolve(None, **SETTING), request) is None
    )  # one process saves nothing


def test_batches_split_labels_as_images() -> None:
    model = hasten.load("fashion")
    for label in (None, "bag", [0, 3, "none"], "none"):
        whole = model.labels(11, label)
        assert whole is not None
        parts = [
            model.labels(len(range(11)[part]), part_of(model, 11, label, part)) for part in (slice(0, 4), slice(4, 11))
        ]
        assert torch.equal(torch.cat(parts), whole)  # type: ignore[arg-type]


def test_accelerators_that_share_a_sampling() -> None:
    branches, space = Shared(frozenset({"branches"})), Shared(frozenset({"space"}))

    def groups(world: int, *accelerators: Any) -> list[Sharing | None]:
        return [sharing(accelerators, Ranks(torch.device("cpu"), rank, world)) for rank in range(world)]

    lead, other = Sharing(0, 1, True), Sharing(0, 1, False)
    assert groups(2, branches) == [lead, other] and groups(3, "encoder_propagation", space) == [lead, other, other]
    assert groups(2, "encoder_propagation") == groups(2) == [None, None] and groups(1, space) == [None]
    # two to an image; and with branches too, of which the second two are those of the first two
    pairs = groups(4, Shared(size=2))
    assert [(each.number, each.count, each.leads) for each in pairs if each] == [
        (0, 2, True),
        (0, 2, False),
        (1, 2, True),
        (1, 2, False),
    ]
    fours = groups(8, branches, Shared(size=2))
    assert [each.number for each in fours if each] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [rank for rank, each in enumerate(fours) if each and each.leads] == [0, 2]


def test_is_alive() -> None:
    assert is_alive(os.getpid()) and not is_alive(2**22 + 1)


def test_heartbeats_end_before_the_interpreter_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def add(self, key: str, amount: int) -> int:
            time.sleep(0.3)  # stands for a call outside of Python, whose end aborts the process
            return amount

    monkeypatch.setattr("hasten.distributed.heartbeat.HEARTBEAT_INTERVAL", 0.01)
    peers = Peers()
    peers.store, peers.heartbeat = Slow(), threading.Thread(target=peers.send_heartbeats, daemon=True)
    peers.heartbeat.start()
    time.sleep(0.1)
    peers.close()
    assert not peers.heartbeat.is_alive()
