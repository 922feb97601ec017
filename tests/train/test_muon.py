"""Muon: its updates are orthogonal, and its AdamW half matches torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.train.muon import Muon, orthogonalize, split_parameters


@pytest.mark.parametrize("shape", [(32, 32), (16, 144), (96, 24), (3, 24, 40)])
def test_singular_values_of_a_step_are_near_one(shape):
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(shape, generator=generator)
    s = torch.linalg.svdvals(orthogonalize(g))
    assert 0.5 < s.min() and s.max() < 1.4


def test_the_step_keeps_the_singular_vectors():
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator))
    g = u @ torch.diag(torch.linspace(0.2, 2.0, 24)) @ v.T
    inner = u.T @ orthogonalize(g) @ v  # U^T (U S' V^T) V is diagonal
    assert (inner - torch.diag(torch.diagonal(inner))).abs().max() < 1e-4
    assert torch.diagonal(inner).min() > 0.5


def test_a_batch_of_matrices_matches_each_matrix_alone():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(3, 20, 50, generator=generator)
    together, alone = orthogonalize(g), torch.stack([orthogonalize(m) for m in g])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_other_parameters_are_trained_as_by_adamw():
    torch.manual_seed(0)
    start = [torch.randn(7), torch.randn(3, 5)]
    ours, theirs = [[nn.Parameter(p.clone()) for p in start] for _ in range(2)]
    a = Muon([], ours, adam_lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    b = torch.optim.AdamW(theirs, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_a_kernel_moves_by_the_scaled_rate_in_every_direction():
    """With momentum 0 and no decay a step is lr sqrt(out / in) times an orthogonal matrix."""
    p = nn.Parameter(torch.zeros(64, 4, 2, 2))
    optimiser = Muon([p], [], lr=0.1, momentum=0.0, weight_decay=0.0)
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    optimiser.step()
    s = torch.linalg.svdvals(p.detach().flatten(1)) / (0.1 * (64 / 16) ** 0.5)
    assert 0.5 < s.min() and s.max() < 1.4


def test_vectors_embeddings_and_outer_layers_are_for_adamw():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.label = nn.Embedding(4, 8)
            self.conv_in, self.hidden, self.conv_out = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 1, 3)

    net = Net()
    matrices, others = split_parameters(net)
    assert [id(p) for p in matrices] == [id(net.hidden.weight)]
    assert len(others) == len(list(net.parameters())) - 1


def test_vectors_raise():
    with pytest.raises(ValueError, match="matrices and kernels"):
        Muon([nn.Parameter(torch.zeros(3))], [])
