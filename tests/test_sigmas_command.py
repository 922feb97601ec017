"""`hasten sigmas`: the times of models and plans in the conventions of other programs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from hasten.cli import main
from hasten.errors import BadInput
from hasten.pick import pick
from hasten.plan import plan
from hasten.plan.sigma_lists import decimal, sigma_lists
from hasten.samplers import DDIM, UniPC
from hasten.schedules import Discrete, Flow, VPCosine
from hasten.times import Karras, UniformTime

from .adapters import tiny


def manual_sigmas(text: str) -> list[float]:
    """How ComfyUI's node reads its text."""
    return [float(number) for number in re.findall(r"[-+]?(?:\d*\.*\d+)", text)]


def test_euler_on_the_lists_takes_the_steps_of_ddim() -> None:
    """k-diffusion's Euler on sigma / alpha, and diffusers' Euler of flows: the plan, up to six digits of the sigmas."""
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double()
    table = Discrete.scaled_linear(convention="log_q")
    compiled = plan(DDIM(), table, Karras()(table, 6))
    lists = sigma_lists(compiled)
    assert lists.warnings == () and lists.timesteps is not None and len(lists.timesteps) == 6
    assert manual_sigmas(lists.manual_sigmas) == pytest.approx(lists.sigmas, rel=1e-5) and lists.sigmas[-1] == 0
    assert [float(one) for one in lists.sd_cpp.split(",")] == manual_sigmas(lists.manual_sigmas)
    z = x * (1 + lists.sigmas[0] ** 2) ** 0.5
    for level, lower in zip(manual_sigmas(lists.manual_sigmas), manual_sigmas(lists.manual_sigmas)[1:]):
        x0 = (z / (1 + level**2) ** 0.5).sin()  # the network's input is scaled
        z = x0 + (z - x0) * lower / level
    start = x * float(table.prior_std(compiled.times[0])) if False else x
    assert torch.allclose(z, compiled(lambda y, t: y.sin(), start), atol=1e-4)

    from diffusers import FlowMatchEulerDiscreteScheduler

    flow = Flow(3.0)
    compiled = plan(DDIM(), flow, UniformTime()(flow, 6))
    lists = sigma_lists(compiled)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=list(lists.diffusers))  # which applies the shift and appends the 0
    assert scheduler.sigmas.tolist() == pytest.approx(lists.sigmas, rel=1e-5) and lists.timesteps is None


@pytest.mark.parametrize("sampler", ["unipc:order=3", "heun", "dpm:sde=true", "plms"])
def test_what_stays_behind_is_said(sampler: str) -> None:
    lists = sigma_lists(plan(pick("samplers", sampler), VPCosine(), UniformTime()(VPCosine(), 5)))
    said = " ".join(lists.warnings)
    assert ("noise that the plan adds" if "sde" in sampler else "coefficients") in said
    assert ("times at 5 sigmas" in said) is (sampler in ("heun", "plms"))
    assert len(lists.sigmas) == 6


def test_numbers_have_no_exponents() -> None:
    for value in (14.614641, 0.0000312345678, 157.407, 1.0, 0.0, 4518.76, 1e-9):
        text = decimal(value)
        assert "e" not in text and float(text) == pytest.approx(value, rel=1e-5)
        assert [float(text)] == manual_sigmas(text)
    with pytest.raises(BadInput, match="is pure noise, whose sigma is infinite"):
        sigma_lists(plan(DDIM(), VPCosine(), torch.tensor([1.0, 0.5, 0.0]).double()))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pipe"
    tiny.sd3_pipeline().save_pretrained(folder)
    capsys.readouterr()
    words = ["sigmas", str(folder), "--sampler", "ddim", "--times", "uniform", "--steps", "4"]
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    times = UniformTime()(Flow(3.0), 4)
    assert result["diffusers"]["sigmas"] == pytest.approx(times[:-1].tolist())
    assert manual_sigmas(result["comfyui"]) == pytest.approx(Flow(3.0).sigma(times).tolist(), rel=1e-5)
    assert "coefficients" not in err
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "FlowMatchEulerDiscreteScheduler" in out and f"--sigmas {result['stable-diffusion.cpp']}" in out
    compiled = plan(UniPC(), VPCosine(), UniformTime()(VPCosine(), 5))
    (tmp_path / "plan.json").write_text(compiled.to_json())
    assert main(["sigmas", str(tmp_path / "plan.json")]) == 0
    out, err = capsys.readouterr()
    assert "the coefficients of unipc stay behind" in err and "UniPCMultistepScheduler, uni_pc" in err
    assert main(["sigmas", str(tmp_path / "plan.json"), "--steps", "3"]) == 1
    assert "remove --steps" in capsys.readouterr().err
    assert main(["sigmas", str(folder), "--sampler", "adaptive"]) == 1
    assert "name a sampler with steps" in capsys.readouterr().err
