"""Teachers that predict eps on DDPM's table: the default weight of the loss does not leave only one time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.denoiser import Denoiser
from hasten.distillers._notices import run_notices
from hasten.distillers._targets import output_weight, resolve_weight
from hasten.pick import method_names, pick

from ._eps import TABLE, table_task
from ._toy import Small, energy, sample, truth

T = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.05], dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow", "edm"])
def test_auto_is_the_plain_error_of_eps_and_snr_plus_one_of_the_rest(prediction: str) -> None:
    student = Denoiser(Small(), TABLE, prediction)
    values = output_weight(student, T, "auto")
    assert torch.equal(values, output_weight(student, T, "raw" if prediction == "eps" else "snr+1"))
    if prediction != "x0":  # whose 1 + SNR is meant to grow towards the image
        assert values.max() / values.min() < 20
    assert output_weight(student, T, "snr+1").max() / output_weight(student, T, "snr+1").min() < 20 or prediction in (
        "x0",
        "eps",
    )
    assert resolve_weight(student, "auto", "truncated") == ("raw" if prediction == "eps" else "truncated")
    assert resolve_weight(student, "snr") == "snr"


def test_every_method_with_a_weight_of_the_times_leaves_it_to_the_prediction() -> None:
    weighted = {"progressive", "tract", "guided", "encoder", "rcfd"}
    assert {
        name for name in method_names("distillers") if getattr(pick("distillers", name), "weight", None) == "auto"
    } == (weighted)


@pytest.mark.parametrize("method", ["progressive:steps=(4,2),lr=0.001", "tract:phases=(8,2),lr=0.001"])
def test_a_student_of_an_eps_teacher_is_as_good_as_one_of_a_v_teacher(method: str, tmp_path: Path) -> None:
    """Energy distance to the mixture; with "snr+1" or "truncated" the eps student's is 2 to 7 times the v student's."""
    values = {}
    for prediction in ("eps", "v"):
        student = pick("distillers", method).distill(table_task(tmp_path / prediction, prediction, 60))
        values[prediction] = energy(sample(student, 2000), truth(3000))
    assert values["eps"] < 1.3 * values["v"] + 0.002, values


@pytest.mark.parametrize("method", ["dmd", "mmd", "consistency", "prodiff"])
def test_methods_whose_students_of_eps_networks_are_worse_say_so(method: str) -> None:
    """On the mixture their energy distances are 3 to 190 times those of the v teacher's students."""
    (line,) = run_notices(pick("distillers", method), Denoiser(Small(), TABLE, "eps"), 8, 1)
    assert line.startswith(method) and "157 times" in line
    assert not run_notices(pick("distillers", method), Denoiser(Small(), TABLE, "v"), 8, 1)
