"""Dual diffusion implicit bridges: one model's ODE to noise and another's back (Su et al. 2022, arXiv:2203.08382)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.model import Model
from hasten.schedules import VPCosine
from hasten.tasks.style_transfer import restyle


class NormalNet(nn.Module):
    """The exact noise prediction for data N(mean, variance) on a schedule; its time input is t."""

    def __init__(self, mean: float, variance: float) -> None:
        super().__init__()
        self.mean, self.variance, self.schedule = mean, variance, VPCosine()

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (
            value.float()[:, None, None, None] for value in (self.schedule.alpha(t), self.schedule.sigma(t))
        )
        return sigma * (z - alpha * self.mean) / (alpha**2 * self.variance + sigma**2)


def model(mean: float, variance: float) -> Model:
    return Model(Denoiser(NormalNet(mean, variance), VPCosine(), "eps"), "normal", (1, 2, 3))


def test_one_model_for_both_returns_the_image() -> None:
    """The error falls as the steps shrink: the ODE is run there and back."""
    one, x = model(0.1, 0.04), 0.1 + 0.2 * torch.randn(3, 1, 2, 3)
    errors = [float((restyle(one, one, x, encode_steps=n, decode_steps=n).images - x).abs().max()) for n in (20, 80)]
    assert errors[1] < errors[0] / 2 and errors[1] < 0.02, errors


def test_two_normal_models_are_the_optimal_map() -> None:
    a, b, x = model(0.1, 0.04), model(-0.3, 0.01), 0.1 + 0.2 * torch.randn(3, 1, 2, 3)
    moved = restyle(a, b, x, encode_steps=100, decode_steps=100).images
    assert (moved - (-0.3 + (x - 0.1) / 2)).abs().max() < 0.02
    assert float(moved.std() / x.std()) == pytest.approx(0.5, abs=0.02)
