"""Block-wise reconstruction: learned rounding of weights (AdaRound), and learned step sizes of activations.

For a block whose predecessors have rounded weights, while its own rounding is learned:

    w_q = s (clamp(floor(w / s) + h(v) + z, low, high) - z),      h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1)
    loss = mean over batch and space of the sum over channels of (y_q - y)^2  +  lambda sum(1 - |2 h - 1|^beta)

v starts where h = w / s - floor(w / s); beta falls from 20 to 2 after a first fifth without the second term; at the end
h is 0 or 1. y is the output of the full-precision block for the full-precision input, so that later blocks also
compensate the errors of earlier ones. With a split skip connection both slices are rounded, and both have the second
term.

References:
    Nagel et al. 2020, arXiv:2004.10568; Li et al. 2021, arXiv:2102.05426; Li et al. 2023, arXiv:2302.04304.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .fake_quant import FakeQuantLayer, FakeQuantSlice, Rounding, fake_quant_layers
from .quantizer import P, as_channels
from .units import UnitInputs

__all__ = [
    "Block",
    "initial_v",
    "learn_rounding",
    "learn_steps",
    "learned_state",
    "mean_error",
    "rectified_sigmoid",
    "restore_state",
    "rounding_regularizer",
    "settled_fraction",
]

WARMUP, FIRST_BETA, LAST_BETA = 0.2, 20.0, 2.0
PULL = 300.0  # of the second term, see `learn_rounding`
LOW, HIGH = -0.1, 1.1  # the range of h without its clamp
StepCallback = Callable[[int, float], None]  # iterations done, loss


@dataclass
class Block:
    """A unit of the fake-quantised network with its inputs there, and its target outputs.

    Attributes:
        unit: the module.
        inputs: of N rows.
        targets: each (N, ...), the outputs of the full-precision unit.
        group: (N,), the group of times of each row.
    """

    unit: nn.Module
    inputs: UnitInputs
    targets: list[Tensor]
    group: Tensor

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Numbers of random rows of one group of times, which the layers are set to.

        Args:
            batch: the maximum number of rows.
            generator: of the numbers.
        """
        group = self.group[int(torch.randint(len(self.group), (1,), generator=generator))]
        index = (self.group == group).nonzero().flatten()
        rows = torch.randperm(len(index), generator=generator)[:batch]
        for layer in _layers(self.unit):
            layer.group = int(group)
        return index[rows]

    def differences(self, index: Tensor) -> list[Tensor]:
        """The unit's outputs for these rows, minus the targets."""
        index = index.to(self.targets[0].device)
        args, kwargs = self.inputs.take(index)
        outputs = [leaf for leaf in tree_flatten(self.unit(*args, **kwargs))[0] if isinstance(leaf, Tensor)]
        return [a - b[index] for a, b in zip(outputs, self.targets)]


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1): the fraction by which a weight is rounded up."""
    return (torch.sigmoid(v) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def initial_v(piece: FakeQuantSlice) -> Tensor:
    """The v at which h is the fractional part of w / s."""
    ratio = piece.target / as_channels(piece.scale, piece.target)
    fraction = ratio - torch.floor(ratio)
    return -torch.log((HIGH - LOW) / (fraction - LOW) - 1)


def rounding_regularizer(v: Tensor, beta: float) -> Tensor:
    """`sum(1 - |2 h(v) - 1|^beta)`, which is 0 where every h is 0 or 1.

    Args:
        v: of the weights.
        beta: the power, 2 or more.
    """
    return (1 - (2 * rectified_sigmoid(v) - 1).abs().pow(beta)).sum()


def settled_fraction(piece: FakeQuantSlice, within: float = 0.01) -> float:
    """The fraction of a slice's weights whose h is near 0 or 1.

    Args:
        piece: whose rounding is learned.
        within: the maximum distance.
    """
    assert piece.v is not None
    h = rectified_sigmoid(piece.v.detach())
    return float(((h < within) | (h > 1 - within)).float().mean())


def learn_rounding(
    block: Block,
    iterations: int,
    rate: float = 0.1,
    weight: float = PULL,
    batch: int = 32,
    seed: int = 0,
    on_step: StepCallback | None = None,
) -> dict[str, float]:
    """AdaRound of all layers of a block; their codes are final afterwards. Deterministic in `seed`.

    Args:
        block: whose layers are changed in place.
        iterations: of Adam.
        rate: its learning rate.
        weight: lambda, relative to the number of the block's weights and the error of nearest rounding, so that it is
            independent of the scale of the outputs (the paper's lambda is .01 in their own units).
        batch: the batch size.
        seed: of the batches.
        on_step: called after every iteration with the number of iterations done and the loss.

    Returns:
        "settled": the fraction of rounding decisions that were settled before the final rounding; "nearest" and
        "error": the mean squared error on the block's rows, of nearest and of learned rounding.
    """
    layers, generator = _layers(block.unit), torch.Generator().manual_seed(seed)
    pieces = [piece for layer in layers for piece in layer.slices]
    before, count = mean_error(block, batch), sum(piece.q.numel() for piece in pieces)
    pull = weight * before / count
    for layer in layers:
        layer.rounding = rectified_sigmoid
    for piece in pieces:
        piece.v = initial_v(piece).requires_grad_()
    optimizer = torch.optim.Adam([piece.v for piece in pieces if piece.v is not None], lr=rate)
    warmup = round(WARMUP * iterations)
    for k in range(iterations):
        index = block.draw(batch, generator)
        with torch.enable_grad():
            zero = torch.zeros((), device=pieces[0].q.device)
            loss = sum((_square(d) for d in block.differences(index)), start=zero)
            reconstruction = float(loss.detach())
            if k >= warmup:
                progress = (k - warmup) / max(iterations - 1 - warmup, 1)
                beta = FIRST_BETA + (LAST_BETA - FIRST_BETA) * progress
                loss = loss + pull * sum(rounding_regularizer(piece.v, beta) for piece in pieces if piece.v is not None)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step(k + 1, reconstruction)
    settled = sum(settled_fraction(piece) * piece.q.numel() for piece in pieces) / count
    for piece in pieces:
        assert piece.v is not None
        piece.q = piece.codes(_hard_rounding(piece.q.dtype)).detach()
        piece.v = None
    return {"nearest": before, "error": mean_error(block, batch), "settled": settled}


def learn_steps(
    block: Block,
    iterations: int,
    rate: float = 4e-3,
    batch: int = 32,
    seed: int = 0,
    on_step: StepCallback | None = None,
) -> dict[str, float]:
    """Learned step sizes of all activations of a block, for an L_p error (p = 2.4) of its output, weights fixed.

    The logarithm of a step size is learned, so that `rate` is relative; zero-points stay. Step sizes that end with a
    larger error than they started with, on the block's own rows, are restored.

    Args:
        block: whose layers are changed in place.
        iterations: of Adam.
        rate: its learning rate, with a cosine decay to 0.
        batch: the batch size.
        seed: of the batches.
        on_step: called after every iteration with the number of iterations done and the loss.

    Returns:
        "before" and "error": the mean squared error on the block's rows, before and after.
    """
    pieces = [piece for layer in _layers(block.unit) for piece in layer.slices]
    generator, before = torch.Generator().manual_seed(seed), mean_error(block, batch)
    original = []
    for piece in pieces:
        assert piece.act_scale is not None
        original.append(piece.act_scale)
        piece.log_step = piece.act_scale.log().requires_grad_()
    steps = [piece.log_step for piece in pieces if piece.log_step is not None]
    optimizer = torch.optim.Adam(steps, lr=rate)
    for k in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * k / iterations))
        index = block.draw(batch, generator)
        with torch.enable_grad():
            loss = sum((d.abs().pow(P).mean() for d in block.differences(index)), start=torch.zeros(()))
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step(k + 1, float(loss.detach()))
    for piece in pieces:
        assert piece.log_step is not None
        piece.act_scale, piece.log_step = piece.log_step.detach().exp(), None
    after = mean_error(block, batch)
    if after > before:
        for piece, scale in zip(pieces, original):
            piece.act_scale = scale
    return {"before": before, "error": min(before, after)}


@torch.no_grad()
def mean_error(block: Block, batch: int) -> float:
    """The mean over all rows of a block of the squared difference, summed over channels.

    Args:
        block: a unit with its inputs and targets.
        batch: the batch size.
    """
    total, count = 0.0, 0
    for group in sorted(set(block.group.tolist())):
        for layer in _layers(block.unit):
            layer.group = group
        for index in (block.group == group).nonzero().flatten().split(batch):
            total += len(index) * sum(float(_square(d)) for d in block.differences(index))
            count += len(index)
    return total / count


def learned_state(unit: nn.Module, name: str) -> dict[str, Tensor]:
    """What a pass has learned of a unit, as tensors to save.

    Args:
        unit: a module with fake-quantised layers, or such a layer.
        name: "q" of the weights or "act_scale".
    """
    return {
        f"{layer_name}/{k}": getattr(piece, name).clone()
        for layer_name, layer in fake_quant_layers(unit).items()
        for k, piece in enumerate(layer.slices)
    }


def restore_state(unit: nn.Module, name: str, saved: dict[str, Tensor]) -> None:
    """Restore what `learned_state` returned.

    Args:
        unit: the same module.
        name: the same name.
        saved: tensors by name.
    """
    for layer_name, layer in fake_quant_layers(unit).items():
        for k, piece in enumerate(layer.slices):
            old = getattr(piece, name)
            setattr(piece, name, saved[f"{layer_name}/{k}"].to(old.device, old.dtype))


def _square(difference: Tensor) -> Tensor:
    """Mean over batch and space of the sum over channels, which come second in maps and last in tokens."""
    channels = difference.shape[1] if difference.ndim == 4 else difference.shape[-1]
    return difference.float().square().mean() * channels


def _layers(unit: nn.Module) -> list[FakeQuantLayer]:
    """The fake-quantised layers of a unit."""
    return list(fake_quant_layers(unit).values())


def _hard_rounding(dtype: torch.dtype) -> Rounding:
    """h >= 1/2 as 0 or 1."""
    return lambda v: (v.detach() >= 0).to(dtype)
