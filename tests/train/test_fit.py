"""The training loop: budgets, averages, checkpoints, exact resume, interruption."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hasten.errors import BadInput, HastenError
from hasten.train.checkpoint import read_log
from hasten.train.data import Batches, Data
from hasten.train.ema import Ema
from hasten.train.fit import Fit
from hasten.train.rng import step_seed
from hasten.train.trained_module import TrainedModule
from tests.factories import noise_data, weights


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.2), nn.SiLU(), nn.Linear(8, 16))


def trained_module(module: nn.Module, name: str = "net", **options: object) -> TrainedModule:
    """Denoises with new noise at every step, so that a resumed run must have the same random numbers."""

    def loss(batch: dict[str, Tensor]) -> Tensor:
        noisy = batch["x"] + torch.randn_like(batch["x"])
        return (module(noisy) - batch["x"].flatten(1)).square().mean()

    return TrainedModule(name, module, loss, **options)  # type: ignore[arg-type]


def fit(**options: object) -> Fit:
    return Fit(**{"warmup": 4, "tensorboard": False, "log_steps": 5, **options})  # type: ignore[arg-type]


class Stop(Exception):
    """Simulates a killed process: nothing is saved."""


class Killed(Batches):
    """Batches that raise `Stop` at batch `at`."""

    at = 10

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        if step == self.at:
            raise Stop
        return super().__getitem__(step)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_resume_is_exact_bit_for_bit(tmp_path: Path, optimiser: str) -> None:
    def modules() -> list[TrainedModule]:
        module, critic = net(), nn.Linear(16, 1)
        score = TrainedModule(
            "critic", critic, lambda b: critic(b["x"].flatten(1) + torch.randn(16)).square().mean(), every=3
        )
        return [trained_module(module, optimiser=optimiser), score]

    def batches(kind: type[Batches] = Batches) -> Batches:
        return kind(noise_data(40, 4), 8, seed=5, flip=True)

    full = modules()
    emas = fit(steps=20, seed=7)(full, batches(), tmp_path / "full")

    killed = modules()
    with pytest.raises(Stop):
        # Saves after every step, then stops in step 10 without saving.
        fit(steps=20, seed=7, save_seconds=0)(killed, batches(Killed), tmp_path / "cut")
    torch.manual_seed(12345)
    again = modules()
    with torch.no_grad():
        for p in again:
            for w in p.module.parameters():
                w.normal_()  # everything must come from the checkpoint
    resumed = fit(steps=20, seed=7)(again, batches(), tmp_path / "cut")

    for a, b in zip(full, again, strict=True):
        assert torch.equal(weights(a.module), weights(b.module))
        assert torch.equal(weights(emas[a.name]), weights(resumed[a.name]))
    assert not torch.equal(weights(killed[0].module), weights(again[0].module))
    left, right = (torch.load(tmp_path / d / "checkpoint.pt") for d in ("full", "cut"))
    assert left["step"] == right["step"] == 20
    for name in ("net", "critic"):
        a, b = (c["players"][name]["optimiser"]["state"] for c in (left, right))
        assert a and all(torch.equal(torch.as_tensor(a[i][k]), torch.as_tensor(b[i][k])) for i in a for k in a[i])
    # The log is one curve: no step twice, and the same losses in a window after the resume.
    logs = [read_log(tmp_path / d / "log.jsonl") for d in ("full", "cut")]
    assert [[line["step"] for line in log] for log in logs] == [[5, 10, 15, 20]] * 2
    assert logs[0][-1]["net"] == logs[1][-1]["net"]


def test_a_run_may_be_extended_and_a_finished_one_returns_at_once(tmp_path: Path) -> None:
    fit(steps=6, decay="constant")([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path / "a")
    longer = fit(steps=12, decay="constant")([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path / "a")[
        "net"
    ]
    straight = fit(steps=12, decay="constant")([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path / "b")[
        "net"
    ]
    assert torch.equal(weights(longer), weights(straight))
    again = fit(steps=12, decay="constant")([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path / "b")[
        "net"
    ]
    assert torch.equal(weights(again), weights(straight))


def test_a_checkpoint_without_settings_is_loaded(tmp_path: Path) -> None:
    straight = fit(steps=12, decay="constant")([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path / "b")[
        "net"
    ]
    fit(steps=6, decay="constant")([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path / "a")
    saved = torch.load(tmp_path / "a/checkpoint.pt")
    del saved["run"]
    torch.save(saved, tmp_path / "a/checkpoint.pt")
    resumed = fit(steps=12, decay="constant")([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path / "a")[
        "net"
    ]
    assert torch.equal(weights(resumed), weights(straight))


def test_a_checkpoint_of_another_run_raises(tmp_path: Path) -> None:
    fit(steps=2)([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path)
    for other, batches, modules, message in (
        (
            fit(steps=4, seed=1),
            Batches(noise_data(40, 4), 8),
            [trained_module(net())],
            "a run with seed 0, this one has 1",
        ),
        (fit(steps=4), Batches(noise_data(40, 4), 4), [trained_module(net())], "batch_size 8, this one has 4"),
        (fit(steps=4), Batches(noise_data(9, 4), 8), [trained_module(net())], "images 40, this one has 9"),
        (
            fit(steps=4),
            Batches(noise_data(40, 4), 8),
            [trained_module(net(), "student")],
            "trains net, this run student",
        ),
        (fit(steps=4), Batches(noise_data(40, 4), 8), [trained_module(nn.Linear(2, 2))], "does not fit this network"),
        (
            fit(steps=4),
            Batches(noise_data(40, 4), 8),
            [trained_module(net(), optimiser="muon")],
            "optimiser adamw, this one has muon",
        ),
    ):
        with pytest.raises(BadInput, match=message) as error:
            other(modules, batches, tmp_path)
        assert "\n" not in str(error.value)
    path = tmp_path / "checkpoint.pt"
    raw = path.read_bytes()
    for broken in (raw[: len(raw) // 2], b"", b"junk"):
        path.write_bytes(broken)
        with pytest.raises(BadInput, match=r"cannot read the checkpoint .*checkpoint.pt"):
            fit(steps=4)([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path)
        assert path.read_bytes() == broken


def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(steps=2)([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    save = torch.save

    def half(state: object, file: object) -> None:
        file.write(b"half of a checkpoint")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(HastenError, match=r"cannot write the checkpoint .*No space left"):
        fit(steps=4)([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path)
    monkeypatch.setattr(torch, "save", save)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path, bad: float) -> None:
    module = net()
    sound = trained_module(module).loss
    seen = 0

    def loss(batch: dict[str, Tensor]) -> Tensor:
        nonlocal seen
        seen += 1
        return sound(batch) * (bad if seen == 6 else 1.0)

    with pytest.raises(
        HastenError, match=r"net: the loss or its gradient is not finite at step 5; .*checkpoint.pt was saved before"
    ):
        fit(steps=20, save_seconds=0)([TrainedModule("net", module, loss)], Batches(noise_data(40, 4), 8), tmp_path)
    assert seen == 6
    saved = torch.load(tmp_path / "checkpoint.pt")
    assert saved["step"] == 5
    assert all(w.isfinite().all() for part in ("module", "ema") for w in saved["players"]["net"][part].values())
    with pytest.raises(HastenError, match="no checkpoint was written yet"):
        fit(steps=2)(
            [TrainedModule("net", module, lambda b: sound(b) * bad)], Batches(noise_data(40, 4), 8), tmp_path / "other"
        )
    assert not (tmp_path / "other/checkpoint.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_from_which_the_run_resumes(tmp_path: Path, number: signal.Signals) -> None:
    straight = fit(steps=12)([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path / "full")["net"]
    cut = trained_module(net())
    inner, steps = cut.loss, iter(range(12))

    def loss(batch: dict[str, Tensor]) -> Tensor:
        if next(steps) == 6:
            os.kill(os.getpid(), number)
        return inner(batch)

    cut.loss = loss
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after 7 steps; .*checkpoint.pt is written"):
        fit(steps=12)([cut], Batches(noise_data(40, 4), 8), tmp_path / "cut")
    assert signal.getsignal(number) is before
    assert torch.load(tmp_path / "cut/checkpoint.pt")["step"] == 7
    resumed = fit(steps=12)([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path / "cut")["net"]
    assert torch.equal(weights(resumed), weights(straight))


# ---- averages, rates, budgets ----


def test_the_ema_counts_the_updates_of_each_module(tmp_path: Path) -> None:
    module = nn.Linear(16, 1)
    p = TrainedModule("net", module, lambda b: module(b["x"].flatten(1)).square().mean(), every=2)
    seen: list[Tensor] = []
    inner = p.loss
    p.loss = lambda b: (seen.append(weights(module).clone()), inner(b))[1]
    ema = fit(steps=6, ema=Ema("power", gamma=1.0))([p], Batches(noise_data(40, 4), 8), tmp_path)["net"]
    after = [*seen[1:], weights(module)]  # after the steps 0, 2, 4
    assert len(after) == 3
    expected = (1 * after[0] + 3 * after[1] + 5 * after[2]) / 9  # shares (i^2 - (i-1)^2) / 3^2
    assert torch.allclose(weights(ema), expected, atol=1e-6)
    assert not any(q.requires_grad for q in ema.parameters()) and not ema.training


def test_rate_and_progress() -> None:
    f = Fit(steps=100, minutes=2.0, warmup=10)
    assert f.progress(30, 60.0) == 0.5 and f.progress(70, 60.0) == 0.7 and f.progress(1, 1e9) == 1.0
    assert f.rate(0, 0.0) == pytest.approx(0.1) and f.rate(9, 0.0) == 1.0
    assert f.rate(50, 0.5) == pytest.approx(0.5) and f.rate(100, 1.0) == pytest.approx(0.0)
    assert Fit(steps=1, decay="constant", warmup=0).rate(0, 0.9) == 1.0


def test_the_clock_ends_a_run(tmp_path: Path) -> None:
    began = time.monotonic()
    fit(minutes=0.3 / 60)([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path)
    assert 0.3 <= time.monotonic() - began < 10
    saved = torch.load(tmp_path / "checkpoint.pt")
    assert 0.3 <= saved["seconds"] < 5 and saved["step"] > 1
    step = saved["step"]
    fit(minutes=0.3 / 60)([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path)  # its budget is used up
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == step


def test_the_first_step_is_adamw_s_with_clipping(tmp_path: Path) -> None:
    """Adam's first step is lr sign(g) whatever the clip; with a huge eps-to-gradient ratio the clip shows."""
    module = nn.Linear(4, 1, bias=False)
    nn.init.ones_(module.weight)
    p = TrainedModule("net", module, lambda b: 1e3 * module.weight.sum(), lr=0.01, weight_decay=0.1)
    fit(steps=1, warmup=0, decay="constant")([p], Batches(noise_data(40, 4), 8), tmp_path)
    assert torch.allclose(module.weight, torch.full((1, 4), 1 - 0.01 * 0.1 - 0.01), atol=1e-6)
    log = read_log(tmp_path / "log.jsonl")
    assert log[-1]["net_gradient"] == pytest.approx(2e3)
    state = torch.load(tmp_path / "checkpoint.pt")["players"]["net"]["optimiser"]["state"][0]
    assert torch.allclose(state["exp_avg"], torch.full((1, 4), 0.1 * 0.5))  # gradient of norm 1: 4 entries of 1/2


def test_bf16_trains_float32_weights(tmp_path: Path) -> None:
    module = net()
    kinds = []
    inner = trained_module(module).loss
    p = TrainedModule("net", module, lambda b: (kinds.append(module(b["x"]).dtype), inner(b))[1])
    fit(steps=30, precision="bf16", warmup=0)([p], Batches(noise_data(40, 4), 8), tmp_path)
    assert set(kinds) == {torch.bfloat16}
    assert weights(module).dtype == torch.float32
    log = read_log(tmp_path / "log.jsonl")
    assert log[-1]["net"] < log[0]["net"]


def test_log_and_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    fit(steps=12, tensorboard=True)([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert set(lines[0]) == {"step", "seconds", "steps_per_second", "net", "net_gradient", "lr_factor"}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("net")
    assert [(e.step, e.value) for e in events] == [(e["step"], pytest.approx(e["net"])) for e in lines]


def test_bad_settings(tmp_path: Path) -> None:
    for options, message in (
        ({}, "give steps or minutes"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"steps": 1, "decay": "cosin"}, "unknown decay 'cosin': did you mean 'cosine'"),
        ({"steps": 1, "precision": "fp16"}, "unknown precision 'fp16'"),
    ):
        with pytest.raises(BadInput, match=message):
            Fit(**options)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="unknown optimiser 'adam': did you mean 'adamw'"):
        trained_module(net(), optimiser="adam")
    with pytest.raises(BadInput, match="different names"):
        fit(steps=1)([trained_module(net()), trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path)
    with pytest.raises(HastenError, match="loss must be a scalar"):
        fit(steps=1)([TrainedModule("net", net(), lambda b: b["x"])], Batches(noise_data(40, 4), 8), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cannot write in .*file"):
        fit(steps=1)([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path / "file")
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="device cuda is not available"):
            fit(steps=1, device="cuda")([trained_module(net())], Batches(noise_data(40, 4), 8), tmp_path / "g")


def test_lazy_data_is_prefetched_in_order(tmp_path: Path) -> None:
    eager = noise_data(40, 4)
    lazy = Data(len(eager), eager.shape, eager.fetch, lazy=True)
    a = fit(steps=8)([trained_module(net())], Batches(eager, 8), tmp_path / "a")["net"]
    b = fit(steps=8)([trained_module(net())], Batches(lazy, 8), tmp_path / "b")["net"]
    assert torch.equal(weights(a), weights(b))


def test_seeds_of_processes_and_steps_differ() -> None:
    seeds = [step_seed(seed, step, rank) for seed in (0, 1) for rank in range(4) for step in range(0, 200_000, 20_011)]
    torch.manual_seed(0)
    first = [torch.randn(2, generator=torch.Generator().manual_seed(s)).tolist() for s in seeds]
    assert len({tuple(pair) for pair in first}) == len(seeds)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_the_learning_rate_follows_the_schedule(tmp_path: Path, optimiser: str) -> None:
    """With a constant gradient each step of Adam is its learning rate: the distance is the sum of the rates."""
    module = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(module.weight)
    module = nn.Sequential(module, nn.LayerNorm(1))
    norm = module[1]
    nn.init.zeros_(norm.weight)
    fit = Fit(steps=20, warmup=5, clip=None, tensorboard=False)
    p = TrainedModule("net", module, lambda b: norm.weight.sum() + 0 * module[0].weight.sum(), lr=0.01, weight_decay=0.0,
               optimiser=optimiser)  # fmt: skip
    fit([p], Batches(noise_data(40, 4), 4), tmp_path)
    rates = [fit.rate(k, k / 20) for k in range(20)]
    assert float(norm.weight.detach()) == pytest.approx(-0.01 * sum(rates), rel=1e-4)
    assert min(rates[-3:]) < 0.1 < max(rates) and rates[0] == pytest.approx(0.2)
    assert [line["lr_factor"] for line in read_log(tmp_path / "log.jsonl")][-1] == pytest.approx(0.0, abs=1e-6)


def test_matmul_precision_and_memory_format_are_set_in_training_and_restored(tmp_path: Path) -> None:
    module, seen = nn.Conv2d(1, 4, 3, padding=1), []

    def loss(batch: dict[str, Tensor]) -> Tensor:
        last = batch["x"].is_contiguous(memory_format=torch.channels_last)
        weights = module.weight.stride() == module.weight.contiguous(memory_format=torch.channels_last).stride()
        seen.append((torch.get_float32_matmul_precision(), last and weights, module(batch["x"]).dtype))
        return module(batch["x"]).square().mean()

    pixels = Data.of(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8))
    module = nn.Conv2d(3, 4, 3, padding=1)
    before = torch.get_float32_matmul_precision()
    for precision, expected in (
        ("fp32", ("highest", False, torch.float32)),
        ("fp32+high+channels_last", ("high", True, torch.float32)),
        ("bf16+medium", ("medium", False, torch.bfloat16)),
    ):
        module.to(memory_format=torch.contiguous_format)
        seen.clear()
        fit = Fit(steps=1, precision=precision, tensorboard=False)
        fit([TrainedModule("net", module, loss)], Batches(pixels, 4), tmp_path / precision)
        assert seen == [expected]
        assert torch.get_float32_matmul_precision() == before
    with pytest.raises(BadInput, match="unknown part 'hihg'"):
        Fit(steps=1, precision="fp32+hihg")
