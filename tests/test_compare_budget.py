"""Comparisons within a time budget: the time is kept, rows have equal numbers of images, a second run resumes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.compare import budget, budgeted, compare, comparison, runner
from hasten.errors import BadInput
from hasten.metrics import Reference, make_reference
from hasten.model import Model

from .factories import tiny_model
from .test_compare import Corner

SET = """
n = 500
[reference]
name = "best"
sampler = "ddim"
steps = 16
guidance_scale = 2.0
[[variant]]
name = "DDIM"
sampler = "ddim"
steps = [2, 4, 8]
[[variant]]
name = "Heun"
sampler = "heun"
steps = 4
"""
NFE = {"best": 32, "DDIM, 2 steps": 4, "DDIM, 4 steps": 8, "DDIM, 8 steps": 16, "Heun": 14, "best, 7 steps": 14}


class Clock:
    """A clock that only moves when a network runs: `cost` seconds per image."""

    def __init__(self, cost: float) -> None:
        self.now, self.cost, self.images = 1000.0, cost, 0

    def __call__(self) -> float:
        return self.now

    def watch(self, net: torch.nn.Module, factor: float = 1.0) -> None:
        def hook(_: Any, arguments: tuple[Any, ...]) -> None:
            self.now += factor * self.cost * len(arguments[0])
            self.images += len(arguments[0])

        net.register_forward_pre_hook(hook)


def real() -> Reference:
    """Statistics of 1,000 images of noise."""
    images = torch.randn(1000, 1, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    features, logits = Corner()(images)
    return dataclasses.replace(
        make_reference(features, "noise", "test", "corner", torch.arange(1000) % 3, logits), floor={}
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(0.01)
    monkeypatch.setattr(budget, "monotonic_seconds", clock)
    monkeypatch.setattr(runner, "set_faster_threads", lambda: 1)
    monkeypatch.setattr(comparison.report, "write_report", lambda out, *_: out / "report.html")
    return clock


@pytest.fixture
def run(tmp_path: Path, clock: Clock) -> Any:
    """`compare` of a slow tiny model on the small set, in the folder `out`."""
    (tmp_path / "set.toml").write_text(SET)

    def start(minutes: float, model: Model | None = None, **options: Any) -> dict[str, dict[str, Any]]:
        model = tiny_model() if model is None else model
        clock.watch(model.denoiser.net)
        options = {"reference": real(), "features": Corner(), "precision": "fp32", "show": False, **options}
        rows = compare(model, tmp_path / "set.toml", out=tmp_path / "out", minutes=minutes, **options)
        return {row["name"]: row for row in rows}

    return start


@pytest.mark.parametrize("minutes", [4.0, 6.0])
def test_the_number_of_images_follows_from_the_budget(run: Any, clock: Clock, capsys: Any, minutes: float) -> None:
    start = clock.now
    rows = run(minutes)
    assert 0.75 * 60 * minutes <= clock.now - start <= 60 * minutes
    assert {name: row["nfe"] for name, row in rows.items()} == NFE
    protocol = rows["best"]["protocol"]
    n = protocol["n"]
    assert 64 <= n < 500 and n % 16 == 0 and protocol["seeds"] == [0, n - 1]
    assert n + 16 > 0.9 * 60 * minutes / (0.01 * sum(NFE.values())) - 16
    assert all(row["protocol"]["n"] == n and row["protocol"]["rounds"] == protocol["rounds"] for row in rows.values())
    for name, row in rows.items():
        assert row["speedup"] == pytest.approx(32 / NFE[name]) and row["frechet"] > 0
        assert row["protocol"]["floors"]["frechet"] > 0
    said = capsys.readouterr().err
    assert f"{n} images a row, timed in {protocol['rounds']} rounds; {n} real images have a distance of" in said
    assert ("samples are too few for precision" in said) == (n < 200)
    first = next(line for line in said.splitlines() if line.startswith("["))
    assert first.startswith("[1/6] DDIM, 2 steps: 4 NFE, 40 ms an image, distance") and "(real images" in first


def test_a_fast_model_gets_all_images_and_they_are_those_of_a_run_without_a_budget(
    run: Any, clock: Clock, tmp_path: Path
) -> None:
    clock.cost = 1e-6
    rows = run(1.0, n=96)
    assert rows["best"]["protocol"]["n"] == 96
    options: dict[str, Any] = {"n": 96, "reference": real(), "features": Corner(), "precision": "fp32", "show": False}
    plain = {
        row["name"]: row for row in compare(tiny_model(), tmp_path / "set.toml", out=tmp_path / "plain", **options)
    }
    for name, row in rows.items():
        assert row["key"] == plain[name]["key"]
        for figure in ("frechet", "kid", "accuracy", *(() if name == "best" else ("psnr",))):
            assert row[figure] == pytest.approx(plain[name][figure], rel=1e-2, abs=1e-3), (name, figure)


@pytest.mark.parametrize("factor", [2.0, 5.0])
def test_the_budget_holds_where_the_device_becomes_slower(run: Any, clock: Clock, factor: float) -> None:
    model = tiny_model()

    def slow_down(_: Any, arguments: tuple[Any, ...]) -> None:
        if clock.now > 1000 + 100:
            clock.now += (factor - 1) * clock.cost * len(arguments[0])

    model.denoiser.net.register_forward_pre_hook(slow_down)
    start = clock.now
    rows = run(4.0, model)
    assert clock.now - start <= 1.1 * 240
    assert len({row["protocol"]["n"] for row in rows.values()}) == 1


def test_the_last_rows_are_skipped_and_a_second_run_measures_them(
    run: Any, clock: Clock, capsys: Any, tmp_path: Path
) -> None:
    start = clock.now
    rows = run(0.9)
    assert clock.now - start <= 1.1 * 54
    assert list(rows) == list(NFE)[: len(rows)] and 2 <= len(rows) < 6
    said = capsys.readouterr().err
    skipped = [name for name in NFE if name not in rows]
    assert f"skipped, for 0.9 minutes are too few for all rows: {', '.join(skipped)}" in said
    images, start = clock.images, clock.now
    more = run(2.0)
    assert list(more) == list(NFE) and clock.now - start <= 1.1 * 120
    assert more["best"]["protocol"]["n"] >= rows["best"]["protocol"]["n"]
    assert clock.images > images
    images = clock.images
    assert run(2.0) == more
    assert clock.images - images <= 200  # `prepare` and nothing else
    assert "they share some" not in capsys.readouterr().err
    assert not list((tmp_path / "out" / "samples" / "kept").glob("*/*"))


def test_few_images_where_not_even_the_reference_fits(run: Any, clock: Clock, capsys: Any) -> None:
    start = clock.now
    rows = run(0.3)
    assert clock.now - start <= 1.1 * 18
    assert 10 <= rows["best"]["protocol"]["n"] < 64
    assert "images a row fit into 0.3 minutes" in capsys.readouterr().err


def test_a_budget_below_one_batch_is_refused_with_a_number(run: Any) -> None:
    with pytest.raises(BadInput, match=r"0.01 minutes are too few for 10 images of the reference 'best': give about"):
        run(0.01)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_that_is_no_time_is_refused(run: Any, tmp_path: Path, wrong: float) -> None:
    with pytest.raises(BadInput, match="minutes must be a number above 0"):
        run(wrong)
    with pytest.raises(BadInput, match="one block of seeds"):
        run(1.0, repeats=2)
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_an_interrupted_run_reports_its_rows_and_resumes(
    run: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    first_images = budgeted.BudgetedComparison.first_images
    sampled: list[str] = []

    def stop(self: Any, state: budget.RowState) -> None:
        if state.job.variant.name == "Heun" and "Heun" not in sampled:
            sampled.append("Heun")
            raise KeyboardInterrupt
        sampled.append(state.job.variant.name)
        first_images(self, state)

    monkeypatch.setattr(budgeted.BudgetedComparison, "first_images", stop)
    with pytest.raises(KeyboardInterrupt, match=r"4 of 6 rows are saved in .*out; the same command resumes"):
        run(4.0)
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["protocol"]["n"] for row in lines] == [64] * 4 and all(row["frechet"] > 0 for row in lines)
    sampled[:] = ["Heun"]
    capsys.readouterr()
    rows = run(4.0)
    assert sampled == ["Heun", "Heun", "best, 7 steps"]
    assert "4 of 6 rows have their first images" in capsys.readouterr().err
    assert list(rows) == list(NFE) and rows["best"]["protocol"]["n"] > 64
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 6, "rows of the first images are replaced"


def test_a_row_that_fails_is_marked_and_the_others_have_figures(run: Any, tmp_path: Path) -> None:
    (tmp_path / "set.toml").write_text(SET + '[[variant]]\nname = "boom"\nguidance_scale = 1e38\n')
    rows = run(4.0)
    assert "network evaluation" in rows["boom"]["failed"] and rows["boom"]["psnr"] is None
    assert all(row["frechet"] > 0 for name, row in rows.items() if name != "boom")


def test_a_model_without_statistics_has_costs_and_differences(run: Any) -> None:
    rows = run(4.0, reference=None, features=None)
    assert {row["frechet"] for row in rows.values()} == {None}
    assert all(row["psnr"] > 0 for name, row in rows.items() if name != "best")


def test_the_baseline_of_few_real_images() -> None:
    known = real()
    small, large = (budget.real_data_baseline(known, n)["frechet"] for n in (32, 128))
    assert 0 < large < small
    assert budget.real_data_baseline(known, 600) == {} == budget.real_data_baseline(None, 64)
    assert budget.real_data_baseline(dataclasses.replace(known, floor={"frechet": {64: 0.5}}), 64) == {}
