"""The guidance scale as an input of U-Nets with split points, as of latent consistency models."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ...predictions import precise
from .split_network import SplitNetwork, guidance_features

__all__ = ["TakesGuidance"]

GUIDANCE_WIDTH = 256  # of the embedding of an added guidance scale


class TakesGuidance(SplitNetwork):
    """A split network whose `time_embedding` has layers `linear_1` and, where the scale is an input, `cond_proj`."""

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """The range of a guidance scale that is an input (of a latent consistency model), else None; 1: no guidance."""
        return None if self.config.time_cond_proj_dim is None else (1.0, 15.0)

    def with_guidance(self) -> TakesGuidance:
        """A copy with the guidance scale as an input, `time_cond_proj_dim` of diffusers, whose effect is zero at first.

        References:
            Luo et al. 2023, arXiv:2310.04378, for the embedding.
        """
        if self.guidance_range is not None:
            return copy.deepcopy(self)
        config = {key: value for key, value in self.config.items() if not key.startswith("_")}
        kind: Any = type(self.net)
        with torch.random.fork_rng(devices=[]):
            net = kind.from_config({**config, "time_cond_proj_dim": GUIDANCE_WIDTH})
        net.load_state_dict(self.net.state_dict(), strict=False)
        nn.init.zeros_(net.time_embedding.cond_proj.weight)
        first = next(self.net.parameters())
        nn.Module.to(net, first.device, first.dtype)  # without the warning of diffusers' own
        return type(self)(net.train(self.training), self.with_variance)

    def fixed(self, scale: float) -> TakesGuidance:
        """A copy for one guidance scale, whose embedding is part of a bias, and which ignores that input.

        The time embedding is W (features + P g) + b, with g the features of the scale: b + W P g takes the place of b,
        and 0 that of P, since pipelines of latent consistency models pass a scale in any case.
        """
        new = copy.deepcopy(self)
        embedding = new._parts.time_embedding
        first, projection = embedding.linear_1, embedding.cond_proj
        features = guidance_features(torch.tensor([scale], device=first.weight.device), projection.in_features)
        with torch.no_grad():
            shift = precise(first.weight) @ (precise(projection.weight) @ precise(features[0]))
            first.bias.add_(shift.to(first.bias.dtype))
            projection.weight.zero_()
        return new
