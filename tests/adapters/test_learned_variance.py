"""Networks of diffusers that predict a variance."""

from __future__ import annotations

import pytest
import torch


def test_a_network_of_diffusers_with_learned_variances():
    diffusers = pytest.importorskip("diffusers")
    from hasten.adapters.diffusers.wrap import split_network

    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=2, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=4,
    )  # fmt: skip
    ours = split_network(net).eval()
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 500.0])
    raw, o = ours.with_learned_variance(x, time)
    whole = net(x, time).sample
    assert torch.allclose(raw, whole[:, :1]) and torch.allclose(o, whole[:, 1:])
    assert torch.allclose(ours(x, time), raw) and not ours.with_variance
