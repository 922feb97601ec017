"""Guidance by a weaker model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.errors import BadInput
from hasten.exact import m2
from hasten.guides import CFG, AutoGuidance
from hasten.model import Model
from hasten.pick import format_spec
from hasten.schedules import VPCosine, VPLinear
from tests.factories import tiny_model

F64 = torch.float64
LABELS = [0, 0, 1, 1, 2, 2]
LABEL = torch.tensor([0, 1, 2, 1])


def test_it_extrapolates_from_the_weak_model_with_the_same_condition() -> None:
    strong, weak = m2(VPLinear(), labels=LABELS), m2(VPLinear(), labels=[0, 1, 2, 0, 1, 2])
    z = torch.randn(4, 2, dtype=F64)
    expected = weak(z, 0.5, label=LABEL) + 2.5 * (strong(z, 0.5, label=LABEL) - weak(z, 0.5, label=LABEL))
    torch.testing.assert_close(AutoGuidance(weak, 2.5).wrap(strong)(z, 0.5, label=LABEL), expected)
    assert AutoGuidance(weak, 1.0).wrap(strong) is strong
    guided = CFG(2.0).wrap(strong)
    both = weak(z, 0.5, label=LABEL) + 2.5 * (guided(z, 0.5, label=LABEL) - weak(z, 0.5, label=LABEL))
    torch.testing.assert_close(AutoGuidance(weak, 2.5).wrap(guided)(z, 0.5, label=LABEL), both)


def test_a_weak_model_by_its_folder(tmp_path: Path) -> None:
    """`autoguidance:weak=FOLDER` samples as the object with its denoiser does; other classes are refused."""

    def model(name: str, classes: tuple[str, ...], seed: int) -> Model:
        return tiny_model(classes, name, seed=seed, steps=2)

    strong, weak = model("strong", ("a", "b"), 0), model("weak", ("a", "b"), 1)
    weak.save(tmp_path / "weak")
    direct = strong.sample(2, guides=[AutoGuidance(weak.denoiser, 1.5)])
    named = strong.sample(2, guides=[f"autoguidance:weak={tmp_path / 'weak'},scale=1.5"])
    assert torch.equal(direct, named) and not torch.equal(direct, strong.sample(2))
    model("other", ("c", "d"), 2).save(tmp_path / "other")
    for weaker, words in ((tmp_path / "other", "other classes"), (tmp_path / "none", "not a bundled name")):
        with pytest.raises(BadInput, match=words):
            strong.sample(2, guides=[AutoGuidance(str(weaker))])
    assert "\n" not in format_spec(AutoGuidance(weak.denoiser))


def test_bad_input() -> None:
    strong = m2(VPLinear(), labels=LABELS)
    for make, words in (
        (lambda: AutoGuidance(), "needs a weaker model"),
        (lambda: AutoGuidance(m2(VPCosine())).wrap(strong), "another schedule"),
        (lambda: AutoGuidance("folder").wrap(strong), "load the weak model first"),
    ):
        with pytest.raises(BadInput, match=words):
            make()
