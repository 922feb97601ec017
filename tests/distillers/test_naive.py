"""Why guidance is distilled inside the student: the guided sum of two distilled branches is another function.

The step that two steps of DDIM amount to is not linear in what the teacher says, so that guiding two students, each
distilled from a branch of its own, is not distilling the guided teacher.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hasten.distillers._targets import ddim_path
from hasten.guides.cfg import CFG
from recipes.guided_naive import Branches

from ._toy import Draws, mixture

F64 = torch.float64
N = 8_000


def gap(scale: float, order: int = 2) -> tuple[float, float]:
    """Root mean square over points of |naive - right| and of |right|, for the x* of one jump of `order` steps.

    From the angle pi/4 to pi/8 of the toy mixture; class 0, at points of all classes.
    """
    model = mixture()
    label = torch.zeros(N, dtype=torch.long)
    x = model.sample(N, torch.Generator().manual_seed(1))
    z = (x + torch.randn(N, 2, dtype=F64, generator=torch.Generator().manual_seed(2))) * 0.5**0.5
    times = [torch.full((N,), 0.5 - 0.25 * k / order, dtype=F64) for k in range(order + 1)]

    def jump(label: Tensor, scale: float = 1.0) -> Tensor:
        return ddim_path(CFG(scale=scale).wrap(model), model.schedule, z, times, label=label)[1]

    of_class, of_all = jump(label), jump(torch.full_like(label, 3))
    right, naive = jump(label, scale), of_all + scale * (of_class - of_all)
    return tuple((a.square().sum(1).mean().sqrt()).item() for a in (naive - right, right))  # type: ignore[return-value]


def test_the_gap_is_none_without_guidance_and_grows_with_it() -> None:
    """w = scale - 1. Measured .061, .34, 1.03, 2.6 beside targets of .99 to 2.4; to about 2 % with these points."""
    results = [gap(1 + w) for w in (0, 0.3, 1, 2, 4)]
    gaps = [g for g, _ in results]
    assert gaps[0] < 1e-12 and gaps == sorted(gaps)
    assert gaps[1:] == pytest.approx([0.062, 0.34, 1.0, 2.6], rel=0.05)
    assert gaps[-1] > results[-1][1]  # at w = 4 it is larger than what is to be said


def test_it_is_in_the_second_step() -> None:
    """One step of the teacher to one of the student: then it is linear and there is no gap."""
    assert gap(3.0, order=1)[0] < 1e-12 < 0.1 < gap(3.0)[0] < 1.3 * gap(3.0, order=4)[0]


def test_the_recipe_tells_half_of_the_samples_no_class(tmp_path: Path) -> None:
    """What it trains on is both branches, each with its own teacher: the plain network, with and without the class."""
    model, batches = mixture(), Draws(256)
    branches = Branches(teacher=model, denoiser=model, batches=batches, shape=(2,), out=tmp_path)  # type: ignore[arg-type]
    torch.manual_seed(0)
    label = batches[0]["label"]
    labels = branches.cond({"label": label})["label"]
    assert 0.4 < (labels == 3).float().mean() < 0.6 and (labels[labels != 3] == label[labels != 3]).all()
