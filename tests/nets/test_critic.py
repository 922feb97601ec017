"""Critics: shapes, what they are told, what is trained, slopes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hasten.denoiser import Denoiser
from hasten.nets.critic import ConvCritic, Critic, FeatureHeads, PointCritic, plain_critic, zeroed
from hasten.nets.unet import UNet
from hasten.predictions import EDM, V
from hasten.schedules import VPCosine


def denoiser(prediction: object = None, **more: object) -> Denoiser:
    torch.manual_seed(0)
    net = UNet(1, widths=(8, 16), classes=3, embedding=16, **more)  # type: ignore[arg-type]
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return Denoiser(net, VPCosine(offset=0.0), prediction or V()).requires_grad_(False).eval()  # type: ignore[arg-type]


def test_features_are_one_map_a_resolution_and_the_middle() -> None:
    teacher = denoiser(patch=2)
    critic = Critic(teacher, (1, 16, 16), width=16)
    x, t, label = torch.randn(5, 1, 16, 16), torch.rand(5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    maps = critic.features(x, t, label=label)
    assert [tuple(m.shape) for m in maps] == [(5, 8, 8, 8), (5, 16, 4, 4), (5, 16, 4, 4)]
    middle, _ = teacher.features(x, t, label=label)
    torch.testing.assert_close(maps[-1], middle)  # the denoiser's own seam
    assert critic(x, t, label=label).shape == (5, 4 * 4 + 2 * 2 + 2 * 2)
    torch.testing.assert_close(critic(x, t, label=label), critic.head_logits(maps, t, label=label))


def test_features_scale_the_input_as_the_prediction_wants_it() -> None:
    teacher = denoiser(EDM())
    critic = Critic(teacher, (1, 8, 8), width=8)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(critic.features(x, t)[-1], teacher.features(x, t)[0])
    alone = torch.cat([critic.features(x[i : i + 1], float(t[i]))[0] for i in range(3)])
    torch.testing.assert_close(critic.features(x, t)[0], alone, atol=1e-5, rtol=1e-5)


def test_only_the_heads_are_trained_and_gradients_reach_the_image() -> None:
    teacher = denoiser()
    critic = Critic(teacher, (1, 8, 8), width=16)
    names = {id(p) for p in teacher.parameters()}
    assert not names & {id(p) for p in critic.heads.parameters()}
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    critic(x, 0.5).mean().backward()
    assert x.grad is not None and (x.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(p.grad is None for p in teacher.parameters())
    copy.deepcopy(critic.heads).load_state_dict(critic.heads.state_dict())


@pytest.mark.parametrize("kind", ["heads", "points", "conv"])
def test_time_and_class_change_the_verdict(kind: str) -> None:
    torch.manual_seed(1)
    critic: nn.Module
    if kind == "heads":
        critic, x = FeatureHeads([6, 4], 3, 16), [torch.randn(4, 6, 8, 8), torch.randn(4, 4, 4, 4)]
    elif kind == "points":
        critic, x = PointCritic(2, 3, 32), torch.randn(4, 2)  # type: ignore[assignment]
    else:
        critic, x = ConvCritic(1, 3, (8, 16)), torch.randn(4, 1, 8, 8)  # type: ignore[assignment]
        for layer in critic.shift:  # they begin at zero
            nn.init.normal_(layer.weight)
    t, label = torch.full((4,), 0.3, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    first = critic(x, t, label)
    assert first.shape[0] == 4 and first.ndim == 2
    assert torch.equal(critic(x, 0.3, label), first)  # one time for all
    assert torch.equal(critic(x, t, torch.full((4,), 3)), critic(x, t))  # no label is the null class
    assert (critic(x, t + 0.2, label) != first).any(1).all()
    assert (critic(x, t, label.roll(1)) != first).any(1).all()
    assert ((critic(x, 0.3, label) - critic(x, 0.3)).abs().amax(1)[:3] > 0).all()


def test_projection_is_an_inner_product_with_the_condition() -> None:
    """logit(c) - logit(c') does not depend on the network's own verdict, and is linear in P c."""
    torch.manual_seed(2)
    heads, feature = FeatureHeads([4], 2, 8).double(), [torch.randn(3, 4, 4, 4, dtype=torch.float64)]
    heads.condition.float()  # its times are float32
    a, b = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long)
    ca, cb = (heads.condition(3, 0.5, label) for label in (a, b))
    heads.project.float()
    p = heads.project[0]
    gap = heads(feature, 0.5, a) - heads(feature, 0.5, b)
    h = heads.body[0](feature[0])
    torch.testing.assert_close(
        gap, (((p(ca) - p(cb))[:, :, None, None] * h).sum(1) / 8**0.5).flatten(1), atol=1e-6, rtol=1e-5
    )
    bare = copy.deepcopy(heads)
    nn.init.zeros_(bare.project[0].weight)
    nn.init.zeros_(bare.project[0].bias)
    torch.testing.assert_close(bare(feature, 0.5, a), bare(feature, 0.5, b))


def test_points_and_images_without_a_seam() -> None:
    teacher = denoiser()
    points = Critic(teacher, (2,))
    x = torch.randn(4, 2)
    assert points.features(x, 0.5)[0] is x and points(x, 0.5).shape == (4, 1)
    bare = Denoiser(nn.Conv2d(1, 1, 3, padding=1), VPCosine(), V())
    assert Critic(bare, (1, 8, 8))(torch.randn(4, 1, 8, 8), 0.5).shape == (4, 1)
    assert isinstance(plain_critic((3, 4, 4)), ConvCritic) and isinstance(plain_critic((3,)), PointCritic)
    assert plain_critic((1, 4, 4))(torch.randn(2, 1, 4, 4), 0.0).shape == (2, 1)


def test_pairs_see_both_samples() -> None:
    critic = Critic(denoiser(), (1, 8, 8), width=16, pair=True)
    y, z = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    s, t = torch.full((3,), 0.25, dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64)
    first = critic.pair(y, s, z, t)
    assert (critic.pair(y + 1, s, z, t) != first).any(1).all() and (critic.pair(y, s, z + 1, t) != first).any(1).all()
    assert (critic.pair(y, s + 0.1, z, t) != first).any(1).all()
    assert Critic(denoiser(), (2,), pair=True).pair(y.flatten(1)[:, :2], s, z.flatten(1)[:, :2], t).shape == (3, 1)


def test_spectral_norm_bounds_the_slope() -> None:
    """Every layer has norm 1 and the rectifiers slopes of at most 1, so the critic's slope is at most 1."""
    torch.manual_seed(4)
    slopes = {}
    for spectral in (True, False):
        critic = PointCritic(2, 3, 32, spectral=spectral)
        for layer in critic.layers:
            (layer.parametrizations.weight.original if spectral else layer.weight).data.mul_(5)
        x = 3 * torch.randn(500, 2, requires_grad=True)
        for _ in range(30):
            critic(x, 0.5)  # the power iteration settles
        slopes[spectral] = torch.autograd.grad(critic(x, 0.5).sum(), x)[0].norm(dim=1).max().item()
    assert slopes[True] <= 1.001 and slopes[False] > 3


def test_a_zeroed_network_says_zero() -> None:
    teacher = denoiser()
    x = torch.randn(2, 1, 8, 8)
    assert teacher.raw(x, 0.5).abs().max() > 0
    zeroed(teacher.net)
    assert torch.equal(teacher.raw(x, 0.5), torch.zeros_like(x))
    with pytest.raises(ValueError, match="no last layer"):
        zeroed(nn.Conv2d(1, 1, 1))
