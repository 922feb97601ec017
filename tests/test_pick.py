"""Methods by name, and what is said when there is none."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

import hasten
from hasten import samplers
from hasten.errors import BadInput, HastenError
from hasten.guides import CFG
from hasten.pick import format_spec, method_names, pick
from hasten.times import CosineAngle, Explicit, Karras, UniformLambda, UniformTime


def test_names_are_the_files() -> None:
    assert {"ddim", "ddpm", "deis", "dpm", "heun", "plms", "unipc"} <= set(method_names("samplers"))
    assert not any(name.startswith("_") for name in method_names("samplers"))
    assert method_names("times") == ["angle", "explicit", "karras", "lambda", "quadratic", "trailing", "uniform"]
    assert "cfg" in method_names("guides")


@pytest.mark.parametrize(
    "folder, text, expected",
    [
        ("samplers", "heun", samplers.Heun()),
        ("samplers", " heun : churn=0.1 , churn_max=inf", samplers.Heun(churn=0.1)),
        ("samplers", "heun:churn=3", samplers.Heun(churn=3.0)),
        ("samplers", "ddpm:variance=large", samplers.DDPM(variance="large")),
        ("samplers", "ddpm:variance='large'", samplers.DDPM(variance="large")),
        ("samplers", "unipc:order=3,corrector=false", samplers.UniPC(order=3, corrector=False)),
        ("samplers", "dpm:order=1,sde=True", samplers.DPMSolver(order=1, sde=True)),
        ("times", "lambda", UniformLambda()),
        ("times", "karras:rho=5,start=0.9", Karras(rho=5.0, start=0.9)),
        ("times", "uniform:start=none", UniformTime()),
        ("times", "angle:scale=.5", CosineAngle(scale=0.5)),
        ("times", "explicit:values=(1, 0.5, 0)", Explicit((1.0, 0.5, 0.0))),
        ("guides", "cfg:scale=2,interval=(0.19,inf),rescale=1e-1", CFG(2.0, (0.19, math.inf), 0.1)),
        ("guides", "cfg:interval=None", CFG()),
    ],
)
def test_pick_and_spell_are_inverse(folder: str, text: str, expected: object) -> None:
    found = pick(folder, text)
    assert found == expected and type(found) is type(expected)
    assert pick(folder, format_spec(found)) == found


def test_every_method_can_be_picked_and_spelled() -> None:
    for folder in ("samplers", "times", "guides"):
        for name in method_names(folder):
            if name not in ("explicit", "autoguidance"):  # which need an argument
                method = pick(folder, name)
                assert format_spec(method) == name and pick(folder, format_spec(method)) == method


def test_whole_numbers_become_floats_where_floats_are_meant() -> None:
    assert isinstance(pick("samplers", "heun:churn=3").churn, float)
    assert all(isinstance(v, float) for v in pick("times", "explicit:values=(1,0)").values)


@pytest.mark.parametrize(
    "folder, text, says",
    [
        ("samplers", "huen", r"unknown sampler 'huen': did you mean 'heun'\? \(choices: .*unipc"),
        ("samplers", "", "unknown sampler ''"),
        ("samplers", "_phi", "unknown sampler"),
        ("times", "kerras", "unknown time grid 'kerras': did you mean 'karras'"),
        ("sampler", "heun", "did you mean 'samplers'"),
        ("samplers", "heun:chrun=1", "heun has no option 'chrun': did you mean 'churn'"),
        ("samplers", "heun:churn=lots", "heun: churn must be a number, found 'lots'"),
        ("samplers", "heun:churn=true", "must be a number, found True"),
        ("samplers", "unipc:order=2.5", "order must be a whole number, found 2.5"),
        ("samplers", "unipc:corrector=1", "corrector must be true or false, found 1"),
        ("samplers", "ddpm:variance=3", "variance must be a word, found 3"),
        ("samplers", "heun:churn", "write option=value"),
        ("samplers", "heun:", "write option=value"),
        ("samplers", "heun:churn=1,churn=2", "churn is given twice"),
        ("samplers", "unipc:order=9", "order must be 1, 2, 3 or 4"),
        ("guides", "cfg:interval=(1,2,3)", r"interval must be a tuple \(number, number\) or none, found \(1, 2, 3\)"),
        ("times", "explicit", r"explicit needs values=..., a tuple \(number, ...\)"),
        ("times", "explicit:values=(0,1)", "strictly decrease"),
    ],
)
def test_what_is_said_about_a_mistake(folder: str, text: str, says: str) -> None:
    with pytest.raises(HastenError, match=says) as caught:
        pick(folder, text)
    assert "\n" not in str(caught.value)


def test_a_new_file_is_a_new_method(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the file: it is found by its name."""
    (tmp_path / "mine.py").write_text(  # type: ignore[operator]
        "from dataclasses import dataclass\nfrom typing import Literal\n"
        "@dataclass(frozen=True)\nclass Mine:\n    kind: Literal['round', 'square'] = 'round'\n"
        "@dataclass\nclass _Hidden:\n    x: int = 0\n"
    )
    (tmp_path / "two.py").write_text(  # type: ignore[operator]
        "from dataclasses import dataclass\n@dataclass\nclass A: ...\n@dataclass\nclass B: ...\n"
    )
    monkeypatch.setattr(hasten.samplers, "__path__", [*hasten.samplers.__path__, str(tmp_path)])
    assert "mine" in method_names("samplers")
    assert pick("samplers", "mine:kind=square").kind == "square"
    with pytest.raises(BadInput, match="one of round, square, found 'sqare': did you mean 'square'"):
        pick("samplers", "mine:kind=sqare")
    with pytest.raises(HastenError, match=r"one public dataclass, found \['A', 'B'\]"):
        pick("samplers", "two")


def test_public_names() -> None:
    assert len(hasten.__all__) == len(set(hasten.__all__)) < 100
    for name in hasten.__all__:
        assert callable(getattr(hasten, name)), name
    assert set(hasten.__all__) <= set(dir(hasten))
    assert hasten.pick("samplers", "ddim") == hasten.DDIM()
    assert hasten.times.Karras is Karras
    with pytest.raises(AttributeError, match="nonsense"):
        _ = hasten.nonsense  # type: ignore[attr-defined]


def test_importing_hasten_brings_in_nothing() -> None:
    code = "import sys, hasten; print(sorted(m for m in ('torch', 'numpy', 'scipy') if m in sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
    )
