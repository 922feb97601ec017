"""Contrastive towers: the loss in closed form, captions that occur twice, and what is refused when they are opened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.errors import BadInput
from hasten.nets.contrastive import ContrastiveTowers, ImageTower

from ..adapters import tiny


def towers() -> ContrastiveTowers:
    torch.manual_seed(0)
    return ContrastiveTowers(tiny.text_encoder(), ImageTower((8, 16)), dim=8)


def batch(n: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 16, 16, generator=generator), torch.randint(3, 20, (n, 8), generator=generator)


def test_the_loss_is_the_mean_of_both_cross_entropies() -> None:
    net, (x, tokens) = towers(), batch()
    logits = net.log_scale.exp() * net.image(x) @ net.text(tokens).T
    own = torch.arange(4)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(net.loss(x, tokens), expected)
    assert (net.loss(x, tokens) - F.cross_entropy(logits, own)).abs() > 1e-4  # one direction alone differs


def test_a_caption_that_occurs_twice_is_right_for_both_images() -> None:
    net, (x, tokens) = towers(), batch()
    tokens[1] = tokens[0]
    log = F.log_softmax(net.log_scale.exp() * net.image(x) @ net.text(tokens).T, dim=1)
    back = F.log_softmax((net.log_scale.exp() * net.image(x) @ net.text(tokens).T).T, dim=1)
    pairs = [(0, 0, 0.5), (0, 1, 0.5), (1, 0, 0.5), (1, 1, 0.5), (2, 2, 1.0), (3, 3, 1.0)]
    expected = -sum(w * (log[i, j] + back[i, j]) for i, j, w in pairs) / 8
    torch.testing.assert_close(net.loss(x, tokens), expected)


def test_vectors_are_of_unit_length_and_survive_a_folder(tmp_path: Path) -> None:
    net, (x, tokens) = towers().eval(), batch()
    net.save(tmp_path)
    again = ContrastiveTowers.load(tmp_path)
    for one, other in ((net.image(x), again.image(x)), (net.text(tokens), again.text(tokens))):
        torch.testing.assert_close(one.norm(dim=1), torch.ones(4))
        assert torch.equal(one, other)


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    towers().save(tmp_path)
    with safe_open(tmp_path / "towers.safetensors", "pt") as file:
        config, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del tensors["image_projection.weight"]
    save_file(tensors, tmp_path / "towers.safetensors", config)
    with pytest.raises(BadInput, match=r"lacks the weights \['image_projection.weight'\]"):
        ContrastiveTowers.load(tmp_path)
