"""What the documents show must run."""

from __future__ import annotations

import inspect
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from hasten.plan import plan
from hasten.samplers.ddim import DDIM
from hasten.schedules import EDM, Flow, VPCosine
from hasten.times import UniformTime

ROOT = Path(__file__).parent.parent


def test_the_sampler_of_contributing_is_first_order_ddim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Euler's method in the coordinate x / sigma is DDIM (Song et al. 2020, 2010.02502, section 4.3), row by row."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert block is not None
    module = types.ModuleType("hasten.samplers.euler")
    module.__package__ = "hasten.samplers"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(block.group(1), vars(module))
    euler = module.Euler()
    assert euler.nfe(6) == 6
    for schedule in (VPCosine(), EDM(), Flow()):
        times = UniformTime()(schedule, 6)
        mine, theirs = plan(euler, schedule, times), plan(DDIM(), schedule, times)
        for name in ("a", "B", "C"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-10, atol=1e-12)


def test_the_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Block after block in one namespace, as a reader would type them."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for block in blocks:
        exec(block, space)
    images, x, samples = (space[name] for name in ("images", "x", "samples"))
    assert images.shape == (10, 1, 28, 28) and x.shape == (10, 1, 28, 28) and samples.shape == (4, 3, 32, 32)
    # the second way of the first block is the first without guidance: the same seeds draw the same clothes
    assert torch.isfinite(x).all() and (x.clamp(-1, 1) - images).square().mean() < 0.1


def test_the_commands_of_the_readme_are_commands() -> None:
    """Every `hasten ...` line of the README names a verb and options that exist."""
    from hasten.cli import verbs as commands

    pages = (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    text = "\n".join(page.read_text() for page in pages).replace("\\\n", " ")
    lines = re.findall(r"^(?:torchrun .* -- )?hasten (\w+)(.*)$", text, re.M)
    assert len(lines) >= 6
    for verb, rest in lines:
        known = inspect.signature(getattr(commands, verb)).parameters
        for option in re.findall(r"--([\w-]+)", rest.split("#")[0]):
            assert option.replace("-", "_") in known, (verb, option)
        out = re.findall(r"--out (\S+)", rest)
        assert verb != "sample" or "--separate-files" in rest or all(file.endswith(".png") for file in out), rest


def test_the_files_that_the_documents_point_at_are_there() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)
