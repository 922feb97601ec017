"""A quantisation step by step: nearest and learned rounding, activation ranges, learned step sizes, integers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BadInput, nearest
from ...nets.quantized import replace_layers
from ...utils.finite import check_weights
from .bias import correct_biases
from .calibration import Samples, fit_activations
from .fake_quant import FakeQuantLayer, fake_quant_layers, frozen_copy, is_quantizable, replace_module
from .mixed_precision import most_sensitive
from .rounding import Block, learn_rounding, learn_steps, learned_state, restore_state
from .units import NetworkTrace, UnitInputs, detach_tree, record_unit, tensor_bytes, trace_layers

__all__ = [
    "ROUNDING",
    "STEPS",
    "LearnedParams",
    "QuantizationSession",
    "SessionProgress",
    "layers_to_quantize",
    "relative_error",
]

MEMORY = 2**31  # bytes of a block's inputs and outputs in memory while it is reconstructed
SENSITIVITY_CALLS = 64  # model evaluations by which the sensitivity of a layer is measured
ROUNDING, STEPS = "rounding", "steps"  # the two passes over the blocks
LearnedParams = tuple[dict[str, Tensor], dict[str, float]]  # what a pass has learned of a unit, and its figures


@dataclass
class SessionProgress:
    """The progress of a quantisation, for subclasses that save it, so that it can resume; this one saves nothing.

    Attributes:
        iterations: for every block, by pass.
    """

    iterations: dict[str, int] = field(default_factory=lambda: {ROUNDING: 300, STEPS: 300})

    def load(self, stage: str, unit: str) -> LearnedParams | None:
        """What an earlier run has learned of a block in a pass; None: nothing."""
        return None

    def save(self, stage: str, unit: str, learned: LearnedParams) -> None:
        """Called with what was learned of a block in a pass."""

    def on_iteration(self, stage: str, unit: str, done: int, of: int, loss: float) -> None:
        """Called after every iteration of a block."""

    def on_block(self, stage: str, done: int, of: int, unit: str, figures: dict[str, float]) -> None:
        """Called after every block, also after one that was loaded."""


@dataclass
class QuantizationSession:
    """A network while it is quantised.

    Attributes:
        denoiser: of the network; it is not changed.
        samples: for calibration.
        weights: bits of the weights, 8 or 4.
        acts: bits of the activations, 8 or None.
        ranges: "search" or "minmax".
        split: give layers that read a skip connection two ranges.
        rank: of the low-rank branch.
        groups: of times.
        exclude: patterns of modules that stay in floating point.
        int8_fraction: the fraction of the weights that get 8 bits where `weights` is 4.
        batch: the batch size.
        rate: the learning rate of AdaRound.
        seed: of everything random.
        float: the denoiser in floating point.
        rounded: the denoiser with fake-quantised layers.
        int8_layers: names of the layers that get 8 bits where `weights` is 4.
        units: names of the blocks, in the order of the run.
    """

    denoiser: Any
    samples: Samples
    weights: int = 8
    acts: int | None = 8
    ranges: str = "search"
    split: bool = True
    rank: int = 0
    groups: int = 1
    exclude: tuple[str, ...] = ()
    int8_fraction: float = 0.0
    batch: int = 32
    rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_weights(self.denoiser.net, "quantize")
        self.float = self.denoiser.replace(net=frozen_copy(self.denoiser.net))
        self.trace: NetworkTrace = trace_layers(self.float, self.float.net, self.samples.rows(torch.arange(1)))
        names = layers_to_quantize(self.denoiser.net, self.trace.layers, self.exclude)
        mixed = self.int8_fraction and self.weights < 8
        self.int8_layers: list[str] = self._sensitive_layers(names) if mixed else []
        self.rounded = self._rounded({name: 8 if name in self.int8_layers else self.weights for name in names})
        self.units = [unit for unit, layers in self.trace.units if set(layers) & set(names)]

    def _rounded(self, bits: dict[str, int]) -> Any:
        """The denoiser with these layers fake-quantised, rounded to the nearest, each to its number of bits."""
        net = frozen_copy(self.denoiser.net)
        for name, count in bits.items():
            edges = [0, self.trace.splits[name]] if self.split and name in self.trace.splits else [0]
            layer: Any = net.get_submodule(name)
            replace_module(net, name, FakeQuantLayer(layer, edges, count, self.ranges, self.rank))
        return self.denoiser.replace(net=net)

    def _sensitive_layers(self, names: Sequence[str]) -> list[str]:
        """The layers that get 8 bits, `int8_fraction` of the weights of all these."""
        sizes = {name: self.denoiser.net.get_submodule(name).weight.numel() for name in names}

        def error(name: str) -> float:
            rounded = self._rounded({name: self.weights})
            return relative_error(self.denoiser, rounded, self.samples, self.batch, SENSITIVITY_CALLS)

        return most_sensitive(sizes, self.int8_fraction * sum(sizes.values()), error)

    @property
    def net(self) -> nn.Module:
        """The network with fake-quantised layers."""
        return self.rounded.net

    def fit_ranges(self) -> None:
        """Fit the ranges of the activations."""
        if self.acts is not None:
            fit_activations(self.rounded, self.net, self.samples, self.groups, self.ranges, self.batch, self.seed)

    def learn_rounding(self, progress: SessionProgress) -> None:
        """Learn the rounding of the weights, block after block."""
        self._pass(ROUNDING, "q", partial(learn_rounding, rate=self.rate), progress)

    def learn_steps(self, progress: SessionProgress) -> None:
        """Learn the step sizes of the activations, block after block."""
        if self.acts is not None:
            self._pass(STEPS, "act_scale", learn_steps, progress)

    def block(self, name: str, limit: int | None = None) -> Block:
        """A unit with its inputs in the rounded network and its outputs in the full-precision one.

        Args:
            name: of the unit.
            limit: the maximum number of samples; None: all, or as many as fit into `MEMORY`.
        """
        unit, exact = self.net.get_submodule(name), self.float.net.get_submodule(name)
        layers = fake_quant_layers(self.net).values()
        calls: list[Any] = []
        targets: list[list[Tensor]] = []
        group: list[int] = []
        for g, batch in self.samples.batches(self.batch, limit):
            for layer in layers:
                layer.group = g
            call, _ = record_unit(self.rounded, unit, batch)
            _, output = record_unit(self.float, exact, batch)
            calls.append(detach_tree(call))
            targets.append(output)
            rows = len(output[0])
            group += [g] * rows
            if limit is None:
                row_bytes = (tensor_bytes(call) + tensor_bytes(output)) // max(rows, 1)
                room = MEMORY // max(row_bytes, 1)
                if room < len(self.samples):  # start again with fewer, evenly over the groups
                    return self.block(name, int(room))
        return Block(unit, UnitInputs(calls), [torch.cat(column) for column in zip(*targets)], torch.tensor(group))

    def seconds(self, stage: str) -> dict[str, float]:
        """Seconds of one iteration of a pass for every block, measured on a few iterations that are undone.

        Args:
            stage: `ROUNDING` or `STEPS`.
        """
        name = {ROUNDING: "q", STEPS: "act_scale"}[stage]
        seconds = {}
        for unit in self.units:
            block = self.block(unit, self.batch)
            saved = learned_state(block.unit, name)
            times: list[float] = []

            def on_step(done: int, loss: float, times: list[float] = times) -> None:
                times.append(time.perf_counter())

            learn: Callable[..., dict[str, float]] = learn_rounding if stage == ROUNDING else learn_steps
            learn(block, 3, batch=self.batch, on_step=on_step)
            restore_state(block.unit, name, saved)
            seconds[unit] = min(b - a for a, b in zip(times, times[1:]))
        return seconds

    def _pass(self, stage: str, name: str, learn: Callable[..., dict[str, float]], progress: SessionProgress) -> None:
        """Learn the tensors `name` of every block, or load them."""
        count = progress.iterations[stage]
        for k, unit in enumerate(self.units):
            learned = progress.load(stage, unit)
            if learned is None:

                def on_step(done: int, loss: float, unit: str = unit) -> None:
                    progress.on_iteration(stage, unit, done, count, loss)

                block = self.block(unit)
                figures = learn(block, count, batch=self.batch, seed=self.seed * 1009 + k, on_step=on_step)
                learned = learned_state(block.unit, name), figures
                progress.save(stage, unit, learned)
            else:
                restore_state(self.net.get_submodule(unit), name, learned[0])
            progress.on_block(stage, k + 1, len(self.units), unit, learned[1])

    def correct_biases(self) -> None:
        """Shift the biases by the mean error of rounding."""
        correct_biases(self.rounded, self.net, self.samples, self.batch)

    def to_integer(self) -> nn.Module:
        """The network with layers that compute with integers; all other modules are shared with the original."""
        layers = {name: layer.to_integer() for name, layer in fake_quant_layers(self.net).items()}
        return replace_layers(self.denoiser.net, layers).eval()


def layers_to_quantize(net: nn.Module, layers: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """The layers to quantise: all that ran except those whose names match a pattern.

    Args:
        net: the network.
        layers: names of the layers that ran.
        exclude: patterns of modules that stay in floating point.

    Raises:
        BadInput: for a pattern that matches no module of the network, and where no layer is left.
    """
    modules = [name for name, _ in net.named_modules() if name]
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise BadInput(
                f"quantize: the pattern {pattern!r} names nothing in {type(net).__name__}: {nearest(pattern, modules)}"
            )

    def excluded(name: str) -> bool:
        return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in exclude)

    names = [
        name
        for name in layers
        if not excluded(name) and is_quantizable(net.get_submodule(name)) and _is_replaceable(net, name)
    ]
    if not names:
        raise BadInput(
            f"quantize: {type(net).__name__} has no Conv2d or Linear to quantize (layers whose forward has hooks, as "
            "with offloading, and the factors of a LoRA are not quantized)"
        )
    return names


def _is_replaceable(net: nn.Module, name: str) -> bool:
    """Whether a layer may be replaced: not the low-rank factors of a LoRA, which stay as they are next to its
    `base_layer`, nor layers inside a module whose `forward` was replaced (hooks that offload it)."""
    inside = net
    for part in name.split("."):
        if isinstance(getattr(inside, "base_layer", None), nn.Module) and part != "base_layer":
            return False
        inside = inside.get_submodule(part)
        if "forward" in vars(inside):
            return False
    return True


@torch.no_grad()
def relative_error(denoiser: Any, other: Any, samples: Samples, size: int = 32, limit: int | None = None) -> float:
    """`sqrt(sum |o - d|^2 / sum |d|^2)` of the clean samples x0 of two denoisers.

    Args:
        denoiser: d, the reference.
        other: o.
        samples: the model evaluations to compare.
        size: the batch size.
        limit: the maximum number of model evaluations; None: all.
    """
    above = below = 0.0
    for _, (x, t, cond) in samples.batches(size, limit):
        a, b = denoiser(x, t, **cond), other(x, t, **cond)
        a, b = a.cpu().double(), b.cpu().double()  # copied, then widened: not every device has float64
        above += float((b - a).square().sum())
        below += float(a.square().sum())
    return (above / below) ** 0.5
