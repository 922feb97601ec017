"""Small networks with random weights for the tests of feature reuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hasten.accelerators import Recorder, SamplingContext
from hasten.denoiser import Denoiser
from hasten.guides.cfg import CFG
from hasten.nets.unet import UNet
from hasten.plan import Plan, plan
from hasten.plan.draw import draw
from hasten.predictions import Prediction
from hasten.sampling import Noise
from hasten.schedules import Schedule, VPCosine
from hasten.times import UniformTime

SHAPE = (2, 8, 8)
LABEL = torch.tensor([0, 2, 1])


def random_(net: nn.Module, scale: float = 0.15, seed: int = 0) -> Any:
    """Every weight drawn anew, so that no layer that starts at zero hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return net.eval().requires_grad_(False)


def unet(**changes: Any) -> UNet:
    return random_(UNet(**{"channels": 2, "widths": (8, 16), "classes": 3, "time_scale": 20.0, **changes}))


class Transformer(nn.Module):
    """Four blocks on tokens, with an embedding that is a tuple, one entry of which is not there."""

    null_label = 3

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(2, 8), nn.Linear(8, 2)
        self.label = nn.Embedding(4, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.ran = [0] * 4

    def embed(self, x: Tensor, time: Tensor, label: Tensor) -> tuple[Tensor, Any]:
        return self.into(x.flatten(2).transpose(1, 2)), (time[:, None], {"label": self.label(label)}, None)

    def run(self, first: int, last: int, tokens: Tensor, emb: Any) -> Tensor:
        for k in range(first, last):
            self.ran[k] += 1
            info = emb[0].cos() + emb[1]["label"]
            tokens = tokens + torch.tanh(self.blocks[k](tokens) + info[:, None])
        return tokens

    def finish(self, tokens: Tensor, emb: Any) -> Tensor:
        return self.out(tokens * emb[0][:, None]).transpose(1, 2).unflatten(2, SHAPE[1:])

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        tokens, emb = self.embed(x, time, label)
        return self.finish(self.run(0, len(self.blocks), tokens, emb), emb)


def denoiser_of(net: nn.Module, prediction: Prediction | str = "v") -> Denoiser:
    return Denoiser(net, VPCosine(), prediction).eval()


def compiled(sampler: Any, steps: int, schedule: Schedule | None = None) -> Plan:
    schedule = VPCosine() if schedule is None else schedule
    return plan(sampler, schedule, UniformTime(start=0.98)(schedule, steps))


def context_of(plan: Plan, denoiser: Denoiser | None = None, scale: float = 1.0) -> SamplingContext:
    """The context that a model would give for a sampling by this plan."""

    def calls(n: int, seed: int) -> Any:
        recorder = Recorder(denoiser)  # type: ignore[arg-type]
        sampled(recorder, plan, scale, torch.arange(n) % 3, seed)
        return recorder.calls

    return SamplingContext(tuple(plan.times[:-1].tolist()), None if denoiser is None else calls)


def sampled(
    denoiser: nn.Module, plan: Plan, scale: float = 3.0, label: Tensor = LABEL, seed: int = 0, **cond: Any
) -> Tensor:
    """Samples under guidance; one of each label."""
    guided = CFG(scale=scale).wrap(denoiser)
    noise = Noise(range(seed, seed + len(label)), SHAPE)
    return draw(guided, None, plan.times, noise, plan=plan, label=label, **cond)


def relative(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())
