"""The sampler that CONTRIBUTING shows, pasted into its file, passes the contract tests and is there by name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = """
import sys, pytest, hasten, hasten.samplers
hasten.samplers.__path__.append(sys.argv[1])  # as if the file lay in the folder
sampler = hasten.pick("samplers", "euler")
assert type(sampler).__name__ == "Euler" and "euler" in hasten.pick.method_names("samplers")
images = hasten.load("fashion").sample(1, sampler="euler", steps=2)
assert (images - hasten.load("fashion").sample(1, sampler="ddim", steps=2)).abs().max() < 1e-5
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", "Euler", "tests/samplers/test_contract.py"]))
"""


def test_the_example_of_a_sampler_passes_the_contract(tmp_path: Path) -> None:
    code = re.search(r'```python\n(""".*?)```', (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert code is not None and "class Euler" in code[1]
    (tmp_path / "euler.py").write_text(code[1])
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 10
