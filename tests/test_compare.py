"""Comparisons: which rows run, their fields, interruption and resuming."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hasten import SamplingConfig
from hasten.compare import compare, comparison, jobs, variants
from hasten.compare import runner as engine
from hasten.compare.advice import set_equal_time_row
from hasten.compare.counting import count_evaluations
from hasten.errors import BadInput
from hasten.images import to_uint8
from hasten.metrics import Reference, make_reference
from hasten.metrics.difference import image_difference
from hasten.model import Model

from .factories import tiny_model

SET = """
n = 12
rounds = 2
[reference]
name = "best"
sampler = "unipc:order=3"
times = "lambda"
steps = 12
guidance_scale = 2.0
[[variant]]
name = "DDIM"
sampler = "ddim"
steps = [2, 4]
[[variant]]
name = "UniPC"
sampler = "unipc:order=3"
steps = 4
[[variant]]
name = "plain Heun"
sampler = "heun"
steps = 2
guidance_scale = 1
"""


class Corner(torch.nn.Module):
    """A feature network that looks at four pixels and always sees class 1."""

    name = "corner"

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images[:, 0, :2, :2].flatten(1), torch.tensor([[0.0, 1.0, 0.0]]).expand(len(images), 3)


def real() -> Reference:
    """Statistics of images of noise."""
    images = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    features, logits = Corner()(images)
    statistics = make_reference(features, "noise", "test", "corner", torch.arange(60) % 3, logits)
    return dataclasses.replace(statistics, floor={**statistics.floor, "frechet": {12: 0.25}})


@pytest.fixture
def variant_file(tmp_path: Path) -> Path:
    path = tmp_path / "set.toml"
    path.write_text(SET)
    return path


@pytest.fixture
def run(variant_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`compare` of the tiny model on the small set, in the folder `out`; pages are written only where `page` asks."""
    write = comparison.report.write_report

    def start(model: Model | None = None, page: bool = False, **others: Any) -> list[dict[str, Any]]:
        monkeypatch.setattr(comparison.report, "write_report", write if page else lambda out, *_: out / "report.html")
        options: dict[str, Any] = {"reference": real(), "features": Corner(), "precision": "fp32", "timing_batch": 3}
        options |= {"out": tmp_path / "out", "show": False, "variants": variant_file, **others}
        return compare(tiny_model() if model is None else model, **options)

    return start


def of(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row["name"] == name)


# Which rows


def test_every_cost_has_the_reference_with_fewer_steps() -> None:
    rows = variants.load_variants("full", "lambda", 2.0).rows()
    by_method = {variant.method: variant for variant, _ in rows}
    assert len(by_method) == len(rows), "a row is run twice"
    reference = rows[0][0]
    for variant, equal in rows[1:]:
        assert equal is not None
        assert (equal.sampler, equal.times, equal.guidance_scale) == (reference.sampler, "lambda", 2.0)
        assert equal.nfe <= variant.nfe
        longer = dataclasses.replace(reference, steps=equal.steps + 1)
        assert longer.nfe > variant.nfe or equal.steps == reference.steps
        assert equal.method in by_method


def test_a_variant_that_is_the_equal_cost_row_is_not_run_twice(variant_file: Path) -> None:
    rows = variants.load_variants(variant_file).rows()
    # Guided DDIM: 4 and 8 evaluations; UniPC in 4 steps is what the reference does with 8; unguided Heun takes 3.
    assert [(v.name, v.role, v.nfe, e and e.name) for v, e in rows] == [
        ("best", "reference", 24, None),
        ("DDIM, 2 steps", "variant", 4, "best, 2 steps"),
        ("DDIM, 4 steps", "variant", 8, "UniPC"),
        ("UniPC", "variant", 8, "UniPC"),
        ("plain Heun", "variant", 3, "best, 1 step"),
        ("best, 1 step", "equal-cost", 2, "best, 1 step"),
        ("best, 2 steps", "equal-cost", 4, "best, 2 steps"),
    ]


def test_a_cost_below_one_step_of_the_reference_has_no_equal() -> None:
    data = {"reference": {"sampler": "unipc", "steps": 8, "guidance_scale": 3.0},
            "variant": [{"name": "one", "sampler": "ddim", "steps": 1, "guidance_scale": 1.0}]}  # fmt: skip
    rows = variants.parse_variants(data).rows()
    assert [(v.name, e) for v, e in rows] == [("reference", None), ("one", None)]


def test_lists_are_a_product_and_the_rest_is_the_references() -> None:
    data = {"reference": {"sampler": "unipc", "steps": 8, "times": "karras", "guidance_scale": 3.0},
            "variant": [{"name": "x", "sampler": ["ddim", "heun"], "steps": [2, 4]}]}  # fmt: skip
    expanded = variants.parse_variants(data).variants
    assert [v.name for v in expanded] == [f"x {s}, {n} steps" for s in ("ddim", "heun") for n in (2, 4)]
    assert {(v.times, v.guidance_scale) for v in expanded} == {("karras", 3.0)}


@pytest.mark.parametrize("name", ["demo", "full"])
def test_the_bundled_sets_can_be_run(name: str) -> None:
    assert name in variants.variant_set_names()
    bundled = variants.load_variants(name, "angle", 1.5)
    jobs.prepare(tiny_model(), bundled)
    assert (bundled.reference.times, bundled.reference.guidance_scale) == ("angle", 1.5)
    jobs.prepare(tiny_model(classes=None), variants.load_variants(name))


# What a row holds


def test_rows_hold_cost_quality_and_protocol(run: Any, tmp_path: Path) -> None:
    rows = run(page=True)
    assert [row["nfe"] for row in rows] == [24, 4, 8, 8, 3, 2, 4]
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [row | json.loads(line) for row, line in zip(rows, lines, strict=True)] == rows
    best, ddim = rows[0], of(rows, "DDIM, 4 steps")
    assert best["speedup"] == 1 and best["psnr"] is None
    assert ddim["macs_per_image"] * 3 == best["macs_per_image"] > 0
    for row in rows:
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert row["seconds_per_image"] > 0
        assert row["peak_memory"] > 1e6
        assert row["frechet_low"] <= row["frechet"] <= row["frechet_high"]
        assert row["accuracy"] == pytest.approx(1 / 3)  # labels take turns, the classifier always says 1
        p = row["protocol"]
        assert (p["n"], p["seeds"], p["features"], p["floors"]["frechet"]) == (12, [0, 11], "corner", 0.25)
        assert p["reference"].startswith("noise, test split, 60")
        assert {"hardware", "threads", "torch", "dtype", "date", "command"} <= p.keys()
    assert ddim["equal_cost"] == "UniPC" and of(rows, "UniPC")["is_equal_cost"]
    assert ddim["frechet_over_equal_cost"] == pytest.approx(ddim["frechet"] / of(rows, "UniPC")["frechet"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.jsonl", "report.html", "front.png", "grid.png", "timing.json", "samples", "configs"}  # fmt: skip


def test_the_difference_is_to_the_references_images_of_the_same_seeds(run: Any) -> None:
    model = tiny_model()
    rows = run(model, seed=5, batch_size=5)
    best = model.sample(12, seed=5, sampler="unipc:order=3", times="lambda", steps=12, guidance_scale=2.0)
    for name, sampler, steps, scale in (("DDIM, 2 steps", "ddim", 2, 2.0), ("plain Heun", "heun", 2, 1.0)):
        images = model.sample(12, seed=5, sampler=sampler, times="lambda", steps=steps, guidance_scale=scale)
        square = ((images - best) / 2).square()
        row = of(rows, name)
        assert row["rms"] == pytest.approx(float(square.mean().sqrt()), rel=1e-2)
        psnr = (-10 * square.flatten(1).mean(1).log10()).mean()
        assert row["psnr"] == pytest.approx(float(psnr), abs=0.05)


def test_an_accelerated_row_is_compared_with_the_best_row_that_takes_no_more_time() -> None:
    def row(name: str, seconds: float, frechet: float | None, *accelerators: str) -> dict[str, Any]:
        return {"name": name, "seconds_per_image": seconds, "frechet": frechet, "accelerators": list(accelerators)}

    rows = [row("50", 5, 1.0), row("30", 3, 1.5), row("25", 2.5, 1.2), row("60", 6, 0.5), row("other", 1, 0.1, "deep")]
    accelerated = row("50 with reuse", 3, 0.9, "deep")
    set_equal_time_row(accelerated, [*rows, accelerated])
    assert accelerated["equal_cost"] == "25" and accelerated["frechet_over_equal_cost"] == pytest.approx(0.75)
    for alone in (row("fastest", 0.1, 0.9, "deep"), row("without statistics", 3, None, "deep")):
        before = dict(alone)
        set_equal_time_row(alone, rows)
        assert alone == before


def test_difference_of_known_images() -> None:
    a = torch.zeros(2, 1, 4, 4)
    assert image_difference(a, a) == {"psnr": 100.0, "rms": 0.0}
    b = a + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)  # 0.1 and 0.01 of the range: 20 dB and 40 dB
    figures = image_difference(b, a)
    assert figures["psnr"] == pytest.approx(30, abs=1e-4)
    assert figures["rms"] == pytest.approx(((0.01 + 0.0001) / 2) ** 0.5, rel=1e-5)


def test_guided_evaluations_are_counted_twice() -> None:
    model = tiny_model()
    for scale, expected in ((1.0, 3 * 4), (2.0, 3 * 4 * 2)):
        with count_evaluations(model) as count:
            model.sample(3, sampler="ddim", times="lambda", steps=4, guidance_scale=scale, batch_size=2)
        assert count == [expected]
    model.sample(1)
    assert count == [24], "the count goes on after the block"


def test_a_model_without_statistics_gets_costs_alone(run: Any) -> None:
    rows = run(reference=None, features=None)
    assert {row["frechet"] for row in rows} == {None}
    assert all(row["psnr"] > 0 for row in rows[1:])


def test_an_unconditional_model(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "plain.toml"
    path.write_text(SET.replace("guidance_scale = 2.0", ""))
    rows = run(tiny_model(classes=None), variants=path)
    assert [row["nfe"] for row in rows] == [12, 2, 4, 4, 3, 2, 3]
    assert all("accuracy" not in row or row["accuracy"] is None for row in rows)


# Stops and second runs


def test_a_second_run_reuses_finished_rows(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    first = run()
    calls: list[str] = []
    sample = comparison.Comparison.sample
    monkeypatch.setattr(
        comparison.Comparison, "sample", lambda self, job, n: calls.append(job.key) or sample(self, job, n)
    )
    assert run() == first
    assert calls == []
    assert "7 of 7 rows are finished" in capsys.readouterr().err


def test_each_row_leaves_a_config_that_samples_as_it_did(run: Any, tmp_path: Path) -> None:
    rows = run()
    configs = sorted((tmp_path / "out" / "configs").glob("*.toml"))
    assert len(configs) == len(rows)
    model, images = (
        tiny_model(),
        {row["key"]: np.load(tmp_path / "out" / "samples" / f"{row['key']}.npy") for row in rows},
    )
    resampled = []
    for path in configs:
        x = to_uint8(model.sample(3, config=SamplingConfig.load(path))).transpose(0, 3, 1, 2)
        resampled += [key for key, stored in images.items() if np.array_equal(x, stored[:3])]
    assert set(resampled) == set(images)
    assert "# of the model" in configs[0].read_text()


def test_other_settings_are_other_rows(run: Any, variant_file: Path, tmp_path: Path) -> None:
    head, _, unipc, _ = SET.split("[[variant]]\n")
    few = f"{head}[[variant]]\n{unipc}"
    variant_file.write_text(few)
    first = run()
    assert len(first) >= 2
    for other in ({"seed": 1}, {"n": 13}, {"model": tiny_model(seed=1)}, {"reference": None, "features": None}):
        assert not {row["key"] for row in run(**other)} & {row["key"] for row in first}
    variant_file.write_text(few.replace("steps = 12", "steps = 11"))  # the others are measured against it
    assert not {row["key"] for row in run()} & {row["key"] for row in first}
    variant_file.write_text(few.replace('name = "UniPC"', 'name = "another name"'))
    assert [row["key"] for row in run()] == [row["key"] for row in first]
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert len(lines) == len(first) * 6
    run(page=True)
    assert (tmp_path / "out" / "report.html").read_text().count('<tr class="') == len(first)


def test_a_row_added_later_is_timed_together_with_the_old_ones(run: Any, variant_file: Path) -> None:
    first = run()
    variant_file.write_text(SET + '[[variant]]\nname = "late"\nsampler = "ddim"\nsteps = 3\n')
    rows = run()
    assert of(rows, "late")["nfe"] == 6
    again = of(rows, "UniPC")
    assert again["key"] == of(first, "UniPC")["key"] and again["frechet"] == of(first, "UniPC")["frechet"]
    assert again["seconds_per_image"] != of(first, "UniPC")["seconds_per_image"]


def test_ctrl_c_saves_the_finished_rows(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    evaluate = comparison.Comparison.evaluate_row

    def stop(self: comparison.Comparison, job: jobs.Job, *others: Any) -> dict[str, Any]:
        if job.variant.name == "UniPC":
            raise KeyboardInterrupt
        return evaluate(self, job, *others)

    monkeypatch.setattr(comparison.Comparison, "evaluate_row", stop)
    with pytest.raises(KeyboardInterrupt, match=r"3 of 7 rows are saved in .*out; the same command resumes"):
        run(page=True)
    saved = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["name"] for row in saved] == ["best", "DDIM, 2 steps", "DDIM, 4 steps"]
    assert "3 of 7 rows have finished" in (tmp_path / "out" / "report.html").read_text()
    monkeypatch.setattr(comparison.Comparison, "evaluate_row", evaluate)
    rows = run(page=True)
    assert len(rows) == 7
    assert [row["frechet"] for row in rows[:3]] == [row["frechet"] for row in saved]
    assert "have finished" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.timeout(180)
def test_a_real_ctrl_c_in_the_middle(tmp_path: Path, variant_file: Path) -> None:
    """The command, interrupted in its fourth row: the rows and their report are on disk, one line is said, 130."""
    out = tmp_path / "out"
    tiny_model().save(tmp_path / "model")
    code = (
        # a test run in the background ignores Ctrl-C, and so would its children
        "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from hasten import cli\nfrom hasten.compare.comparison import Comparison\nevaluate = Comparison.evaluate_row\n"
        "def slow(self, job, *others):\n    if job.variant.name == 'UniPC': time.sleep(120)\n"
        "    return evaluate(self, job, *others)\nComparison.evaluate_row = slow\nsys.exit(cli.main(sys.argv[1:]))"
    )
    words = ["compare", tmp_path / "model", "--variants", variant_file, "--out", out, "--precision", "fp32"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "results.jsonl").exists() and len((out / "results.jsonl").read_text().splitlines()) == 3:
            break
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("hasten: stopped: 3 of 7 rows are saved in ")
    assert len((out / "results.jsonl").read_text().splitlines()) == 3
    assert "3 of 7 rows have finished" in (out / "report.html").read_text()
    assert "Report: " in said


def test_other_hardware_is_timed_again_and_reuses_the_images(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = run()
    monkeypatch.setattr(engine, "processor", lambda device: "another CPU")
    rows = run()
    assert {row["protocol"]["hardware"] for row in rows} == {"another CPU"}
    assert [row["frechet"] for row in rows] == [row["frechet"] for row in first]
    assert [row["seconds_per_image"] for row in rows] != [row["seconds_per_image"] for row in first]


def test_a_reference_whose_images_are_gone_is_sampled_again(run: Any, variant_file: Path, tmp_path: Path) -> None:
    first = run()
    (tmp_path / "out" / "samples" / f"{first[0]['key']}-all.npy").unlink()
    variant_file.write_text(SET + '[[variant]]\nname = "late"\nsampler = "ddim"\nsteps = 3\n')
    assert of(run(), "late")["psnr"] > 0


def test_a_folder_with_something_else_in_it_is_refused(run: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_text('{"key": "a"}\nnot json\n')
    with pytest.raises(BadInput, match=r"results\.jsonl, row 1: not a row of hasten compare"):
        run()
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write"):
        run(out=tmp_path / "file")
