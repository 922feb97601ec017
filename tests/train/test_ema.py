"""Exponential moving averages of the weights against their closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.errors import BadInput
from hasten.train.ema import Ema, update_ema


def test_power_ema_is_the_power_weighted_mean() -> None:
    """beta_i = (1 - 1/i)^(g+1) gives weights i the fraction ((i/n)^(g+1) - ((i-1)/n)^(g+1)) of the mean at n."""
    values, gamma = torch.randn(30, dtype=torch.float64), 3.0
    module, ema = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
    module.register_buffer("count", torch.zeros(()))
    ema.register_buffer("count", torch.zeros(()))
    for i, value in enumerate(values, 1):
        nn.init.constant_(module.weight, float(value))
        module.count.fill_(i)  # type: ignore[operator]
        update_ema(ema, module, Ema("power", gamma=gamma).beta(i))
    edges = (torch.arange(31, dtype=torch.float64) / 30) ** (gamma + 1)
    assert float(ema.weight.detach()) == pytest.approx(float((edges.diff() * values).sum()), abs=1e-12)
    assert int(ema.count) == 30  # type: ignore[arg-type]


def test_constant_ema() -> None:
    ema = Ema("constant", decay=0.9)
    assert ema.beta(1) == pytest.approx(0.1) and ema.beta(11) == pytest.approx(0.55)
    assert ema.beta(81) == pytest.approx(0.9) and ema.beta(10**6) == 0.9


def test_bad_settings() -> None:
    with pytest.raises(BadInput, match="unknown EMA kind 'cosine'"):
        Ema("cosine")
    for options in ({"gamma": -1.0}, {"decay": 1.0}):
        with pytest.raises(BadInput, match="EMA needs gamma"):
            Ema(**options)  # type: ignore[arg-type]
