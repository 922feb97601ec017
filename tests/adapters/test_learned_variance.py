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


def test_a_pipeline_with_learned_variances_samples_with_them_and_has_a_likelihood(tmp_path) -> None:
    diffusers = pytest.importorskip("diffusers")
    import hasten
    from hasten.train.data import Data
    from tests.adapters.tiny import unet2d

    net = unet2d(in_channels=1, out_channels=2)
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(variance_type="learned_range")).save_pretrained(tmp_path)
    model = hasten.load(tmp_path)
    learned, small = (model.sample(1, sampler=f"ddpm:variance={kind}", steps=3) for kind in ("learned", "small"))
    assert not torch.equal(learned, small)
    data = Data.of(torch.randint(0, 256, (2, *model.shape), dtype=torch.uint8))
    for method in ("bound:samples=1", "ancestral_bound:steps=3,variance=learned", "ode:rtol=0.5,atol=0.5"):
        assert hasten.evaluate_likelihood(model, data, method=method)["bits_per_dim"] > 0
