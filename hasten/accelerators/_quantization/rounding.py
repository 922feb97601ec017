"""Block-wise reconstruction: whether each weight goes up or down (AdaRound), and how long the steps of activations are.

Of a block with the rounded weights of all blocks before it, and its own being learned:

    w_q = s (clamp(floor(w / s) + h(v) + z, low, high) - z),      h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1)
    loss = mean over batch and space of the sum over channels of (y_q - y)^2  +  lambda sum(1 - |2 h - 1|^beta)

v starts where h = w / s - floor(w / s); beta falls from 20 to 2 after a first fifth without the second term; at the end
h is 0 or 1. y is what the block of the full-precision network makes of its own input, so that later blocks also make
good for the errors of earlier ones. With a split shortcut both slices are rounded, and both have the second term.

References: Nagel et al. 2020, arXiv:2004.10568; Li et al. 2021, arXiv:2102.05426; Li et al. 2023, arXiv:2302.04304.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .quantizer import P, spread
from .simulated import Piece, Simulated, simulated
from .units import Rows

WARM, FIRST_BETA, LAST_BETA = 0.2, 20.0, 2.0
PULL = 300.0  # of the second term, see `learn_rounding`
LOW, HIGH = -0.1, 1.1  # what h would reach without its clamp
Tick = Callable[[int, float], None]  # iterations done, loss


@dataclass
class Block:
    """A unit of the simulated network with what it is given there, and what it should make of it.

    group: (N,), of the time of each row.
    """

    unit: nn.Module
    inputs: Rows
    wanted: list[Tensor]
    group: Tensor

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Numbers of random rows, all of one group of times."""
        group = self.group[int(torch.randint(len(self.group), (1,), generator=generator))]
        index = (self.group == group).nonzero().flatten()
        pick = torch.randperm(len(index), generator=generator)[:batch]
        for layer in _layers(self.unit):
            layer.group = int(group)
        return index[pick]

    def differences(self, index: Tensor) -> list[Tensor]:
        """What the unit makes of these rows, less what it should."""
        index = index.to(self.wanted[0].device)
        args, kwargs = self.inputs.take(index)
        made = [leaf for leaf in tree_flatten(self.unit(*args, **kwargs))[0] if isinstance(leaf, Tensor)]
        return [a - b[index] for a, b in zip(made, self.wanted)]


def h(v: Tensor) -> Tensor:
    """How much of the way up a weight goes."""
    return (torch.sigmoid(v) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def begin(piece: Piece) -> Tensor:
    """The v at which h is the part of w / s after the point."""
    ratio = piece.target / spread(piece.scale, piece.target)
    part = ratio - torch.floor(ratio)
    return -torch.log((HIGH - LOW) / (part - LOW) - 1)


def unsettled(v: Tensor, beta: float) -> Tensor:
    """`sum(1 - |2 h(v) - 1|^beta)`: how far rounding is from decided."""
    return (1 - (2 * h(v) - 1).abs().pow(beta)).sum()


def settled(piece: Piece, within: float = 0.01) -> float:
    """The share of a piece's weights whose rounding is decided, before it is made final."""
    assert piece.v is not None
    decided = h(piece.v.detach())
    return float(((decided < within) | (decided > 1 - within)).float().mean())


def learn_rounding(
    block: Block,
    iterations: int,
    rate: float = 0.1,
    weight: float = PULL,
    batch: int = 32,
    seed: int = 0,
    tick: Tick | None = None,
) -> dict[str, float]:
    """AdaRound of all layers of a block; their codes are final afterwards. Deterministic in `seed`.

    rate: of Adam. weight: lambda, times the number of the block's weights and over the error of nearest rounding, so
    that it means the same whatever the scale of the outputs (the paper's lambda is .01 in their own units).

    Returns the share of rounding decisions that were taken before they were forced, and the mean squared error on the
    block's own rows: of nearest rounding, and after.
    """
    layers, generator = _layers(block.unit), torch.Generator().manual_seed(seed)
    pieces: list[Piece] = [piece for layer in layers for piece in layer.pieces]  # type: ignore[misc]
    before, count = mean_error(block, batch), sum(piece.q.numel() for piece in pieces)
    pull = weight * before / count
    for layer in layers:
        layer.soft = h
    for piece in pieces:
        piece.v = begin(piece).requires_grad_()
    optimiser = torch.optim.Adam([piece.v for piece in pieces if piece.v is not None], lr=rate)
    warm = round(WARM * iterations)
    for k in range(iterations):
        index = block.draw(batch, generator)
        with torch.enable_grad():
            loss = sum((_square(d) for d in block.differences(index)), start=torch.zeros((), device=pieces[0].q.device))
            told = float(loss.detach())
            if k >= warm:
                share = (k - warm) / max(iterations - 1 - warm, 1)
                beta = FIRST_BETA + (LAST_BETA - FIRST_BETA) * share
                loss = loss + pull * sum(unsettled(piece.v, beta) for piece in pieces if piece.v is not None)
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        if tick is not None:
            tick(k + 1, told)
    share = sum(settled(piece) * piece.q.numel() for piece in pieces) / count
    for piece in pieces:
        assert piece.v is not None
        up = (piece.v.detach() >= 0).to(piece.q.dtype)
        piece.q = piece.rounded(lambda v, up=up: up).detach()  # type: ignore[misc]
        piece.v = None
    return {"nearest": before, "error": mean_error(block, batch), "settled": share}


def learn_steps(
    block: Block,
    iterations: int,
    rate: float = 4e-3,
    batch: int = 32,
    seed: int = 0,
    tick: Tick | None = None,
) -> dict[str, float]:
    """The steps of all activations of a block, for an L_p error (p = 2.4) of what it makes; its weights are fixed.

    The logarithm of a step is learned, so that `rate` (of Adam, with a cosine to 0) is relative; zero-points stay.
    Steps that end worse than they began, on the block's own rows, are put back. Returns the mean squared errors.
    """
    pieces: list[Piece] = [p for layer in _layers(block.unit) for p in layer.pieces]  # type: ignore[misc]
    generator, before = torch.Generator().manual_seed(seed), mean_error(block, batch)
    kept = []
    for piece in pieces:
        assert piece.act_scale is not None
        kept.append(piece.act_scale)
        piece.log_step = piece.act_scale.log().requires_grad_()
    steps = [piece.log_step for piece in pieces if piece.log_step is not None]
    optimiser = torch.optim.Adam(steps, lr=rate)
    for k in range(iterations):
        for group in optimiser.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * k / iterations))
        index = block.draw(batch, generator)
        with torch.enable_grad():
            loss = sum((d.abs().pow(P).mean() for d in block.differences(index)), start=torch.zeros(()))
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        if tick is not None:
            tick(k + 1, float(loss.detach()))
    for piece in pieces:
        assert piece.log_step is not None
        piece.act_scale, piece.log_step = piece.log_step.detach().exp(), None
    after = mean_error(block, batch)
    if after > before:
        for piece, scale in zip(pieces, kept):
            piece.act_scale = scale
    return {"before": before, "error": min(before, after)}


@torch.no_grad()
def mean_error(block: Block, batch: int) -> float:
    """The mean over all rows of a block of the squared difference, summed over channels."""
    total, count = 0.0, 0
    for group in sorted(set(block.group.tolist())):
        for layer in _layers(block.unit):
            layer.group = group
        for index in (block.group == group).nonzero().flatten().split(batch):
            total += len(index) * sum(float(_square(d)) for d in block.differences(index))
            count += len(index)
    return total / count


def _square(difference: Tensor) -> Tensor:
    """Mean over batch and space of the sum over channels, which come second in maps and last in tokens."""
    channels = difference.shape[1] if difference.ndim == 4 else difference.shape[-1]
    return difference.float().square().mean() * channels


def _layers(unit: nn.Module) -> list[Simulated]:
    return [unit] if isinstance(unit, Simulated) else list(simulated(unit).values())


def state(unit: nn.Module, what: str) -> dict[str, Any]:
    """What a pass has learned of a unit, as tensors to keep: "q" of the weights or "act_scale"."""
    layers = {"": unit} if isinstance(unit, Simulated) else simulated(unit)
    return {
        f"{name}/{k}": getattr(piece, what).clone()
        for name, layer in layers.items() for k, piece in enumerate(layer.pieces)  # type: ignore[union-attr]
    }  # fmt: skip


def restore(unit: nn.Module, what: str, kept: dict[str, Any]) -> None:
    """Put back what `state` gave."""
    layers = {"": unit} if isinstance(unit, Simulated) else simulated(unit)
    for name, layer in layers.items():
        for k, piece in enumerate(layer.pieces):  # type: ignore[arg-type,union-attr]
            old = getattr(piece, what)
            setattr(piece, what, kept[f"{name}/{k}"].to(old.device, old.dtype))
