"""Sets of variants and settings that a comparison refuses, in one line, before anything runs."""

# The fixtures are those of test_compare, so their names come up again as arguments.
# ruff: noqa: F401, F811

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hasten.compare import comparison, variants
from hasten.errors import BadInput

from .factories import tiny_model
from .test_compare import SET, Corner, run, variant_file


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("n = 12", "m = 12", r"unknown key 'm': .*choices: reference, variant, n, rounds"),
        ("n = 12", "n = 0", r"n must be an integer of at least 10, got 0"),
        ("[reference]", "[reference", r"not valid TOML"),
        ("[reference]", "[referense]", r"unknown key 'referense': did you mean 'reference'"),
        ('sampler = "heun"', 'sampler = "huen"', r"variant 3 \('plain Heun'\): sampler: .*'huen'.*did you mean 'heun'"),
        ('sampler = "heun"', 'sampler = "heun:chrn=1"', r"variant 3 \('plain Heun'\): sampler: .*churn"),
        ('times = "lambda"', 'times = "lamda"', r"\[reference\]: times: .*lambda"),
        ("steps = [2, 4]", "stpes = 4", r"variant 1 \('DDIM'\): unknown key 'stpes': did you mean 'steps'"),
        ("steps = [2, 4]", "steps = []", r"variant 1 \('DDIM'\): steps must be one or more values"),
        ("steps = [2, 4]", "steps = [2, 0]", r"variant 1 \('DDIM'\): steps must be an integer of at least 1, got 0"),
        ("steps = 12", "steps = [12, 24]", r"\[reference\]: steps must be one value"),
        ("guidance_scale = 1", 'guidance_scale = "x"', r"guidance_scale must be a number"),
        ('name = "UniPC"', 'name = "DDIM, 2 steps"', r"'DDIM, 2 steps' is used twice"),
        ('name = "UniPC"\n', "", r"variant 2: has no name"),
        (
            'name = "UniPC"\n',
            'name = "UniPC"\naccelerators = ["cache"]\n',
            r"accelerators: unknown accelerator 'cache'",
        ),
        ('name = "UniPC"\n', 'name = "UniPC"\naccelerators = "cache"\n', r"accelerators must be a list of texts"),
    ],
)
def test_a_bad_set_is_one_line_before_anything_runs(
    run: Any, variant_file: Path, tmp_path: Path, old: str, new: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert old in SET
    variant_file.write_text(SET.replace(old, new, 1))
    monkeypatch.setattr(comparison.Comparison, "sample", lambda *a: pytest.fail("something was sampled"))
    with pytest.raises(BadInput, match=said) as error:
        run()
    assert "\n" not in str(error.value)
    assert str(variant_file) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_set_names_the_bundled_ones() -> None:
    with pytest.raises(
        BadInput,
        match=r"no set of variants 'dmeo'.*did you mean 'demo'\? \(choices: blurring, cheaper, demo, fashion, full, guidance, improved_ddpm, soft, students, text_to_image, training_free\)",
    ):
        variants.load_variants("dmeo")


def test_features_of_another_network_are_refused_before_anything_runs(run: Any, tmp_path: Path) -> None:
    class Other(Corner):
        name = "other"

    with pytest.raises(BadInput, match="corner features, not those of other"):
        run(features=Other())
    assert not (tmp_path / "out").exists()


def test_guidance_without_classes_is_refused_before_anything_runs(run: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"'best': .*guidance_scale must be 1"):
        run(tiny_model(classes=None))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"n": 5}, {"rounds": 0}, {"seed": -1}, {"batch_size": 0}])
def test_bad_numbers(run: Any, wrong: dict[str, int]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        run(**wrong)


def test_the_defaults_of_a_variant_are_the_references() -> None:
    data = {
        "prompts": ["a"],
        "reference": {"sampler": "unipc:order=3", "times": "karras", "steps": 8, "guidance_scale": 3.0},
        "variant": [
            {"name": "steps", "steps": [2, 4]}, {"name": "other", "sampler": "ddim"}, {"name": "scale", "guidance_scale": 1.0},
            {"name": "student", "model": "fashion_student", "steps": 4}, {"name": "its own", "model": "fashion_student"},
            {"name": "its times", "model": "fashion_student", "times": "uniform", "steps": 2},
        ],
    }  # fmt: skip
    fields = {v.name: (v.sampler, v.times, v.steps, v.guidance_scale) for v in variants.parse_variants(data).variants}
    assert fields == {
        "steps, 2 steps": ("unipc:order=3", "karras", 2, 3.0), "steps, 4 steps": ("unipc:order=3", "karras", 4, 3.0),
        "other": ("ddim", "karras", 8, 3.0), "scale": ("unipc:order=3", "karras", 8, 1.0),
        "student": ("", "", 4, 3.0), "its own": ("", "", 0, 3.0), "its times": ("", "uniform", 2, 3.0),
    }  # fmt: skip
    assert len({v.method for v in variants.parse_variants(data).variants}) == 7
    assert variants.parse_variants(data).prompts == ("a",)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"name": "x", "sampelr": "ddim"}, "unknown key 'sampelr': did you mean 'sampler'"),
        ({"name": "x", "model": "m", "steps": 2.5}, "steps must be an integer"),
        ({"name": "x", "model": "m", "times": "unifrom"}, "did you mean 'uniform'"),
        ({"name": "x"}, "it is the reference again"),
        ({"name": "x", "guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ({"name": "x", "steps": True}, "steps must be an integer"),
    ],
)
def test_an_invalid_table_is_one_line(table: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        variants.parse_variants({"reference": {"sampler": "ddim", "steps": 4}, "variant": [table]})


def test_the_documented_set_can_be_read(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "variants.md").read_text()
    blocks = [part.partition("```")[0] for part in page.split("```toml\n")[1:]]
    assert len(blocks) >= 2
    for block in blocks:
        (tmp_path / "set.toml").write_text(block)
        assert variants.load_variants(tmp_path / "set.toml").variants
    for key in (*variants.KEYS, "n", "rounds", "prompts"):
        assert f"`{key}`" in page, key


def test_an_equal_cost_row_does_not_take_a_users_name(tmp_path: Path) -> None:
    file = tmp_path / "v.toml"
    text = '[reference]\nsampler = "ddim"\nsteps = 4\n[[variant]]\nname = "reference, 2 steps"\nsampler = "unipc"\nsteps = 2'
    file.write_text(text, encoding="utf-8-sig")  # as editors of Windows write it
    names = [row.name for row, _ in variants.load_variants(file).rows()]
    assert len(set(names)) == len(names) == 3


def test_rows_of_equal_cost_are_named_after_the_reference() -> None:
    assert variants.shorter_name("DDIM, 50 steps, guidance 4", 8) == "DDIM, 8 steps, guidance 4"
    assert variants.shorter_name("10 steps of DDIM", 1) == "1 step of DDIM"
    assert variants.shorter_name("DDIM-50", 2) == "DDIM-50, 2 steps"
