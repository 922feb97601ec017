"""Training and distillation on two processes match one process with two micro-batches, also when resumed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hasten.cli import main
from hasten.distillers._ema_target import EMATarget
from hasten.distributed.gather import gather_rows
from hasten.distributed.ranks import Ranks
from hasten.errors import BadInput
from hasten.model import Model
from hasten.schedules import VPCosine
from hasten.train import Batches, Data, DenoisingLoss
from hasten.train.checkpoint import read_log
from hasten.train.data import BatchSlices, shard_batches
from hasten.train.fit import Fit
from hasten.train.rng import MicroBatchRng
from hasten.train.sadm import Estimates, Sadm, StructureTerm
from hasten.train.trained_module import TrainedModule
from hasten.workflows.distill import distill_model

from ..factories import noise_data, tiny_model
from ..process_groups import children, spawn, torchrun, until

STEPS = 6


def teacher() -> Model:
    return tiny_model(
        ("a", "b"), schedule=VPCosine(offset=0.0), network={"std": 0.1, "trainable": True}, guidance_scale=1.0
    )


def data() -> Data:
    return noise_data(20, classes=("a", "b"))


def trained(out: Path, accumulate: int, ends: int = STEPS, shard: bool = False) -> dict[str, torch.Tensor]:
    """The EMA after STEPS steps of two modules, of which one adds to the batch of the other; {} if interrupted at `ends`."""
    denoiser, critic = teacher().denoiser.requires_grad_(True), nn.Linear(64, 1)
    loss, done = DenoisingLoss(label_drop=0.3), [0]

    def first(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        done[0] += 1
        if done[0] > ends * accumulate:
            raise InterruptedError
        batch["seen"] = torch.randn_like(batch["x"])
        return loss(denoiser, batch)

    def second(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        noise = batch["seen"] + torch.randn_like(batch["x"])
        return (critic((batch["x"] + noise).flatten(1)) - 1).square().mean()

    with torch.no_grad():
        nn.init.constant_(critic.weight, 0.01)
        nn.init.zeros_(critic.bias)
    fit = Fit(steps=STEPS, warmup=2, log_steps=1, tensorboard=False, device="cpu", save_seconds=0, seed=3,
              accumulate=accumulate, shard=shard)  # fmt: skip
    modules = [TrainedModule("net", denoiser, first), TrainedModule("critic", critic, second)]
    try:
        emas = fit(modules, Batches(data(), 8, seed=1, flip=True), out, show=False)
    except InterruptedError:
        return {}
    if shard:
        parts = [(p.to_local().numel(), p.numel()) for p in denoiser.parameters()]  # type: ignore[operator]
        assert sum(local for local, _ in parts) < 0.7 * sum(total for _, total in parts)
    return {f"{name}.{key}": v for name, m in emas.items() for key, v in m.state_dict().items()}


def distilled(out: Path, accumulate: int, method: str, steps: int, shard: bool = False) -> None:
    np.savez(out.parent / f"{out.name}.npz", images=data().images(range(20)).numpy()[:, 0], labels=np.arange(20) % 2)
    distill_model(
        teacher(), out, method, data=out.parent / f"{out.name}.npz", steps=steps, batch_size=8, precision="fp32",
        show=False, grad_accumulation=accumulate, fsdp=shard,
    )  # fmt: skip


REFLOW = "reflow:pairs=20,pair_steps=2,rounds=1,distill_last=false"
SHARED = "guided:steps=(4,2),guidance=(1,3),shared=true"


HALVED = "progressive:steps=(2,1)"


def run_process(rank: int, folder: str) -> None:
    out = Path(folder)
    torch.save(trained(out / "two", 1), out / f"two{rank}.pt")
    assert trained(out / "two-one", 1, ends=3) == {}  # which one process will resume
    Ranks.start("cpu").barrier()
    torch.save(trained(out / "one-two", 1), out / f"one-two{rank}.pt")  # which one process started
    # sharded: the same run and the same files, whichever processes started and resumed it
    torch.save(trained(out / "shard", 1, shard=True), out / f"shard{rank}.pt")
    assert trained(out / "shard-one", 1, ends=3, shard=True) == {}
    torch.save(trained(out / "one-shard", 1, shard=True), out / f"one-shard{rank}.pt")
    distilled(out / "reflow2", 1, REFLOW, 3)
    distilled(out / "shared2", 1, SHARED, 4)
    distilled(out / "halved2", 1, HALVED, 4, shard=True)
    torch.save(structure_gradients(Ranks.start("cpu")), out / f"structure{rank}.pt")
    if rank:
        with pytest.raises(BadInput, match="multiple of the 2 processes"):
            shard_batches(Batches(data(), 7), 0, 2)


def structure_gradients(ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of encoder and estimates of a batch of 8 in equal parts, averaged, and the ratio of the norms."""
    torch.manual_seed(4)
    structure = StructureTerm(Sadm(start=0.0, width=8), (1, 8, 8), ranks)
    real, output = torch.randn(2, 8, 1, 8, 8).split(1)
    part = slice(8 * ranks.rank // ranks.world, 8 * (ranks.rank + 1) // ranks.world)
    real, output = real[0, part], output[0, part].clone().requires_grad_(True)
    weights, groups = torch.linspace(0.1, 1, 8)[part], (torch.arange(8) % 2)[part]
    batch: dict[str, torch.Tensor] = {}
    loss = structure.add(output.square().mean(), output, Estimates(output, 0.5 * output, real, weights, groups), batch)
    (own,) = torch.autograd.grad(loss, output)
    structure.encoder_loss(batch).backward()
    ranks.all_reduce_gradients(structure.parameters(), torch.zeros(()))
    encoder = torch.cat([p.grad.flatten() for p in structure.parameters() if p.grad is not None])
    return encoder, gather_rows(own / ranks.world, ranks), structure.norms[0] / structure.norms[1]


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.allclose(value, b[key], rtol=1e-4, atol=1e-6), (key, (value - b[key]).abs().max())


def test_two_processes_match_one_with_two_micro_batches(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    for name in ("one-two", "one-shard"):
        assert trained(tmp_path / name, 2, ends=3) == {}
    assert torch.load(tmp_path / "one-two" / "checkpoint.pt")["step"] == 3
    assert spawn(run_process, 2, str(tmp_path), seconds=240) == [0, 0]
    one = trained(tmp_path / "one", 2)
    for rank in range(2):
        same(one, torch.load(tmp_path / f"two{rank}.pt"))  # the same random numbers
        for name in ("one-two", "shard", "one-shard"):  # from 1 process to 2
            same(one, torch.load(tmp_path / f"{name}{rank}.pt"))
    for name in ("two-one", "shard-one"):  # from 2 to 1
        same(one, trained(tmp_path / name, 2))
    names = ("one", "two", "one-two", "two-one", "shard", "one-shard", "shard-one")
    logs = {name: read_log(tmp_path / name / "log.jsonl") for name in names}
    for name, log in logs.items():
        assert [line["step"] for line in log] == list(range(1, STEPS + 1)), name
        for line, other in zip(log, logs["one"], strict=True):
            for key in ("net", "critic", "net_gradient"):
                assert line[key] == pytest.approx(other[key], rel=1e-4), (name, key)

    # relations of all samples, of both processes
    whole = structure_gradients(Ranks(torch.device("cpu")))
    for rank in range(2):
        for a, b in zip(torch.load(tmp_path / f"structure{rank}.pt"), whole, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)

    # one process without micro-batches has other random numbers: near, and not the same
    plain = trained(tmp_path / "plain", 1)
    log = read_log(tmp_path / "plain" / "log.jsonl")
    mean = [sum(line["net"] for line in each) / STEPS for each in (log, logs["one"])]
    assert mean[0] == pytest.approx(mean[1], rel=0.15)
    assert not torch.equal(plain["net.net.conv_in.weight"], one["net.net.conv_in.weight"])

    # the pairs of reflow are the same bytes; the students are those of one process with two parts
    distilled(tmp_path / "reflow1", 2, REFLOW, 3)
    assert digest(tmp_path / "reflow1" / "pairs") == digest(tmp_path / "reflow2" / "pairs")
    distilled(tmp_path / "shared1", 2, SHARED, 4)
    distilled(tmp_path / "halved1", 2, HALVED, 4)
    for name in ("reflow", "shared", "halved"):
        folders = [tmp_path / f"{name}{k}" for k in (1, 2)]
        files = [sorted(p.name for p in m.rglob("*") if "tfevents" not in p.name) for m in folders]
        assert files[0] == files[1]
        students = [
            {k: v for p in sorted((m / "stages").rglob("*.safetensors")) for k, v in read(p).items()} for m in folders
        ]
        same(*students)
        stages = [json.loads((m / "run.json").read_text())["stages"] for m in folders]
        for a, b in zip(*stages, strict=True):
            assert (a["name"], a["steps"]) == (b["name"], b["steps"])
            assert a["evaluations"] == pytest.approx(b["evaluations"], rel=0.02)


def read(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_one_process_cannot_shard(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is one: start several with torchrun"):
        trained(tmp_path, 1, shard=True)


def test_concatenated_parts_are_the_batch() -> None:
    batches = Batches(data(), 6, seed=2, flip=True)
    for parts in (1, 2, 3):
        for kind in (
            lambda p, parts=parts: shard_batches(batches, p, parts),
            lambda p, parts=parts: BatchSlices(batches, p, parts),
        ):
            got = [kind(p)[5] for p in range(parts)]
            for key in ("x", "label"):
                assert torch.equal(torch.cat([part[key] for part in got]), batches[5][key])
    with pytest.raises(BadInput, match="a batch of 6 cannot be divided into 4 parts"):
        BatchSlices(batches, 0, 4)[0]


def test_random_numbers_of_a_micro_batch_are_independent_of_the_others() -> None:
    rng = MicroBatchRng([5, 7])
    seen: list[list[float]] = [[], []]
    for part in (0, 1, 1, 0):
        with rng.fork(part):
            seen[part].append(float(torch.rand(())))
    for part, seed in enumerate((5, 7)):
        MicroBatchRng([seed])
        assert seen[part] == [float(torch.rand(())) for _ in range(2)]


def test_a_shadow_moves_once_a_step() -> None:
    shadow = EMATarget(teacher().denoiser)
    shadow.advance()
    with torch.no_grad():
        for p in shadow.student.parameters():
            p.add_(1)
    assert shadow.completed_steps() == 1 and shadow.update(0.5, corrected=False) == 1
    shadow.again = True
    moved = [p.clone() for p in shadow.copy.parameters()]
    assert shadow.completed_steps() == 1 and shadow.update(0.5, corrected=False) == 1 and int(shadow.count) == 2
    assert all(torch.equal(a, b) for a, b in zip(moved, shadow.copy.parameters(), strict=True))
    shadow.again = False
    assert shadow.update(0.5, corrected=False) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("number", "victim"), [(signal.SIGINT, None), (signal.SIGKILL, 1)])
def test_an_interrupted_training_prints_one_line_and_resumes(tmp_path: Path, number: int, victim: int | None) -> None:
    np.save(tmp_path / "images.npy", data().images(range(20)).numpy()[:, 0])
    out = tmp_path / "run"
    words = ["train", str(tmp_path / "images.npy"), "--out", str(out), "--widths", "8", "--batch-size", "8",
             "--precision", "fp32", "--device", "cpu", "--steps"]  # fmt: skip
    with torchrun(2, *words, "1000000") as process:
        until(lambda: (out / "log.jsonl").exists() or process.poll() is not None)
        os.kill(process.pid if victim is None else children(process.pid)[victim], number)
        output, err = process.communicate(timeout=120)
    assert process.returncode != 0 and output == ""
    summary = f"hasten: {tmp_path / 'images.npy'}: 20 images"
    (line,) = [line for line in err.splitlines() if line.startswith("hasten:") and not line.startswith(summary)]
    if victim is not None:
        assert "rank 1 of the 2 processes of this run has died; no checkpoint was written" in line
        return
    step = torch.load(out / "checkpoint.pt")["step"]
    assert f"stopped after {step} steps" in line
    assert main([*words, str(step + 3)]) == 0  # one process resumes
    assert read_log(out / "log.jsonl")[-1]["step"] == step + 3 and (out / "model.json").is_file()
