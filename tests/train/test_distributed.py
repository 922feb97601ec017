"""Training and distillation on two processes: the run of one with the batch in two parts, whoever goes on with it."""

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
from hasten.denoiser import Denoiser
from hasten.distillers._ema_target import EMATarget
from hasten.distributed.ranks import Ranks
from hasten.errors import BadInput
from hasten.model import Model
from hasten.nets.unet import UNet
from hasten.predictions import V
from hasten.schedules import VPCosine
from hasten.train import Batches, Data, DenoisingLoss
from hasten.train.checkpoint import read_log
from hasten.train.data import Slices, share_of
from hasten.train.draws import Draws
from hasten.train.fit import Fit
from hasten.train.player import TrainedModule
from hasten.workflows.distill import distill_model

from ..processes import children, spawn, torchrun, until

STEPS = 6


def teacher(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    net = UNet(1, widths=(8,), classes=2, embedding=8)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return Model(Denoiser(net, VPCosine(offset=0.0), V()), "tiny", (1, 8, 8), ("a", "b"), guidance_scale=1.0)


def data() -> Data:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=g)
    return Data.of(images, torch.arange(20) % 2, ("a", "b"))


def trained(out: Path, accumulate: int, ends: int = STEPS, shard: bool = False) -> dict[str, torch.Tensor]:
    """A run of STEPS steps of two players that leave one another something, broken off at `ends`; the averages."""
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
    players = [TrainedModule("net", denoiser, first), TrainedModule("critic", critic, second)]
    try:
        made = fit(players, Batches(data(), 8, seed=1, flip=True), out, show=False)
    except InterruptedError:
        return {}
    if shard:
        parts = [(p.to_local().numel(), p.numel()) for p in denoiser.parameters()]  # type: ignore[operator]
        assert sum(mine for mine, _ in parts) < 0.7 * sum(all_ for _, all_ in parts)
    return {f"{name}.{key}": v for name, m in made.items() for key, v in m.state_dict().items()}


def distilled(out: Path, accumulate: int, method: str, steps: int, shard: bool = False) -> None:
    np.savez(out.parent / f"{out.name}.npz", images=data().images(range(20)).numpy()[:, 0], labels=np.arange(20) % 2)
    distill_model(
        teacher(), out, method, data=out.parent / f"{out.name}.npz", steps=steps, batch_size=8, runtime="fp32",
        show=False, accumulate=accumulate, shard=shard,
    )  # fmt: skip


REFLOW = "reflow:pairs=20,pair_steps=2,rounds=1,distill_last=false"
SHARED = "guided:steps=(4,2),guidance=(1,3),shared=true"


HALVED = "progressive:steps=(2,1)"


def two(rank: int, folder: str) -> None:
    out = Path(folder)
    torch.save(trained(out / "two", 1), out / f"two{rank}.pt")
    assert trained(out / "two-one", 1, ends=3) == {}  # which one process will finish
    Ranks.start("cpu").barrier()
    torch.save(trained(out / "one-two", 1), out / f"one-two{rank}.pt")  # which one process began
    # divided: the same run, the same files, whoever began it and whoever goes on
    torch.save(trained(out / "shard", 1, shard=True), out / f"shard{rank}.pt")
    assert trained(out / "shard-one", 1, ends=3, shard=True) == {}
    torch.save(trained(out / "one-shard", 1, shard=True), out / f"one-shard{rank}.pt")
    distilled(out / "reflow2", 1, REFLOW, 3)
    distilled(out / "shared2", 1, SHARED, 4)
    distilled(out / "halved2", 1, HALVED, 4, shard=True)
    if rank:
        with pytest.raises(BadInput, match="multiple of the 2 processes"):
            share_of(Batches(data(), 7), 0, 2)


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.allclose(value, b[key], rtol=1e-4, atol=1e-6), (key, (value - b[key]).abs().max())


def test_two_processes_are_one_with_two_parts(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    for name in ("one-two", "one-shard"):
        assert trained(tmp_path / name, 2, ends=3) == {}
    assert torch.load(tmp_path / "one-two" / "checkpoint.pt")["step"] == 3
    assert spawn(two, 2, str(tmp_path), seconds=240) == [0, 0]
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

    # one process with whole batches draws other numbers: near, and not the same
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
        made = [tmp_path / f"{name}{k}" for k in (1, 2)]
        files = [sorted(p.name for p in m.rglob("*") if "tfevents" not in p.name) for m in made]
        assert files[0] == files[1]
        students = [
            {k: v for p in sorted((m / "stages").rglob("*.safetensors")) for k, v in read(p).items()} for m in made
        ]
        same(*students)
        stages = [json.loads((m / "run.json").read_text())["stages"] for m in made]
        for a, b in zip(*stages, strict=True):
            assert (a["name"], a["steps"]) == (b["name"], b["steps"])
            assert a["evaluations"] == pytest.approx(b["evaluations"], rel=0.02)


def read(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_one_process_has_nothing_to_divide(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is one: start several with torchrun"):
        trained(tmp_path, 1, shard=True)


def test_parts_of_batches_are_the_batch() -> None:
    whole = Batches(data(), 6, seed=2, flip=True)
    for parts in (1, 2, 3):
        for kind in (lambda p, parts=parts: share_of(whole, p, parts), lambda p, parts=parts: Slices(whole, p, parts)):
            got = [kind(p)[5] for p in range(parts)]
            for key in ("x", "label"):
                assert torch.equal(torch.cat([part[key] for part in got]), whole[5][key])
    with pytest.raises(BadInput, match="a batch of 6 cannot be divided into 4 parts"):
        Slices(whole, 0, 4)[0]


def test_draws_of_a_part_do_not_know_the_others() -> None:
    draws = Draws([5, 7])
    seen: list[list[float]] = [[], []]
    for part in (0, 1, 1, 0):
        with draws.of(part):
            seen[part].append(float(torch.rand(())))
    for part, seed in enumerate((5, 7)):
        Draws([seed])
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
def test_a_disturbed_training_says_one_line_and_goes_on(tmp_path: Path, number: int, victim: int | None) -> None:
    np.save(tmp_path / "images.npy", data().images(range(20)).numpy()[:, 0])
    out = tmp_path / "run"
    asked = ["train", str(tmp_path / "images.npy"), "--out", str(out), "--widths", "8", "--batch-size", "8",
             "--runtime", "fp32", "--device", "cpu", "--steps"]  # fmt: skip
    with torchrun(2, *asked, "1000000") as process:
        until(lambda: (out / "log.jsonl").exists() or process.poll() is not None)
        os.kill(process.pid if victim is None else children(process.pid)[victim], number)
        said, err = process.communicate(timeout=120)
    assert process.returncode != 0 and said == ""
    (line,) = [line for line in err.splitlines() if line.startswith("hasten:")]
    if victim is not None:
        assert "of the 2 processes of this run number 1 has died; no checkpoint was written" in line
        return
    step = torch.load(out / "checkpoint.pt")["step"]
    assert f"stopped after {step} steps" in line
    assert main([*asked, str(step + 3)]) == 0  # one process goes on
    assert read_log(out / "log.jsonl")[-1]["step"] == step + 3 and (out / "model.json").is_file()
