"""What the documents show must run."""

from __future__ import annotations

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
