"""One object says how to sample: written to files and read back, resolved once a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten import DPMSolver, EvaluateConfig, Karras, QuantizeConfig, SamplingConfig, TrainConfig, UniPC
from hasten.cli import main
from hasten.compare.runner import CompareConfig
from hasten.errors import BadInput
from hasten.images import read_png_text
from hasten.workflows.distill import DistillConfig

CONFIGS = [
    SamplingConfig(),
    SamplingConfig("unipc:order=3", "karras:rho=5", 8, 2.0),
    SamplingConfig(DPMSolver(order=2), Karras(), 6, guides=["interval:low=0.2,high=5", "rescale"]),
    SamplingConfig(times=[1.0, 0.5, 0.0], start="ccdf:time=0.3", precision="bf16+channels_last"),
    SamplingConfig(plan="few", guidance_scale=1, accelerators="encoder_propagation:keys=uniform"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_config_is_read_back_from_text_toml_and_json(config: SamplingConfig, tmp_path: Path) -> None:
    config.save(tmp_path / "c.toml")
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "more.toml").write_text(f"[sampling]\n{config.to_toml()}[train]\nsteps = 3\n")
    for again in (
        SamplingConfig.parse(str(config)),
        SamplingConfig.of(str(config), {}) if str(config) else config,
        SamplingConfig.load(tmp_path / "c.toml"),
        SamplingConfig.load(tmp_path / "c.json"),
        SamplingConfig.load(tmp_path / "more.toml", "sampling"),
        SamplingConfig.from_dict(config.to_dict()),
    ):
        assert again.to_dict() == config.to_dict() and again.digest() == config.digest()
        assert hash(again) == hash(SamplingConfig.from_dict(config.to_dict()))


def test_the_digest_is_of_the_method_and_not_of_its_spelling() -> None:
    same = [
        SamplingConfig("dpm"),
        SamplingConfig("dpmpp_2m"),
        SamplingConfig(DPMSolver()),
        SamplingConfig("dpm:order=2"),
    ]
    assert len({config.digest() for config in same}) == 1
    others = [SamplingConfig("dpm:order=3"), SamplingConfig("dpm", steps=4), SamplingConfig("dpm", precision="bf16")]
    assert len({config.digest() for config in (*same, *others)}) == 4


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: SamplingConfig.from_dict({"stps": 3}), "no option 'stps': did you mean 'steps'"),
        (lambda: SamplingConfig.from_dict({"runtime": "fp32", "precision": "fp32"}), "old name of 'precision'"),
        (lambda: SamplingConfig.parse("steps"), "cannot read 'steps'"),
        (lambda: SamplingConfig.parse("steps=x"), "steps must be a number"),
        (lambda: SamplingConfig(steps=0), "steps"),
        (lambda: SamplingConfig(guidance_scale=float("nan")), "guidance_scale"),
        (lambda: SamplingConfig(guides=[UniPC]), "the class UniPC"),
        (lambda: hasten.load("fashion").sample(1, 9, 0, "unipc"), "given as sampler='unipc'"),  # type: ignore[arg-type]
        (lambda: SamplingConfig.of(3, {}), "config must be a SamplingConfig"),  # type: ignore[arg-type]
        (lambda: SamplingConfig.load("/nowhere.toml"), "cannot read the config"),
        (lambda: QuantizeConfig.from_dict({"bits": 4}), "QuantizeConfig has no option 'bits'"),
        (lambda: EvaluateConfig(n=2), "n must be a whole number of at least 10"),
    ],
)
def test_what_cannot_be_is_one_line(make: Any, words: str) -> None:
    with pytest.warns(DeprecationWarning) if "old name" in words else _nothing(), pytest.raises(BadInput, match=words):
        make()


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    "kind, old",
    [
        (SamplingConfig, {"runtime": "bf16"}),
        (TrainConfig, {"runtime": "bf16", "accumulate": 2, "shard": True}),
        (DistillConfig, {"runtime": "bf16", "evaluations": 1e6, "accumulate": 2, "shard": True}),
        (QuantizeConfig, {"weights": 4, "acts": None, "learn_steps": True, "groups": 2, "ranges": "minmax",
                          "keep": ("a",), "eight": 0.1, "spread": 5}),
    ],
)  # fmt: skip
def test_old_names_of_options_are_read_with_a_warning(kind: Any, old: dict[str, Any]) -> None:
    for name, value in old.items():
        with pytest.warns(DeprecationWarning, match=f"'{name}' is now called '{kind.renamed[name]}'"):
            config = kind.of(None, {name: value})
        assert getattr(config, kind.renamed[name]) == value
    assert set(old) == set(kind.renamed)


def test_keywords_take_the_place_of_the_configs_fields() -> None:
    model = hasten.load("fashion")
    config = SamplingConfig("ddim", "uniform", 2, 1.0)
    expected = model.sample(2, sampler="ddim", times="uniform", steps=3, guidance_scale=1.0)
    assert torch.equal(model.sample(2, config=config, steps=3), expected)
    resolved = model.resolve(config, steps=3)
    assert torch.equal(model.sample(2, config=resolved), expected) and model.resolve(resolved) is resolved
    assert resolved.settings() == {
        "sampler": "ddim", "times": "uniform", "steps": 3, "guidance_scale": 1.0, "precision": "fp32",
    }  # fmt: skip
    assert SamplingConfig.from_dict(resolved.settings()).digest() == resolved.config.digest()
    with pytest.raises(BadInput, match="another model"):
        hasten.load("fashion").sample(1, config=resolved)


def test_hasten_sample_resolves_compiles_and_chooses_the_precision_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundled model, with its own plan switched off, in batches, with a configuration file."""
    import hasten.model.model as model_module
    import hasten.model.resolve as resolve_module
    import hasten.plan.table as table_module

    counts = dict.fromkeys(("resolve", "compile", "precision"), 0)

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*args, **options)

        return call

    monkeypatch.setattr(model_module, "resolve", counted("resolve", resolve_module.resolve))
    monkeypatch.setattr(table_module, "trace", counted("compile", table_module.trace))
    monkeypatch.setattr(model_module, "autotune", counted("precision", model_module.autotune))
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    SamplingConfig("deis:order=2", "trailing", 3).save(tmp_path / "how.toml")
    asked = ["sample", "fashion", "--n", "6", "--batch-size", "2", "--config", str(tmp_path / "how.toml")]
    assert main([*asked, "--out", str(tmp_path / "a.png")]) == 0
    assert counts == {"resolve": 1, "compile": 1, "precision": 1}
    command = read_png_text(tmp_path / "a.png")["command"]
    assert "--sampler deis:order=2 --times trailing --steps 3" in command
    # an option of the command line takes the place of the file's
    assert main([*asked, "--steps", "4", "--precision", "fp32", "--out", str(tmp_path / "b.png")]) == 0
    assert "--steps 4" in read_png_text(tmp_path / "b.png")["command"]
    assert counts == {"resolve": 2, "compile": 2, "precision": 1}


def test_a_file_of_options_for_each_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SamplingConfig("unipc", "lambda", 3, 1.0, precision="fp32").save(tmp_path / "s.toml")
    out = ["--out", str(tmp_path / "t")]
    assert main(["tune", "fashion", *out, "--method", "optimized_steps", "--config", str(tmp_path / "s.toml")]) == 0
    found = SamplingConfig.load(tmp_path / "t" / "sampling.toml")
    assert found.plan in hasten.load(tmp_path / "t").plans and found.guidance_scale == 1.0
    assert main(["sample", str(tmp_path / "t"), "--n", "1", "--out", str(tmp_path / "a.png"),
                 "--config", str(tmp_path / "t" / "sampling.toml")]) == 0  # fmt: skip
    (tmp_path / "bad.toml").write_text("stepz = 3\n")
    capsys.readouterr()
    for verb in (["sample", "fashion", "--out", str(tmp_path / "b.png")], ["evaluate", "fashion", "--n", "10"],
                 ["tune", "fashion", *out], ["quantize", "fashion", *out], ["distill", "fashion", *out],
                 ["train", str(tmp_path), *out]):  # fmt: skip
        assert main([*verb, "--config", str(tmp_path / "bad.toml")]) == 1
        err = capsys.readouterr().err
        assert "bad.toml" in err and "'stepz'" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps = 3\n[sampling]\nsampler = 'ddim'\n", "'steps' stands beside .sampling."),
        ("steps = '8'\n", "c.toml: steps cannot be '8'"),
        ("precision = 16\n", "c.toml: precision cannot be 16"),
        ("steps = 0\n", "c.toml: .*steps"),
        ("steps = \n", "not valid TOML"),
    ],
)
def test_nothing_in_a_file_is_ignored_or_taken_for_something_else(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(BadInput, match=words):
        SamplingConfig.load(tmp_path / "c.toml", "sampling")


@pytest.mark.parametrize("kind", [TrainConfig, DistillConfig, QuantizeConfig, EvaluateConfig, CompareConfig])
def test_types_of_options_in_files_are_checked(kind: Any) -> None:
    assert kind.from_dict({"seed": 3}).seed == 3
    for wrong in ("3", 1.5, True, [3]):
        with pytest.raises(BadInput, match="seed cannot be"):
            kind.from_dict({"seed": wrong})
    if hasattr(kind, "minutes"):
        assert kind.from_dict({"minutes": 2}).minutes == 2
        with pytest.raises(BadInput, match="minutes cannot be"):
            kind.from_dict({"minutes": "2"})


def test_old_flags_work_with_a_line_of_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["sample", "fashion", "--n", "1", "--sampler", "ddim", "--steps", "1"]
    assert main([*asked, "--runtime", "fp32", "--single", "--out", str(tmp_path / "old")]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "hasten: --runtime is now called --precision",
        "hasten: --single is now called --separate-files",
    ]
    assert main([*asked, "--precision", "fp32", "--separate-files", "--out", str(tmp_path / "new")]) == 0
    assert (tmp_path / "old" / "000000.png").read_bytes() == (tmp_path / "new" / "000000.png").read_bytes()


def test_evaluate_model_is_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = hasten.load("fashion")
    result = hasten.evaluate_model(model, EvaluateConfig(n=20), sampler="ddim", steps=1, precision="fp32")
    assert main(["evaluate", "fashion", "--n", "20", "--sampler", "ddim", "--steps", "1", "--precision", "fp32",
                 "--json"]) == 0  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    result.pop("summary")
    assert report["measures"].keys() == result["measures"].keys() and report["seeds"] == [0, 19]
    for name, measure in report["measures"].items():
        assert measure["value"] == pytest.approx(result["measures"][name]["value"], rel=1e-6)
