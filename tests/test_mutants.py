"""The list of mutants applies to the sources as they are, and the check tells survivors from killed ones."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import mutants
from tests.mutants import ROOT, Mutant, check, load


@pytest.mark.parametrize("mutant", load(), ids=lambda mutant: mutant.name)
def test_every_mutant_applies(mutant: Mutant) -> None:
    """The text to replace is there once, the result is Python, and the tests that should fail exist."""
    assert mutant.old != mutant.new
    ast.parse(mutant.source(ROOT))
    files = [word for word in mutant.tests.split() if word.startswith("tests")]
    assert files and all((ROOT / word.partition("::")[0]).exists() for word in files)


def test_names_are_distinct() -> None:
    names = [mutant.name for mutant in load()]
    assert len(names) == len(set(names))


def project(folder: Path) -> None:
    (folder / "half.py").write_text("def half(x):\n    return x / 2\n")
    (folder / "test_half.py").write_text("from half import half\n\ndef test_half():\n    assert half(4) == 2\n")
    (folder / "test_weak.py").write_text("from half import half\n\ndef test_half():\n    assert half(4) > 0\n")


def test_a_weak_test_lets_a_mutant_survive(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(mutants, "copy_project", project)
    seen = Mutant("seen", "half.py", "x / 2", "x / 3", "test_half.py")
    missed = Mutant("missed", "half.py", "x / 2", "x / 3", "test_weak.py")
    assert check([seen, missed], jobs=1) == [missed]
    printed = capsys.readouterr().out
    assert "killed    seen" in printed and "SURVIVED  missed" in printed and "1 of 2" in printed


def test_a_text_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    project(tmp_path)
    with pytest.raises(ValueError, match="0 times"):
        Mutant("gone", "half.py", "x / 5", "x", "test_half.py").source(tmp_path)
