"""Numbers on the command line, and inside the spelling of methods: every option, checked by type and range."""

from __future__ import annotations

import io
import typing
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest

from hasten.cli import main
from hasten.cli._numbers import RANGES, number_type, read_number
from hasten.cli.verbs import VERBS
from hasten.errors import HastenError
from hasten.pick import pick

NUMBERS = [
    (verb.__name__, name, kind)
    for verb in VERBS
    for name, hint in typing.get_type_hints(verb).items()
    if name != "return" and (kind := number_type(hint)) is not None
]


def cli(*words: Any) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def test_every_number_has_a_range() -> None:
    assert {name for _, name, _ in NUMBERS} <= {key.rpartition(".")[2] for key in RANGES}
    assert ("sample", "n", int) in NUMBERS and ("sample", "guidance_scale", float) in NUMBERS
    assert not [name for _, name, _ in NUMBERS if name in ("label", "json", "device")]


@pytest.mark.parametrize(("verb", "name", "kind"), NUMBERS, ids=[f"{v}-{n}" for v, n, _ in NUMBERS])
def test_no_verb_takes_what_is_no_such_number(verb: str, name: str, kind: type) -> None:
    needed = {
        "train": ["data"],
        "restyle": ["fashion"],
        "show": ["fashion"],
        "extract_lora": ["fashion", "x"],
        "translate": ["fashion", "x"],
        "upscale": ["x", "--model", "fashion"],
    }.get(verb, ["fashion"])
    needed += ["--out", "never"] if verb in ("train", "quantize", "export", "tune", "extract_lora") else []
    wrong = ["inf", "nan", "1e999", "x", "0x10", "9" * 5000, "-" + "9" * 400, ""]
    wrong += ["10.5", "1e3", "1_0", "٣"] if kind is int else ["-1e300"]
    for text in wrong:
        code, out, said = cli(verb.replace("_", "-"), *needed, f"--{name.replace('_', '-')}={text}")
        assert code in (1, 2) and not out, (text, code, said)
        assert len(said.splitlines()) == 1 and len(said) < 300, said
        assert (f"--{name.replace('_', '-')}" in said or f"hasten: {name} must be" in said) and "must be" in said


def test_what_was_meant_is_said() -> None:
    assert "write 1000" in cli("sample", "fashion", "--n", "1e3")[2]
    assert "at most 18446744073709551615" in cli("sample", "fashion", "--seed", 2**64)[2]
    assert "at least 0, got -1" in cli("sample", "fashion", "--seed", -1)[2]


@pytest.mark.parametrize(
    "text",
    [
        "heun:churn=nan",
        "heun:churn=1e999",
        "heun:churn=1e308",
        "heun:churn=-1e20",
        "adaptive:e_abs=1e308",
        "sa:tau=nan",
        "sa:tau=1e308",
        "predictor_corrector:corrections=99999999999999999999",
        "dpm:order=1e3",
        "dpm:order=2.5",
    ],
)
def test_numbers_inside_a_method_are_checked(text: str) -> None:
    name, _, option = text.partition(":")
    with pytest.raises(HastenError, match=f"{name}.*{option.partition('=')[0]}"):
        pick("samplers", text)


def test_infinity_is_taken_where_it_means_something() -> None:
    assert pick("guides", "interval:low=0.2,high=inf").high == float("inf")


def test_numbers_are_read_as_they_are() -> None:
    assert (
        read_number("+7", int, 1, 9) == 7
        and read_number("-3", int) == -3
        and read_number(str(2**64 - 1), int) == 2**64 - 1
    )
    for text, value in {"1": 1.0, ".5": 0.5, "2.": 2.0, "1e-3": 1e-3, "-1.5E+2": -150.0}.items():
        assert read_number(text, float) == value
