"""Comparisons of models of prompts, of samples that are no images, in blocks of seeds, and with rows that fail."""

from __future__ import annotations

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
from torch import Tensor, nn

from hasten.compare import compare, comparison, jobs
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.model import Model
from hasten.progress import ProgressReporter
from hasten.schedules import VPCosine
from hasten.workflows.prompts import bundled_prompts, read_prompts

from .factories import run_cli, tiny_model

SMALL = """
n = 10
rounds = 1
[reference]
sampler = "ddim"
steps = 4
guidance_scale = {0}
[[variant]]
name = "less"
steps = 2
"""


WITH_PAGE = {"test_one_failed_row_is_marked_and_the_others_run"}


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pages are written only where a test is about them."""
    if request.node.name not in WITH_PAGE:
        monkeypatch.setattr(comparison.report, "write_report", lambda out, *_: out / "report.html")


def run(model: Model, folder: Path, text: str, **more: Any) -> dict[str, dict[str, Any]]:
    (folder / "set.toml").write_text(text)
    options = {"out": folder / "out", "show": False, "precision": "fp32", "timing_batch": 1, **more}
    return {row["name"]: row for row in compare(model, folder / "set.toml", **options)}


# Prompts


class PromptNet(nn.Module):
    """A network whose output depends on the length of a prompt."""

    null_conditions = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.evaluated: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, text: Tensor, **null: Tensor) -> Tensor:
        self.evaluated.append(text)
        return self.conv(x) * 0.3 + text.view(-1, 1, 1, 1) / 100


class Prompts:
    def texts(self, n: int, prompt: Any = None) -> list[str]:
        prompts = [prompt] if prompt is None or isinstance(prompt, str) else prompt
        return [prompts[k % len(prompts)] or "" for k in range(n)]

    def cond(self, n: int, prompt: Any = None, seed: int = 0) -> dict[str, Tensor]:
        text = torch.tensor([float(len(each)) for each in self.texts(n, prompt)])
        return {"text": text, "null_text": torch.zeros(n)}

    def to(self, device: Any) -> Prompts:
        return self


def prompt_model() -> Model:
    denoiser = Denoiser(PromptNet(), VPCosine(), "v").eval().requires_grad_(False)
    return Model(denoiser, "asks", (1, 4, 4), conditioning=Prompts(), guidance_scale=3.0)


def test_prompts_reach_every_row_and_are_in_the_protocol(tmp_path: Path) -> None:
    model = prompt_model()
    rows = run(model, tmp_path, SMALL.format(3.0), prompts=["a fox", "two large cats"])
    assert {float(v) for texts in model.denoiser.net.evaluated for v in texts} == {0.0, 5.0, 14.0}
    assert [row["nfe"] for row in rows.values()] == [8, 4]
    assert rows["less"]["protocol"]["prompts"] == ["a fox", "two large cats"]
    plain = model.sample(10, ["a fox", "two large cats"], sampler="ddim", steps=4, guidance_scale=3.0)
    saved = np.load(tmp_path / "out" / "samples" / f"{rows['reference']['key']}-all.npy")
    assert np.allclose(saved, plain.numpy(), atol=1e-3)
    other = run(model, tmp_path, SMALL.format(3.0), prompts="a fox")
    assert other["less"]["key"] != rows["less"]["key"]
    toml = run(model, tmp_path, 'prompts = ["a fox"]\n' + SMALL.format(3.0))
    assert toml["less"]["key"] == other["less"]["key"]


def test_a_model_of_prompts_gets_bundled_ones_and_others_take_none(tmp_path: Path, capsys: Any) -> None:
    rows = run(prompt_model(), tmp_path, SMALL.format(3.0))
    assert rows["less"]["protocol"]["prompts"] == bundled_prompts()[:10] and "bundled list" in capsys.readouterr().err
    assert rows["less"]["protocol"]["calibration"] == "64 others of the bundled prompts"
    run(prompt_model(), tmp_path, SMALL.format(3.0), prompts="")  # said on purpose
    with pytest.raises(BadInput, match="tiny takes no prompts"):
        run(tiny_model(), tmp_path, SMALL.format(2.0), prompts="a fox")
    with pytest.raises(BadInput, match="prompts must be a list of texts"):
        run(prompt_model(), tmp_path, "prompts = 3\n" + SMALL.format(2.0))


def test_guidance_of_0_keeps_the_prompt_and_counts_one_evaluation(tmp_path: Path) -> None:
    model = prompt_model()
    same = [model.sample(2, "a fox", steps=2, sampler="ddim", guidance_scale=scale) for scale in (0.0, 0.5, 1.0)]
    assert torch.equal(same[0], same[2]) and torch.equal(same[1], same[2])
    assert not torch.equal(same[0], model.sample(2, "", steps=2, sampler="ddim", guidance_scale=0.0))
    assert [row["nfe"] for row in run(model, tmp_path, SMALL.format(0.0), prompts="a fox").values()] == [4, 2]


def test_prompts_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffa fox\n\n  a cat, red \n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a fox", "a cat, red"]
    (tmp_path / "empty.txt").write_text("\n \n")
    for name, said in {"empty.txt": "holds no prompts", "none.txt": "cannot read"}.items():
        code, _, err = run_cli("compare", "fashion", "--prompts", tmp_path / name, "--out", tmp_path / "o")
        assert code == 1 and said in err and len(err.splitlines()) == 1
    code, _, err = run_cli(
        "compare", "fashion", "--prompts", tmp_path / "p.txt", "--prompt", "x", "--out", tmp_path / "o"
    )
    assert code == 1 and "not both" in err
    code, _, err = run_cli("evaluate", "fashion", "--prompt", "x", "--n", 10)
    assert code == 1 and "fashion takes no prompts" in err


# Rows that fail


FAILS = SMALL.format(2.0) + '[[variant]]\nname = "boom"\nguidance_scale = 1e38\n[[variant]]\nname = "end"\nsteps = 1\n'


def test_one_failed_row_is_marked_and_the_others_run(tmp_path: Path) -> None:
    rows = run(tiny_model(), tmp_path, FAILS)
    assert list(rows) == ["reference", "less", "boom", "end"]
    assert [name for name, row in rows.items() if row.get("failed")] == ["boom"]
    assert "network evaluation" in rows["boom"]["failed"] and rows["boom"]["psnr"] is None
    assert rows["end"]["psnr"] > 0
    assert "1 of 4 rows failed" in (tmp_path / "out" / "report.html").read_text()
    again = run(tiny_model(), tmp_path, FAILS)  # it is tried again, the others are reused
    assert again["boom"]["failed"] == rows["boom"]["failed"] and again["end"]["rms"] == rows["end"]["rms"]
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines].count("boom") == 1


def test_a_row_that_raises_anything_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = comparison.Comparison.sample

    def odd(self: comparison.Comparison, job: jobs.Job, count: int, block: int = 0, **options: Any) -> Tensor:
        if job.variant.name == "less" and count == 10:
            raise RuntimeError("out of\nmemory")
        return sample(self, job, count, block, **options)

    monkeypatch.setattr(comparison.Comparison, "sample", odd)
    assert run(tiny_model(), tmp_path, SMALL.format(1.0))["less"]["failed"] == "RuntimeError: out of memory"


def test_the_command_ends_with_1_and_names_the_row(tmp_path: Path) -> None:
    tiny_model().save(tmp_path / "m")
    (tmp_path / "set.toml").write_text(FAILS)
    words = ["--variants", tmp_path / "set.toml", "--timing-batch", 1, "--precision", "fp32", "--out", tmp_path / "out"]
    code, out, err = run_cli("compare", tmp_path / "m", *words, "--json")
    assert code == 1 and [row["name"] for row in json.loads(out)] == ["reference", "less", "boom", "end"]
    assert err.splitlines()[-1].startswith("hasten: 1 of 4 rows failed, 'boom': ")


def test_nothing_can_be_measured_against_a_failed_reference(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the reference 'reference', which rows are measured against, fails: .*NaN"):
        run(tiny_model(), tmp_path, SMALL.format(1e38))


# Samples that are no images, and networks of one's own


class Own(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(size, size)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x.flatten(1)).view_as(x) * 0.3


@pytest.mark.parametrize("shape", [(2,), (1, 16), (3, 2, 4, 4), (2, 4, 4)])
def test_samples_that_are_no_images_have_rows_and_no_pictures(tmp_path: Path, shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape))
    model = Model(Denoiser(Own(size), VPCosine(), "v").eval().requires_grad_(False), "own", shape)  # type: ignore[arg-type]
    rows = run(model, tmp_path, SMALL.format(1.0))
    assert rows["less"]["psnr"] > 0 and rows["less"]["frechet"] is None and not rows["less"].get("failed")
    assert not list((tmp_path / "out" / "samples").glob(f"{rows['less']['key']}*"))
    with pytest.raises(BadInput, match="no grey or RGB images"):
        run(model, tmp_path, SMALL.format(1.0), reference="fashion")


# Blocks of seeds


def test_repeats_are_disjoint_blocks_with_mean_and_deviation(tmp_path: Path) -> None:
    model = tiny_model()
    rows = run(model, tmp_path, SMALL.format(1.0), repeats=3, seed=5)
    row, p = rows["less"], rows["less"]["protocol"]
    assert (p["repeats"], p["seeds"]) == (3, [5, 34]) and len(row["blocks"]) == 3
    for k, block in enumerate(row["blocks"]):
        one = run(model, tmp_path, SMALL.format(1.0), seed=5 + 10 * k)["less"]
        assert one["psnr"] == pytest.approx(block["psnr"]) and one["key"] != row["key"]
    values = [block["psnr"] for block in row["blocks"]]
    assert row["psnr"] == pytest.approx(np.mean(values)) and row["deviation"]["psnr"] == pytest.approx(
        np.std(values, ddof=1)
    )
    assert len(set(values)) == 3
    again = run(model, tmp_path, SMALL.format(1.0), repeats=3, seed=5)["less"]
    assert (again["blocks"], again["deviation"]) == (row["blocks"], row["deviation"])  # reused


def test_evaluate_repeats() -> None:
    words = ["evaluate", "fashion", "--steps", 1, "--sampler", "ddim", "--n", 10, "--precision", "fp32", "--json"]
    result = json.loads(run_cli(*words, "--repeats", 2, "--seed", 3)[1])
    ones = [json.loads(run_cli(*words, "--seed", seed)[1])["measures"]["frechet"]["value"] for seed in (3, 13)]
    assert result["measures"]["frechet"]["value"] == pytest.approx(np.mean(ones))
    assert result["deviation"]["frechet"] == pytest.approx(np.std(ones, ddof=1)) and result["seeds"] == [3, 22]
    assert [block["frechet"] for block in result["blocks"]] == pytest.approx(ones)
    assert "over 2 blocks" in run_cli(*words[:-1], "--repeats", 2)[1]


def test_runs_that_share_some_seeds_are_warned_of(tmp_path: Path, capsys: Any) -> None:
    assert [jobs.partially_overlap((0, 9), other) for other in ((0, 9), (10, 19), (9, 18), (0, 4), (-5, 20))] == [
        False, False, True, True, True]  # fmt: skip
    run(tiny_model(), tmp_path, SMALL.format(1.0))
    run(tiny_model(), tmp_path, SMALL.format(1.0), seed=10)
    assert "share" not in capsys.readouterr().err
    run(tiny_model(), tmp_path, SMALL.format(1.0), seed=5)
    said = capsys.readouterr().err
    assert "rows of seeds 0 to 9, this run has 5 to 14: they share some" in said and "10 to 19, this run" in said


# Progress and stops


def test_lines_of_progress_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    now = [0.0]
    monkeypatch.setattr("hasten.progress.time.monotonic", lambda: now[0])
    progress = ProgressReporter(100)
    progress.describe("[row] 1")
    for _ in range(7):
        now[0] += 10
        progress.advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["[row] 1: 30% of the network evaluations, about 70 s left",
                     "[row] 1: 60% of the network evaluations, about 40 s left"]  # fmt: skip


@pytest.mark.slow  # Ctrl-C, of which test_compare sees the same, is not
@pytest.mark.timeout(180)
def test_sigterm_leaves_the_report_of_the_finished_rows(tmp_path: Path) -> None:
    tiny_model().save(tmp_path / "m")
    (tmp_path / "set.toml").write_text(SMALL.format(1.0))
    code = (
        "import sys, time\nfrom hasten import cli\nfrom hasten.compare.comparison import Comparison\nevaluate = Comparison.evaluate_row\n"
        "def slow(self, job, *others):\n    if job.variant.name == 'less': print('now', flush=True); time.sleep(100)\n"
        "    return evaluate(self, job, *others)\nComparison.evaluate_row = slow\nsys.exit(cli.main(sys.argv[1:]))"
    )
    words = [
        "compare",
        tmp_path / "m",
        "--variants",
        tmp_path / "set.toml",
        "--out",
        tmp_path / "out",
        "--precision",
        "fp32",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "now\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and "1 of 2 rows are saved in" in errors.splitlines()[-1], errors
    assert "1 of 2 rows have finished" in (tmp_path / "out" / "report.html").read_text()
