"""`make gpu`: refuses politely without a GPU; the quick trial on a CPU writes rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main() == 2
    said = capsys.readouterr().out
    assert said.startswith("There is no GPU here") and "--device cpu --quick" in said and said.count("\n") == 1


def test_a_table_compares_with_its_first_row_and_says_what_failed() -> None:
    def fails() -> None:
        raise NotImplementedError("no kernel\nfor this")

    rows = [
        gpu.Row("first", lambda: lambda: torch.zeros(2, 1, 4, 4)),
        gpu.Row("off", lambda: lambda: torch.full((2, 1, 4, 4), 0.2)),
        gpu.Row("broken", fails),  # type: ignore[arg-type]
    ]
    gpu.measure(rows, torch.device("cpu"), 3, gpu.Clock(float("inf")))
    lines = "\n".join(gpu.table("a table", rows, 2))
    assert "**a table**, batch 2, rounds: 3" in lines and "| off |" in lines and "20.0 dB" in lines
    assert "| first |" in lines and " 1.00x (1.00 to 1.00) |" in lines
    assert "Not measured: broken: no kernel." in lines
    late = [gpu.Row("late", fails)]  # type: ignore[arg-type]
    gpu.measure(late, torch.device("cpu"), 3, gpu.Clock(0.0))
    assert late[0].why == "no time left"


@pytest.mark.slow
def test_the_quick_trial_writes_rows(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    assert gpu.main(device="cpu", quick=True, out=tmp_path / "gpu.md") == 0
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("## Trial of benchmarks.gpu on ") and text.count("| the same, bf16 weights |") == 3
    assert "torchao" in text.partition("Not measured:")[2] and f"torch {torch.__version__}" in text
