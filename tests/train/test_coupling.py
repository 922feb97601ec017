"""Minibatch optimal transport: the plan is optimal, and only the noise is permuted."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.train.coupling import couple


def random_pairs(n: int, *shape: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, *shape, generator=g) * 0.5 + 2, torch.randn(n, *shape, generator=g)


def cost(x: Tensor, noise: Tensor) -> float:
    return float((x - noise).double().square().sum())


def test_in_one_dimension_it_is_sorting() -> None:
    x, noise = random_pairs(200, 1)
    paired = couple(x, noise)
    order = x[:, 0].argsort()
    assert torch.equal(paired[order, 0], noise[:, 0].sort().values)


def test_the_assignment_is_the_optimal_permutation() -> None:
    x, noise = random_pairs(6, 1, 2, 2)
    x = 2 * (x - 2)
    costs = [cost(x, noise[list(order)]) for order in itertools.permutations(range(6))]
    assert cost(x, couple(x, noise)) == pytest.approx(min(costs))
    assert min(costs) < 0.9 * sum(costs) / len(costs)  # the others are worse


def test_the_noise_is_permuted() -> None:
    x, noise = random_pairs(128, 3)
    before = x.clone()
    paired = couple(x, noise)
    assert torch.equal(x, before)
    assert torch.equal(paired[:, 0].sort().values, noise[:, 0].sort().values)
    row = (noise == paired[:, None][5]).all(1).nonzero()
    assert len(row) == 1 and torch.equal(noise[row[0, 0]], paired[5])  # entire rows
    assert couple(x, noise, "none") is noise


def test_within_classes_the_noise_is_independent_of_the_class() -> None:
    """Two classes far apart along the first axis. Paired over the batch, each gets one side of the noise."""
    g = torch.Generator().manual_seed(0)
    label = torch.randint(2, (512,), generator=g)
    x = torch.randn(512, 2, generator=g) * 0.3 + 4 * (label[:, None] * 2 - 1) * torch.tensor([1.0, 0.0])
    noise = torch.randn(512, 2, generator=g)

    def gap(paired: Tensor) -> float:
        return abs(float(paired[label == 1, 0].mean() - paired[label == 0, 0].mean()))

    assert gap(couple(x, noise, "ot")) > 1.4  # two half normals: 2 sqrt(2 / pi) = 1.6
    within = couple(x, noise, "ot_class", label)
    assert gap(within) == pytest.approx(gap(noise), abs=1e-6) and gap(noise) < 0.3
    for one in (0, 1):  # the best plan of each class alone
        rows = label == one
        assert torch.equal(within[rows], couple(x[rows], noise[rows]))
    assert cost(x, couple(x, noise)) <= cost(x, within) < cost(x, noise)
    assert torch.equal(couple(x, noise, "ot_class"), couple(x, noise, "ot"))  # no labels: one class


def test_bad_arguments() -> None:
    x, noise = random_pairs(4, 2)
    with pytest.raises(BadInput, match="unknown coupling 'otclass': did you mean"):
        couple(x, noise, "otclass")
    with pytest.raises(BadInput, match="as much noise as data"):
        couple(x, noise[:3])
