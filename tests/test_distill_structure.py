"""`hasten distill --structure`: the relation term in every method that has targets, exactly none at weight 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.errors import BadInput
from hasten.pick import method_names
from hasten.schedules import VPCosine, VPLinear
from hasten.train.checkpoint import read_log
from hasten.workflows.distill import distill_model
from hasten.workflows.distill_checks import takes_structure

from .factories import noise_data, tiny_model, weights

CLASSES = ("a", "b")
METHODS = {
    "progressive": "progressive:steps=(1,)",
    "guided": "guided:steps=(1,),guidance=(1,3)",
    "tract": "tract:phases=(2,1)",
    "consistency": "consistency:nodes=4",
    "prodiff": "prodiff:steps=(1,)",
    "rcfd": "rcfd:steps=(1,),features=random,beta=0",
    "denoising_student": "denoising_student:pairs=8,pair_steps=1",
}
VARIANTS = {
    **METHODS,
    "shared": "guided:steps=(2,1),guidance=(1,3),shared=true",
    "stochastic": "guided:steps=(1,),guidance=none,kind=stochastic",
}


def distilled(out: Path, method: str, structure: Any, eps: bool = False, steps: int = 4, **options: Any) -> Tensor:
    schedule, prediction = (VPLinear(), "eps") if eps else (VPCosine(offset=0.0), "v")
    model = tiny_model(CLASSES, schedule=schedule, prediction=prediction, network={"std": 0.1}, guidance_scale=1.0)
    common = {"steps": steps, "batch_size": 4, "precision": "fp32", "show": False, **options}
    distill_model(model, out, method, data=noise_data(8, classes=CLASSES), structure=structure, **common)
    return weights(hasten.load(out).denoiser)


def test_the_methods_that_take_it() -> None:
    assert {name for name in method_names("distillers") if takes_structure(name)} == set(METHODS)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_method_with_targets(name: str, tmp_path: Path) -> None:
    out = tmp_path / "term"
    moved = distilled(out, VARIANTS[name], "weight=1,width=8", steps=8 if name == "shared" else 4)
    logs = [line for path in out.rglob("log.jsonl") for line in read_log(path)]
    assert bool(moved.isfinite().all()) and logs
    assert any(line.get("structure", 0) < 0 for line in logs)  # minus the distance: something was compared
    plain = [line for path in out.rglob("log.jsonl") if "classifier" not in str(path) for line in read_log(path)]
    assert all("structure" in line for line in plain)


def test_weight_zero_is_the_plain_distillation(tmp_path: Path, eps: bool = True) -> None:
    plain = distilled(tmp_path / "plain", METHODS["progressive"], None, eps)
    assert torch.equal(distilled(tmp_path / "zero", METHODS["progressive"], 0.0, eps), plain)
    term = distilled(tmp_path / "term", METHODS["progressive"], "weight=1,width=8", eps)
    assert bool(term.isfinite().all()) and not torch.equal(term, plain)
    with pytest.raises(BadInput, match="structure"):  # other settings than those of the run
        distilled(tmp_path / "term", METHODS["progressive"], "weight=2,width=8", eps)


def test_refusals_are_one_line(tmp_path: Path) -> None:
    cases = {
        "dmd": (0.1, "dmd has no targets of x0 .* use consistency, "),
        "progressive": ("weight=.1,times=own", "times is for training"),
        "tract": ("weight=-1", "at least 0"),
    }
    for method, (structure, match) in cases.items():
        with pytest.raises(BadInput, match=match) as error:
            distilled(tmp_path / "no", method, structure)
        assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="fsdp"):
        distilled(tmp_path / "no", "progressive", 0.1, fsdp=True)
    assert not (tmp_path / "no").exists()
