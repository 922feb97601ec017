"""Accelerators through a model: sampling, the command line, comparisons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hasten.accelerators import Conflict
from hasten.cli import main
from hasten.compare import compare
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.model import Model
from hasten.nets.unet import UNet
from hasten.schedules import VPCosine

SET = """
n = 20
rounds = 1
[reference]
name = "plain"
sampler = "ddim"
steps = 20
guidance_scale = 2.0
[[variant]]
name = "cached"
sampler = "ddim"
steps = 20
guidance_scale = 2.0
accelerators = ["deep_cache:every=4"]
[[variant]]
name = "both"
sampler = "ddim"
steps = 20
guidance_scale = 2.0
accelerators = ["encoder_propagation:keys=uniform", "quantize:images=2,steps=4"]
"""


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    net = UNet(1, widths=(16, 24), classes=3, embedding=32)
    for p in net.parameters():
        nn.init.normal_(p, std=0.08)
    denoiser = Denoiser(net, VPCosine(offset=0.0), "v").eval().requires_grad_(False)
    return Model(denoiser, "tiny", (1, 8, 8), ("a", "b", "c"), sampler="ddim", times="trailing", steps=20)


def test_key_steps_alone_change_nothing_and_fewer_do(model: Model) -> None:
    plain = model.sample(3, guidance_scale=2.0)
    every = f"encoder_propagation:keys=({','.join(map(str, range(20)))})"
    assert torch.allclose(model.sample(3, guidance_scale=2.0, accelerators=[every]), plain, atol=1e-6)
    reused = model.sample(3, guidance_scale=2.0, accelerators=["encoder_propagation:keys=uniform"], batch_size=2)
    assert 1e-5 < (reused - plain).abs().max() < 0.5  # two batches: the second begins anew
    again = model.sample(3, guidance_scale=2.0, accelerators=["encoder_propagation:keys=uniform"])
    assert torch.allclose(again, reused, atol=1e-5)


def test_prior_noise_injection_changes_the_plan(model: Model) -> None:
    held_out, injected = (
        model.way(accelerators=[f"encoder_propagation:keys=uniform,inject={share}"]).plan for share in (0, 0.003)
    )
    assert held_out is not None and injected is not None
    assert (
        not torch.equal(held_out.start, injected.start)
        or not torch.equal(held_out.a, injected.a)
        or not torch.equal(held_out.A, injected.A)
    )
    a = model.sample(2, accelerators=["encoder_propagation:keys=uniform"])
    b = model.sample(2, accelerators=["encoder_propagation:keys=uniform,inject=0.003"])
    assert 0 < (a - b).abs().max() < 0.5


def test_unsupported_options_are_one_line(model: Model) -> None:
    with pytest.raises(Conflict, match=r"encoder_propagation and deep_cache both claim 'features'"):
        model.sample(1, accelerators=["encoder_propagation", "deep_cache"])
    with pytest.raises(BadInput, match="8"):
        model.sample(1, steps=8, accelerators=["encoder_propagation"])
    with pytest.raises(BadInput, match="unknown accelerator 'deep_cach': did you mean 'deep_cache'"):
        model.sample(1, accelerators=["deep_cach"])
    with pytest.raises(BadInput, match="must know the times"):
        model.sample(1, sampler="adaptive", accelerators=["deep_cache"])


def test_the_command_line_and_its_record(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.save(tmp_path / "tiny")
    arguments = ["sample", str(tmp_path / "tiny"), "--out", str(tmp_path / "a.png"), "--n", "3", "--precision", "fp32"]
    assert main([*arguments, "--accelerate", "deep_cache:every=4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accelerators"] == ["deep_cache:every=4"]
    from PIL import Image

    with Image.open(tmp_path / "a.png") as picture:
        assert "--accelerate deep_cache:every=4" in picture.text["command"]  # type: ignore[attr-defined]


def test_a_comparison_counts_evaluations_and_measures_time(model: Model, tmp_path: Path) -> None:
    (tmp_path / "set.toml").write_text(SET)
    rows = compare(model, tmp_path / "set.toml", out=tmp_path / "out", runtime="fp32", show=False)
    by = {row["name"]: row for row in rows}
    assert [by[name]["nfe"] for name in ("plain", "cached", "both")] == [40, 40, 40]
    assert by["cached"]["macs_per_image"] < 0.9 * by["plain"]["macs_per_image"]
    assert by["both"]["macs_per_image"] is None  # integer layers are not counted
    assert by["cached"]["psnr"] > 10 and by["both"]["psnr"] > 10
    assert (tmp_path / "out" / "report.html").exists()


def test_a_comparison_of_accelerators_on_a_pipelines_folder(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from tests.adapters import tiny as pipelines

    pipelines.sd_pipeline().save_pretrained(tmp_path / "pipe")
    (tmp_path / "set.toml").write_text(SET.replace('times = "', 'times = "uniform:start=0.999" # "'))
    rows = compare(
        tmp_path / "pipe", tmp_path / "set.toml", out=tmp_path / "out", runtime="fp32", show=False, prompts=["a cat"]
    )
    by = {row["name"]: row for row in rows}
    assert by["plain"]["nfe"] == by["cached"]["nfe"] == by["both"]["nfe"] and by["plain"]["frechet"] is None
    assert 10 < by["cached"]["psnr"] < 100 and 10 < by["both"]["psnr"] < 100
