"""The losses of autoencoders and light decoders, and the discriminator's start."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.errors import BadInput
from hasten.nets.patch_discriminator import PatchDiscriminator
from hasten.train.autoencoder import AutoencoderLoss, DecoderLoss, posterior_divergence
from hasten.train.data import Batches
from hasten.train.fit import Fit
from hasten.train.patch_gan import PatchGan
from hasten.train.trained_module import TrainedModule
from tests.factories import noise_data


class Plain(nn.Module):
    """An autoencoder with the interface of diffusers: z = s x without noise, D(z) = w z / s."""

    def __init__(self, weight: float = 1.0, logvar: float = -60.0) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.conv_out = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.decoder.conv_out.weight, weight)
        self.logvar = logvar

    def encode(self, x: Tensor) -> Any:
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=2 * x, logvar=torch.full_like(x, self.logvar)))

    def decode(self, z: Tensor) -> Any:
        return SimpleNamespace(sample=self.decoder.conv_out(z / 2))


def images(n: int = 4, side: int = 8) -> Tensor:
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_divergence_is_that_of_samples() -> None:
    mean, logvar = torch.tensor([0.7, -1.2]).double(), torch.tensor([0.4, -0.9]).double()
    noise = torch.randn(400_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = mean + (0.5 * logvar).exp() * noise
    log_q = -0.5 * (noise.square() + logvar)
    sampled = (log_q + 0.5 * z.square()).mean()
    assert abs(float(sampled - posterior_divergence(mean, logvar))) < 4e-3
    assert float(posterior_divergence(torch.zeros(3), torch.zeros(3))) == 0


def test_a_perfect_reconstruction_has_no_loss_but_the_divergence() -> None:
    x = images()
    assert AutoencoderLoss(kl=0.0, l1=0.5)(Plain(), x).item() < 1e-12
    noisy, losses = Plain(logvar=0.0), []
    for kl in (0.3, 0.0):
        torch.manual_seed(0)
        losses.append(AutoencoderLoss(kl=kl)(noisy, x))
    assert torch.isclose(losses[0] - losses[1], 0.3 * 0.5 * (2 * x).square().mean())


def test_terms_are_weighted_means() -> None:
    x = images()
    loss = AutoencoderLoss(kl=0.0, l1=0.25, perceptual=lambda a, b: (b - a).mean(), perceptual_weight=2.0)
    expected = 0.25 * x.square().mean() + 0.25 * 0.5 * x.abs().mean() - 2 * 0.5 * x.mean()
    assert torch.isclose(loss(Plain(0.5), x), expected)
    with pytest.raises(BadInput, match="l1 must be 0 or more"):
        AutoencoderLoss(l1=-1)


def test_light_decoder_is_drawn_to_images_and_teacher() -> None:
    """With w z / 2 = w x, targets v x and weights 1 and c, the best w is (1 + c v) / (1 + c)."""
    x, light = images(), Plain(0.3)
    loss = DecoderLoss(AutoencoderLoss(0.0), 3.0, lambda x: (2 * x, torch.full_like(x, -60.0), 0.5 * x))
    weight = light.decoder.conv_out.weight
    optimiser = torch.optim.SGD([weight], 0.5)
    for _ in range(60):
        optimiser.zero_grad()
        loss(light, {"x": x}).backward()
        optimiser.step()
    assert abs(float(weight) - (1 + 3 * 0.5) / 4) < 1e-4
    cached = {"x": x, "mean": 2 * x, "logvar": torch.full_like(x, -60.0), "target": 0.5 * x}
    assert torch.isclose(loss(light, cached), loss(light, {"x": x}))


def test_adaptive_weight_balances_the_gradients_at_the_last_layer() -> None:
    torch.manual_seed(0)
    net, x = Plain(0.5), images(side=16)
    gan = PatchGan(PatchDiscriminator(1, 16, width=8), weight=0.7)
    out = net.decode(2 * x).sample
    rest = (out - x).square().mean()
    last = net.decoder.conv_out.weight
    assert float(gan.decoder_term(out, rest, last)) == 0, "before the discriminator has started"
    gan.discriminator_loss({"x": x, "reconstruction": out}).backward()
    gan.discriminator.zero_grad()
    term = gan.decoder_term(out, rest, last)
    norms = [torch.autograd.grad(one, last, retain_graph=True)[0].norm() for one in (rest, term)]
    assert torch.isclose(norms[1], 0.7 * norms[0], rtol=1e-2)
    term.backward()
    assert all(p.grad is None for p in gan.discriminator.parameters()), "only the decoder is trained by this term"
    fixed = PatchGan(gan.discriminator, 0.7, adaptive=False).decoder_term(out.detach(), rest.detach(), last)
    assert torch.isclose(fixed, -0.7 * gan.discriminator(out).mean())


def test_decoder_term_falls_where_the_discriminator_believes_it() -> None:
    torch.manual_seed(0)
    gan = PatchGan(PatchDiscriminator(1, 16, width=8), weight=1.0, adaptive=False)
    real, fake = images(side=16), torch.zeros(4, 1, 16, 16)
    optimiser = torch.optim.Adam(gan.discriminator.parameters(), 3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        gan.discriminator_loss({"x": real, "reconstruction": fake}).backward()
        optimiser.step()
    last = nn.Parameter(torch.ones(1))
    on_real, on_fake = (float(gan.decoder_term(x, torch.zeros(()), last)) for x in (real, fake))
    assert on_real < -0.5 < 0.5 < on_fake


def test_a_module_is_not_updated_before_its_start(tmp_path: Path) -> None:
    steps: dict[str, list[int]] = {"early": [], "late": []}

    def trained(name: str, start: float) -> TrainedModule:
        module = nn.Linear(16, 1)

        def loss(batch: dict[str, Tensor]) -> Tensor:
            steps[name].append(len(steps["early"]))
            return module(batch["x"].flatten(1)).square().mean()

        return TrainedModule(name, module, loss, start=start)

    fit = Fit(steps=10, tensorboard=False)
    fit([trained("early", 0.0), trained("late", 0.6)], Batches(noise_data(side=4), 4), tmp_path, show=False)
    assert len(steps["early"]) == 10
    assert steps["late"] == [7, 8, 9, 10], "steps are counted after that of the first module"
    with pytest.raises(BadInput, match="fraction of the budget"):
        trained("early", 1.0)
