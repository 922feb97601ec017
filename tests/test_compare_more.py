"""Comparisons of models of prompts, of samples that are no images, against one's own images, in blocks of seeds, and
with rows that fail."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from hasten import compare as engine
from hasten import jobs, meter, variants
from hasten.cli import main
from hasten.compare import compare
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.metrics import evaluate_images
from hasten.model import Model
from hasten.reference_images import baseline, judge, of_images
from hasten.schedules import VPCosine

from .test_compare import Corner, tiny

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


DRAWN = {"test_one_failed_row_is_marked_and_the_others_go_on"}


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pages are drawn only where a test is about them."""
    if request.node.name not in DRAWN:
        monkeypatch.setattr(engine.report, "write", lambda out, *_: out / "report.html")


def run(model: Model, folder: Path, text: str, **more: Any) -> dict[str, dict[str, Any]]:
    (folder / "set.toml").write_text(text)
    told = {"out": folder / "out", "show": False, "runtime": "fp32", "timing_batch": 1, **more}
    return {row["name"]: row for row in compare(model, folder / "set.toml", **told)}


def cli(*words: Any) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


# Prompts


class Asks(nn.Module):
    """A network whose answer depends on the length of a prompt."""

    null_conditions = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, text: Tensor, **null: Tensor) -> Tensor:
        self.asked.append(text)
        return self.conv(x) * 0.3 + text.view(-1, 1, 1, 1) / 100


class Prompts:
    def texts(self, n: int, prompt: Any = None) -> list[str]:
        given = [prompt] if prompt is None or isinstance(prompt, str) else prompt
        return [given[k % len(given)] or "" for k in range(n)]

    def cond(self, n: int, prompt: Any = None, seed: int = 0) -> dict[str, Tensor]:
        text = torch.tensor([float(len(each)) for each in self.texts(n, prompt)])
        return {"text": text, "null_text": torch.zeros(n)}

    def to(self, device: Any) -> Prompts:
        return self


def asking() -> Model:
    denoiser = Denoiser(Asks(), VPCosine(), "v").eval().requires_grad_(False)
    return Model(denoiser, "asks", (1, 4, 4), conditioning=Prompts(), guidance_scale=3.0)


def test_prompts_reach_every_row_and_are_in_the_protocol(tmp_path: Path) -> None:
    model = asking()
    rows = run(model, tmp_path, SMALL.format(3.0), prompts=["a fox", "two large cats"])
    assert {float(v) for asked in model.denoiser.net.asked for v in asked} == {0.0, 5.0, 14.0}
    assert [row["nfe"] for row in rows.values()] == [8, 4]
    assert rows["less"]["protocol"]["prompts"] == ["a fox", "two large cats"]
    plain = model.sample(10, ["a fox", "two large cats"], sampler="ddim", steps=4, guidance_scale=3.0)
    kept = np.load(tmp_path / "out" / "samples" / f"{rows['reference']['key']}-all.npy")
    assert np.allclose(kept, plain.numpy(), atol=1e-3)
    other = run(model, tmp_path, SMALL.format(3.0), prompts="a fox")
    assert other["less"]["key"] != rows["less"]["key"]
    toml = run(model, tmp_path, 'prompts = ["a fox"]\n' + SMALL.format(3.0))
    assert toml["less"]["key"] == other["less"]["key"]


def test_a_model_of_prompts_must_be_given_some_and_others_none(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="asks takes prompts: give --prompt"):
        run(asking(), tmp_path, SMALL.format(3.0))
    run(asking(), tmp_path, SMALL.format(3.0), prompts="")  # said on purpose
    with pytest.raises(BadInput, match="tiny takes no prompts"):
        run(tiny(), tmp_path, SMALL.format(2.0), prompts="a fox")
    with pytest.raises(BadInput, match="prompts must be a list of texts"):
        run(asking(), tmp_path, "prompts = 3\n" + SMALL.format(2.0))


def test_guidance_of_0_keeps_the_prompt_and_counts_one_evaluation(tmp_path: Path) -> None:
    model = asking()
    same = [model.sample(2, "a fox", steps=2, sampler="ddim", guidance_scale=scale) for scale in (0.0, 0.5, 1.0)]
    assert torch.equal(same[0], same[2]) and torch.equal(same[1], same[2])
    assert not torch.equal(same[0], model.sample(2, "", steps=2, sampler="ddim", guidance_scale=0.0))
    assert [row["nfe"] for row in run(model, tmp_path, SMALL.format(0.0), prompts="a fox").values()] == [4, 2]


def test_prompts_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffa fox\n\n  a cat, red \n", encoding="utf-8")
    assert jobs.read_prompts(tmp_path / "p.txt") == ["a fox", "a cat, red"]
    (tmp_path / "empty.txt").write_text("\n \n")
    for name, said in {"empty.txt": "holds no prompts", "none.txt": "cannot read"}.items():
        code, _, err = cli("compare", "fashion", "--prompts", tmp_path / name, "--out", tmp_path / "o")
        assert code == 1 and said in err and len(err.splitlines()) == 1
    code, _, err = cli("compare", "fashion", "--prompts", tmp_path / "p.txt", "--prompt", "x", "--out", tmp_path / "o")
    assert code == 1 and "not both" in err
    code, _, err = cli("evaluate", "fashion", "--prompt", "x", "--n", 10)
    assert code == 1 and "fashion takes no prompts" in err


# Rows that fail


FAILS = SMALL.format(2.0) + '[[variant]]\nname = "boom"\nguidance_scale = 1e38\n[[variant]]\nname = "end"\nsteps = 1\n'


def test_one_failed_row_is_marked_and_the_others_go_on(tmp_path: Path) -> None:
    rows = run(tiny(), tmp_path, FAILS)
    assert list(rows) == ["reference", "less", "boom", "end"]
    assert [name for name, row in rows.items() if row.get("failed")] == ["boom"]
    assert "network evaluation" in rows["boom"]["failed"] and rows["boom"]["psnr"] is None
    assert rows["end"]["psnr"] > 0
    assert "1 of 4 rows failed" in (tmp_path / "out" / "report.html").read_text()
    again = run(tiny(), tmp_path, FAILS)  # it is tried again, the others are kept
    assert again["boom"]["failed"] == rows["boom"]["failed"] and again["end"]["rms"] == rows["end"]["rms"]
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines].count("boom") == 1


def test_a_row_that_raises_anything_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = engine.Run.sample

    def odd(self: engine.Run, job: engine.Job, count: int, block: int = 0) -> Tensor:
        if job.variant.name == "less" and count == 10:
            raise RuntimeError("out of\nmemory")
        return sample(self, job, count, block)

    monkeypatch.setattr(engine.Run, "sample", odd)
    assert run(tiny(), tmp_path, SMALL.format(1.0))["less"]["failed"] == "RuntimeError: out of memory"


def test_the_command_ends_with_1_and_names_the_row(tmp_path: Path) -> None:
    tiny().save(tmp_path / "m")
    (tmp_path / "set.toml").write_text(FAILS)
    words = ["--variants", tmp_path / "set.toml", "--timing-batch", 1, "--runtime", "fp32", "--out", tmp_path / "out"]
    code, out, err = cli("compare", tmp_path / "m", *words, "--json")
    assert code == 1 and [row["name"] for row in json.loads(out)] == ["reference", "less", "boom", "end"]
    assert err.splitlines()[-1].startswith("hasten: 1 of 4 rows failed, 'boom': ")


def test_nothing_can_be_measured_against_a_failed_reference(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the reference 'reference', which rows are measured against, fails: .*NaN"):
        run(tiny(), tmp_path, SMALL.format(1e38))


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


# One's own images


def pictures(folder: Path, count: int, size: int = 12, mode: str = "L") -> Path:
    folder.mkdir()
    noise = np.random.default_rng(0)
    for k in range(count):
        shape = (size, size) if mode == "L" else (size, size, 3)
        Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8), mode).save(folder / f"{k:03d}.png")
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_own_images_are_a_reference_with_a_baseline_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, said = pictures(tmp_path / "real", 60), []
    made = of_images(folder, Corner(), (1, 8, 8), said.append)
    assert made.count == 60 and made.features == "corner" and len(said) == 1 and "60 images" in said[0]
    assert made.floor_at("frechet", 30) is not None and made.floor_at("frechet", 10) is not None
    again = of_images(folder, Corner(), (1, 8, 8), said.append)
    assert len(said) == 1 and torch.allclose(again.mean, made.mean) and again.floor == made.floor
    Image.new("L", (12, 12), 7).save(folder / "new.png")
    assert of_images(folder, Corner(), (1, 8, 8), said.append).count == 61 and len(said) == 2
    rows = run(tiny(), tmp_path, SMALL.format(1.0), reference=folder, features=Corner())
    p = rows["less"]["protocol"]
    assert rows["less"]["frechet"] > 0 and p["reference"] == "real, all split, 61 images" and p["features"] == "corner"
    assert p["floors"]["frechet"] == pytest.approx(
        of_images(folder, Corner(), (1, 8, 8), print).floor_at("frechet", 10)
    )


def test_the_baseline_is_one_half_against_the_other() -> None:
    torch.manual_seed(0)
    table = baseline(torch.randn(400, 4))["frechet"]
    assert list(table) == [12, 25, 50, 100, 200]
    assert table[12] > 3 * table[200] > 0  # falls with n
    spread = baseline(torch.cat([torch.randn(200, 4), torch.randn(200, 4) + 5]))["frechet"]
    assert 0 < spread[200] < 2  # the halves are random ones


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_judge_is_one_line(tmp_path: Path) -> None:
    folder, here = pictures(tmp_path / "real", 12), torch.device("cpu")
    from hasten.ranks import Ranks

    ranks = Ranks(here)
    for reference, features, shape, message in [
        (folder, None, (1, 8, 8), "give --features"),
        (folder, "fashion", (3, 8, 8), "grey garments"),
        ("fashion", "fashion", (3, 28, 28), "grey garments"),
        (folder, Corner(), (1, 8, 8), "at least 20"),
        ("fashion", Corner(), (1, 8, 8), "cannot judge against it"),
        (None, "fashion", (1, 8, 8), "give --reference"),
        (folder, "fasion", (1, 8, 8), "did you mean 'fashion'"),
    ]:
        with pytest.raises(BadInput, match=message):
            judge(reference, features, shape, here, ranks)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compare_and_evaluate_agree_on_own_images(tmp_path: Path) -> None:
    tiny().save(tmp_path / "m")
    pictures(tmp_path / "real", 40)
    told = ["--reference", tmp_path / "real", "--features", "fashion", "--runtime", "fp32", "--n", 10, "--json"]
    (tmp_path / "set.toml").write_text(SMALL.format(1.0))
    code, out, err = cli("compare", tmp_path / "m", "--variants", tmp_path / "set.toml", "--timing-batch", 1,
                         "--out", tmp_path / "out", *told)  # fmt: skip
    assert code == 0, err
    assert "reference: 40 images of" in err and "too few for precision" in err
    row = json.loads(out)[1]
    code, out, err = cli("evaluate", tmp_path / "m", "--sampler", "ddim", "--steps", 2, "--times", row["times"], *told)
    assert code == 0 and "reference: 40 images" not in err, err
    found = json.loads(out)["measures"]
    assert found["frechet"]["value"] == pytest.approx(row["frechet"], rel=1e-4)
    assert found["frechet"]["floor"] == pytest.approx(row["protocol"]["floors"]["frechet"])
    assert "precision" not in found and row["precision"] is None


# Blocks of seeds


def test_repeats_are_disjoint_blocks_with_mean_and_deviation(tmp_path: Path) -> None:
    model = tiny()
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
    assert (again["blocks"], again["deviation"]) == (row["blocks"], row["deviation"])  # kept


def test_evaluate_repeats() -> None:
    words = ["evaluate", "fashion", "--steps", 1, "--sampler", "ddim", "--n", 10, "--runtime", "fp32", "--json"]
    found = json.loads(cli(*words, "--repeats", 2, "--seed", 3)[1])
    ones = [json.loads(cli(*words, "--seed", seed)[1])["measures"]["frechet"]["value"] for seed in (3, 13)]
    assert found["measures"]["frechet"]["value"] == pytest.approx(np.mean(ones))
    assert found["deviation"]["frechet"] == pytest.approx(np.std(ones, ddof=1)) and found["seeds"] == [3, 22]
    assert [block["frechet"] for block in found["blocks"]] == pytest.approx(ones)
    assert "over 2 blocks" in cli(*words[:-1], "--repeats", 2)[1]


def test_runs_that_share_some_seeds_are_warned_of(tmp_path: Path, capsys: Any) -> None:
    assert [jobs.partly_shared((0, 9), other) for other in ((0, 9), (10, 19), (9, 18), (0, 4), (-5, 20))] == [
        False, False, True, True, True]  # fmt: skip
    run(tiny(), tmp_path, SMALL.format(1.0))
    run(tiny(), tmp_path, SMALL.format(1.0), seed=10)
    assert "share" not in capsys.readouterr().err
    run(tiny(), tmp_path, SMALL.format(1.0), seed=5)
    said = capsys.readouterr().err
    assert "rows of seeds 0 to 9, this run has 5 to 14: they share some" in said and "10 to 19, this run" in said


# The set of variants


def test_what_a_variant_leaves_out_is_the_references() -> None:
    data = {
        "prompts": ["a"],
        "reference": {"sampler": "unipc:order=3", "times": "karras", "steps": 8, "guidance_scale": 3.0},
        "variant": [
            {"name": "steps", "steps": [2, 4]}, {"name": "other", "sampler": "ddim"}, {"name": "scale", "guidance_scale": 1.0},
            {"name": "student", "model": "fashion_student", "steps": 4}, {"name": "its own", "model": "fashion_student"},
            {"name": "its times", "model": "fashion_student", "times": "uniform", "steps": 2},
        ],
    }  # fmt: skip
    found = {v.name: (v.sampler, v.times, v.steps, v.guidance_scale) for v in variants.parse(data).variants}
    assert found == {
        "steps, 2 steps": ("unipc:order=3", "karras", 2, 3.0), "steps, 4 steps": ("unipc:order=3", "karras", 4, 3.0),
        "other": ("ddim", "karras", 8, 3.0), "scale": ("unipc:order=3", "karras", 8, 1.0),
        "student": ("", "", 4, 3.0), "its own": ("", "", 0, 3.0), "its times": ("", "uniform", 2, 3.0),
    }  # fmt: skip
    assert len({v.method for v in variants.parse(data).variants}) == 7
    assert variants.parse(data).prompts == ("a",)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"name": "x", "sampelr": "ddim"}, "unknown key 'sampelr': did you mean 'sampler'"),
        ({"name": "x", "model": "m", "steps": 2.5}, "steps must be a whole number"),
        ({"name": "x", "model": "m", "times": "unifrom"}, "did you mean 'uniform'"),
        ({"name": "x"}, "it is the reference again"),
        ({"name": "x", "guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ({"name": "x", "steps": True}, "steps must be a whole number"),
    ],
)
def test_what_a_table_cannot_say_is_one_line(table: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        variants.parse({"reference": {"sampler": "ddim", "steps": 4}, "variant": [table]})


def test_the_documented_set_can_be_read(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "variants.md").read_text()
    blocks = [part.partition("```")[0] for part in page.split("```toml\n")[1:]]
    assert len(blocks) >= 2
    for block in blocks:
        (tmp_path / "set.toml").write_text(block)
        assert variants.read(tmp_path / "set.toml").variants
    for key in (*variants.KEYS, "n", "rounds", "prompts"):
        assert f"`{key}`" in page, key


# Progress and stops


def test_lines_of_progress_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    now = [0.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    progress = meter.Progress(100)
    progress.describe("[row] 1")
    for _ in range(7):
        now[0] += 10
        progress.advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["[row] 1: 30% of the network evaluations, about 70 s left",
                     "[row] 1: 60% of the network evaluations, about 40 s left"]  # fmt: skip


@pytest.mark.timeout(180)
def test_sigterm_leaves_the_report_of_the_finished_rows(tmp_path: Path) -> None:
    tiny().save(tmp_path / "m")
    (tmp_path / "set.toml").write_text(SMALL.format(1.0))
    code = (
        "import sys, time\nfrom hasten import cli, compare\njudge = compare.Run.judge\n"
        "def slow(self, job, *others):\n    if job.variant.name == 'less': print('now', flush=True); time.sleep(100)\n"
        "    return judge(self, job, *others)\ncompare.Run.judge = slow\nsys.exit(cli.main(sys.argv[1:]))"
    )
    words = [
        "compare",
        tmp_path / "m",
        "--variants",
        tmp_path / "set.toml",
        "--out",
        tmp_path / "out",
        "--runtime",
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
    assert process.returncode == 130 and "1 of 2 rows are kept in" in errors.splitlines()[-1], errors
    assert "1 of 2 rows have finished" in (tmp_path / "out" / "report.html").read_text()


def test_evaluate_images_on_the_device_of_the_network() -> None:
    images = torch.zeros(12, 1, 28, 28)
    assert set(evaluate_images(images, bootstrap=0)) >= {"frechet", "kid"}
