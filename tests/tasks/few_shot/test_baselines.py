"""The baselines: each finds classes that its features separate, and what it cannot do it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.tasks.few_shot.baselines import LinearProbe, NearestNeighbour, PrototypicalNetwork, TipAdapter


def points(n: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Two classes that lie apart in one of ten directions, with noise in the others."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 10, generator=generator), np.array(["left", "right"] * (n // 2))
    x[:, 0] = torch.tensor([-4.0, 4.0]).repeat(n // 2) + 0.3 * x[:, 0]
    return x, y


@pytest.mark.parametrize("method", [NearestNeighbour(), LinearProbe(), TipAdapter(), TipAdapter(True)], ids=repr)
def test_separate_classes_are_found(method: NearestNeighbour | LinearProbe | TipAdapter) -> None:
    assert method.fit(*points(16, 0)).score(*points(100, 1)) > 0.9
    with pytest.raises(BadInput, match="two classes"):
        method.fit(points(4, 0)[0], ["a"] * 4)


def test_tip_adapter_is_its_formula_and_learns_its_keys() -> None:
    x, y = points(6, 0)
    plain, tuned = TipAdapter(alpha=2.0, beta=3.0).fit(x, y), TipAdapter(True, alpha=2.0, beta=3.0, lr=0.1).fit(x, y)
    unit = torch.nn.functional.normalize(x, dim=1)
    means = torch.stack([unit[::2].mean(0), unit[1::2].mean(0)])
    values = torch.eye(2).repeat(3, 1)
    expected = 2 * torch.exp(-3 * (1 - unit @ unit.T)) @ values + 100 * unit @ torch.nn.functional.normalize(means).T
    torch.testing.assert_close(plain.scores(x), expected)
    index = torch.tensor([0, 1]).repeat(3)
    loss = [float(torch.nn.functional.cross_entropy(one.scores(x), index)) for one in (plain, tuned)]
    assert loss[1] <= loss[0] and not torch.equal(plain.scores(x), tuned.scores(x))


def test_a_prototypical_network_learns_from_other_classes() -> None:
    """Stripes of eight directions in training, of two others in the test."""
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    generator = torch.Generator().manual_seed(0)

    def stripes(angles: list[float], n: int) -> tuple[Tensor, list[str]]:
        images, labels = [], []
        for angle in angles:
            a = torch.tensor(angle)
            for _ in range(n):
                phase = 6.3 * torch.rand((), generator=generator)
                images.append(torch.sin(1.2 * (a.cos() * rows + a.sin() * columns) + phase)[None])
                labels.append(str(angle))
        return torch.stack(images), labels

    net = PrototypicalNetwork(ways=4, shots=2, queries=2, episodes=15, width=8, lr=1e-2)
    with pytest.raises(BadInput, match="call train first"):
        net.fit(*stripes([0.0, 1.5], 1))
    net.train(*stripes([0.1, 0.5, 0.9, 1.3, 1.7, 2.1, 2.5, 2.9], 6))
    assert net.fit(*stripes([0.3, 1.9], 3)).score(*stripes([0.3, 1.9], 20)) > 0.9
    with pytest.raises(BadInput, match="two classes of 4"):
        PrototypicalNetwork(shots=2, queries=2).train(*stripes([0.0, 1.0], 3))
