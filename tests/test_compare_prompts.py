"""Comparisons of models of prompts against captioned pictures: judge, parts, calibration, rows with files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.compare import compare, jobs, variants
from hasten.compare.parts import seconds_by_part, time_parts
from hasten.compare.report import format_cells, recommended_row, sample_command
from hasten.errors import BadInput
from hasten.metrics.difference import structural_similarity
from hasten.model import Model

from .factories import run_cli, tiny_model
from .prompt_data import OracleJudge, captions, shower, write_captioned

SET = """
n = 24
rounds = 2
[reference]
sampler = "ddim"
times = "trailing"
steps = 4
guidance_scale = 1.0
[[variant]]
name = "fewer"
steps = 2
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_captioned(tmp_path / "data")


def run(model: Model, text: str, folder: Path | None = None, **more: Any) -> dict[str, dict[str, Any]]:
    Path("set.toml").write_text(text)
    options = {"out": folder or "out", "show": False, "precision": "fp32", "timing_batch": 4, **more}
    return {row["name"]: row for row in compare(model, "set.toml", **options)}


class Decoder:
    """Doubles its input, slowly enough to be timed."""

    def decode(self, z: Tensor) -> Tensor:
        total = torch.zeros(())
        for _ in range(60):
            total = total + (z * 1e-9).sum()
        return 2 * z + 0 * total

    def to(self, device: Any) -> Decoder:
        return self


def test_rows_have_prompt_match_diversity_and_seconds_that_add_up(data: Path) -> None:
    model = replace(shower(0.05), decoder=Decoder(), codec="latent")
    rows = run(model, SET, data=data, judge=OracleJudge())
    for row in rows.values():
        assert row["prompt_match"] == 1 and row["prompt_match_error"] == 0 and row["diversity"] > 0
        parts = row["seconds_by_part"]
        assert sum(parts.values()) == pytest.approx(row["seconds_per_image"]) and min(parts.values()) > 0
        protocol = row["protocol"]
        assert protocol["floors"]["prompt_match"] == 1 and protocol["floors"]["frechet"] > 0
        assert (
            sorted(protocol["prompts"]) == sorted(captions(24, 60))
            and protocol["reference"] == "data, test split, 24 images"
        )
        assert protocol["calibration"] == "60 captions of the training pictures"
    assert 0.5 < rows["fewer"]["ssim"] <= 1 and rows["reference"]["ssim"] is None
    images = [
        model.sample(
            24, rows["fewer"]["protocol"]["prompts"], sampler="ddim", times="trailing", steps=k, guidance_scale=1
        )
        for k in (4, 2)
    ]
    assert rows["fewer"]["ssim"] == pytest.approx(float(structural_similarity(*images).mean()), abs=0.01)
    cells = format_cells(rows["fewer"])
    assert cells["match"] == "100.0%" and cells["parts"].count("+") == 2
    page = Path("out/report.html").read_text()
    assert "prompt<br>match" in page and "class<br>acc." not in page and "SSIM" in page
    assert run(shower(0.05), SET, Path("o2"), prompts="red fox 0")["fewer"].get("prompt_match") is None


def test_a_model_that_ignores_its_prompts_is_not_recommended(data: Path) -> None:
    rows = [{"role": "reference", "frechet": 1.0, "prompt_match": 0.8, "nfe": 50, "name": "a"}]
    rows += [
        {"role": "variant", "frechet": 1.0, "prompt_match": match, "nfe": nfe, "name": str(nfe)}
        for match, nfe in ((0.5, 1), (0.73, 8))
    ]
    best = recommended_row(rows)
    assert best is not None and best["nfe"] == 8
    blind = run(shower(follow=False), SET, data=data, judge=OracleJudge())
    assert blind["fewer"]["prompt_match"] < 0.3


def test_parts_are_timed_in_place_and_put_back() -> None:
    model = replace(shower(), decoder=Decoder(), codec="latent")
    before, seconds = (model.conditioning, model.decoder), {}
    with time_parts(model, seconds):
        model.sample(2, "red fox 0", guidance_scale=1)
        assert model.conditioning.texts(1, "x") == ["x"]
    assert (model.conditioning, model.decoder) == before
    assert seconds["total"] > seconds["text"] + seconds["decoder"] > 0
    parts = seconds_by_part(seconds, 3.0)
    assert parts is not None and sum(parts.values()) == pytest.approx(3.0)
    assert seconds_by_part({"total": 1.0}, 1.0) is None and seconds_by_part(None, 1.0) is None
    plain: dict[str, float] = {}
    with time_parts(tiny_model(), plain):
        pass
    assert list(plain) == ["total"]


def test_accelerators_are_calibrated_on_the_training_captions(data: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = shower()
    asked = model.conditioning.asked
    calibrated = replace(model, calibration_prompts=("red cat", "blue dog"))
    calibrated.calls(3, 0, steps=1)
    assert asked == ["red cat", "blue dog", "red cat"] and not [w for w in recwarn if "empty prompt" in str(w.message)]
    with pytest.warns(UserWarning, match="empty prompt alone"):
        model.calls(2, 0, steps=1)
    assert asked[3:] == ["", ""]


def test_the_prompts_of_a_calibration_are_part_of_what_is_cached() -> None:
    from hasten.model.resolve import accelerate_model
    from hasten.plan.config import SamplingConfig

    class Accelerated(torch.nn.Module):
        pass

    cache: dict[Any, Any] = {}
    one, two = (replace(shower(), calibration_prompts=texts) for texts in (("a",), ("b",)))
    two = replace(two, denoiser=one.denoiser)
    for model in (one, two, one):
        accelerate_model(model, [], None, SamplingConfig(), cache)
    assert len(cache) == 2


class Files:
    """A model whose LoRAs and decoders only leave a mark."""

    seen: list[tuple[str, str]] = []

    @staticmethod
    def with_lora(model: Model, file: str, scale: float = 1.0) -> Model:
        Files.seen.append(("lora", file))
        return replace(model, name=model.name + "+lora", steps=1)

    @staticmethod
    def with_decoder(model: Model, folder: Path) -> Model:
        Files.seen.append(("decoder", str(folder)))
        if not (folder / "config.json").is_file():
            raise BadInput(f"no autoencoder in {folder}")
        return replace(model, decoder=Decoder(), codec="latent")


def test_rows_with_files_and_optional_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Files.seen = []
    monkeypatch.setattr(Model, "with_lora", Files.with_lora, raising=False)
    monkeypatch.setattr(Model, "with_decoder", Files.with_decoder, raising=False)
    Path("shower_lora.safetensors").write_bytes(b"x")
    Path("shower_decoder").mkdir()
    Path("shower_decoder/config.json").write_text("{}")
    Path("empty").mkdir()
    text = (
        SET
        + """
[[variant]]
name = "light"
decoder = "{model}_decoder"
[[variant]]
name = "lora"
lora = "{model}_lora.safetensors"
[[variant]]
name = "both"
lora = "{model}_lora.safetensors"
decoder = "{model}_decoder"
[[variant]]
name = "gone"
model = "{model}_student"
optional = true
[[variant]]
name = "unfit"
decoder = "empty"
optional = true
[[variant]]
name = "planless"
plan = "optimized_steps-8"
optional = true
"""
    )
    rows = run(shower(), text, prompts="red fox 0")
    assert list(rows) == ["reference", "fewer", "light", "lora", "both", "reference, 1 step"]
    assert rows["light"]["nfe"] == 4 and rows["lora"]["nfe"] == rows["both"]["nfe"] == 1
    assert rows["light"]["key"] != rows["reference"]["key"] and rows["both"]["key"] != rows["lora"]["key"]
    assert rows["light"]["psnr"] < 30 and rows["both"]["decoder"] == "shower_decoder"
    err = capsys.readouterr().err
    assert [name for name in ("gone", "unfit", "planless") if f"skipped: set.toml: '{name}'" in err] == [
        "gone",
        "unfit",
        "planless",
    ]
    assert "no autoencoder in empty" in err
    assert "--lora shower_lora.safetensors --decoder shower_decoder" in sample_command(rows["both"])
    with pytest.raises(BadInput, match="'unfit': decoder: no autoencoder in empty"):
        run(shower(), text.replace('decoder = "empty"\noptional = true', 'decoder = "empty"'), prompts="red fox 0")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lora = 3", "lora must be text"),
        ("optional = 1\nsteps = 2", "optional must be true or false"),
        ("decodr = 'x'", "unknown key 'decodr'"),
    ],
)
def test_odd_values_are_refused(line: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        run(shower(), SET + f'[[variant]]\nname = "odd"\n{line}\n', prompts="x")


def test_the_set_of_text_to_image_runs_on_any_pipeline_and_everything_is_its_name(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundled = variants.load_variants("text_to_image", "trailing", 2.0)
    assert all(v.optional for v in bundled.variants if v.model or v.lora or v.decoder or v.plan or v.accelerators)
    lines: list[str] = []
    found = jobs.prepare(shower(), bundled, None, "red fox 0", lines.append)
    names = [v.name for v, _, _ in found]
    assert names[0] == "DDIM, 50 steps" and "UniPC-3, 8 steps" in names and not any("student" in name for name in names)
    assert any("shower_student" in line for line in lines) and any("shower_decoder" in line for line in lines)
    assert jobs.location_of(replace(shower(), name="fashion")) == "fashion"


def test_what_cannot_be_compared_is_one_clear_line(data: Path) -> None:
    with pytest.raises(BadInput, match="shower names no judge"):
        run(shower(), SET, data=data)
    with pytest.raises(BadInput, match="tiny takes no prompts"):
        run(tiny_model(), SET, data=data, judge=OracleJudge())
    (data / "test" / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "a"}\n{"file_na')
    with pytest.raises(BadInput) as error:
        run(shower(), SET, data=data, judge=OracleJudge())
    assert "metadata.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_within_a_budget_prompts_are_measured_and_nothing_is_sampled_for_diversity(data: Path) -> None:
    rows = run(shower(), SET.replace("n = 24", "n = 16"), data=data, judge=OracleJudge(), minutes=0.5)
    for row in rows.values():
        assert (
            row["prompt_match"] == 1
            and row["diversity"] is None
            and set(row["seconds_by_part"]) == {"text", "network", "decoder"}
        )


@pytest.mark.slow
def test_the_command_compares_a_pipeline_of_diffusers(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from tests.adapters import tiny
    from tests.judges import clip_folder

    tiny.sd_pipeline().save_pretrained(tmp_path / "pipe")
    Path("set.toml").write_text(SET + '[[variant]]\nname = "W8A8"\naccelerators = ["quantize:images=4,steps=2"]\n')
    words = ["--variants", "set.toml", "--data", data, "--judge", clip_folder(tmp_path / "clip"), "--n", 10, "--json"]
    code, out, err = run_cli("compare", tmp_path / "pipe", *words, "--precision", "fp32")
    assert code == 0 and "empty prompt" not in err, err
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["W8A8"]["prompt_match"] is not None and rows["W8A8"]["seconds_by_part"]["decoder"] > 0
