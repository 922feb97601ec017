"""Sets of variants and settings that a comparison refuses, in one line, before anything runs."""

# The fixtures are those of test_compare, so their names come up again as arguments.
# ruff: noqa: F401, F811

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hasten import compare as engine
from hasten import variants
from hasten.errors import BadInput

from .test_compare import SET, Corner, chosen, run, tiny


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("n = 12", "m = 12", r"unknown key 'm': .*choices: reference, variant, n, rounds"),
        ("n = 12", "n = 0", r"n must be a whole number from 10, got 0"),
        ("[reference]", "[reference", r"not valid TOML"),
        ("[reference]", "[referense]", r"unknown key 'referense': did you mean 'reference'"),
        ('sampler = "heun"', 'sampler = "huen"', r"variant 3 \('plain Heun'\): sampler: .*'huen'.*did you mean 'heun'"),
        ('sampler = "heun"', 'sampler = "heun:chrn=1"', r"variant 3 \('plain Heun'\): sampler: .*churn"),
        ('times = "lambda"', 'times = "lamda"', r"\[reference\]: times: .*lambda"),
        ("steps = [2, 4]", "stpes = 4", r"variant 1 \('DDIM'\): unknown key 'stpes': did you mean 'steps'"),
        ("steps = [2, 4]", "steps = []", r"variant 1 \('DDIM'\): steps must be one or more values"),
        ("steps = [2, 4]", "steps = [2, 0]", r"variant 1 \('DDIM'\): steps must be a whole number from 1, got 0"),
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
    run: Any, chosen: Path, tmp_path: Path, old: str, new: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert old in SET
    chosen.write_text(SET.replace(old, new, 1))
    monkeypatch.setattr(engine.Run, "sample", lambda *a: pytest.fail("something was sampled"))
    with pytest.raises(BadInput, match=said) as error:
        run()
    assert "\n" not in str(error.value)
    assert str(chosen) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_set_names_the_bundled_ones() -> None:
    with pytest.raises(
        BadInput,
        match=r"no set of variants 'dmeo'.*did you mean 'demo'\? \(choices: cheaper, demo, fashion, full, guidance, students, training_free\)",
    ):
        variants.read("dmeo")


def test_features_of_another_network_are_refused_before_anything_runs(run: Any, tmp_path: Path) -> None:
    class Other(Corner):
        name = "other"

    with pytest.raises(BadInput, match="corner features: other cannot judge"):
        run(features=Other())
    assert not (tmp_path / "out").exists()


def test_guidance_without_classes_is_refused_before_anything_runs(run: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"'best': .*guidance_scale must be 1"):
        run(tiny(classes=None))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"n": 5}, {"rounds": 0}, {"seed": -1}, {"batch_size": 0}])
def test_bad_numbers(run: Any, wrong: dict[str, int]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        run(**wrong)
