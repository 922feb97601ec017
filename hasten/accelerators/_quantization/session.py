"""The order of a quantisation: weights, their rounding block by block, ranges of activations, their steps, integers."""

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
from .mixed_precision import most_sensitive
from .rounding import Block, learn_rounding, learn_steps, restore, state
from .simulated import Simulated, replace_module, shadow, simulated, takes
from .units import Rows, Traced, detached, given, size, trace

MEMORY = 2**31  # bytes of a block's inputs and outputs that are kept while it is reconstructed
LOOK = 64  # calls by which a layer is judged before anything is learned
ROUNDING, STEPS = "rounding", "steps"  # the two passes over the blocks
Learned = tuple[dict[str, Tensor], dict[str, float]]  # what a pass has learned of a unit, and its figures


@dataclass
class SessionProgress:
    """What is known of a quantisation that may be stopped and gone on with; this one keeps nothing.

    iterations: of every block, by pass.
    """

    iterations: dict[str, int] = field(default_factory=lambda: {ROUNDING: 300, STEPS: 300})

    def known(self, stage: str, unit: str) -> Learned | None:
        """What an earlier run learned."""
        return None

    def keep(self, stage: str, unit: str, learned: Learned) -> None:
        """Keep what was learned of a block."""

    def inside(self, stage: str, unit: str, done: int, of: int, loss: float) -> None:
        """Iterations done in a block."""

    def tick(self, stage: str, done: int, of: int, unit: str, figures: dict[str, float]) -> None:
        """A block is done."""


@dataclass
class QuantizationSession:
    """A network on its way to integers.

    denoiser: whose network it is; it stays as it is. samples: what it is asked. The rest are the options of `Quantize`.
    """

    denoiser: Any
    samples: Samples
    weights: int = 8
    acts: int | None = 8
    ranges: str = "search"
    split: bool = True
    rank: int = 0
    groups: int = 1
    keep: tuple[str, ...] = ()
    eight: float = 0.0
    batch: int = 32
    rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_weights(self.denoiser.net, "quantize")
        self.float = self.denoiser.replace(net=shadow(self.denoiser.net))
        self.traced: Traced = trace(self.float, self.float.net, self.samples.rows(torch.arange(1)))
        chosen = kept_out(self.denoiser.net, self.traced.layers, self.keep)
        self.wide: list[str] = self._wide(chosen) if self.eight and self.weights < 8 else []
        self.half = self._rounded({name: 8 if name in self.wide else self.weights for name in chosen})
        self.units = [unit for unit, names in self.traced.units if set(names) & set(chosen)]

    def _rounded(self, bits: dict[str, int]) -> Any:
        """The denoiser with these layers rounded to the nearest, each to its count of bits."""
        net = shadow(self.denoiser.net)
        for name, count in bits.items():
            edges = [0, self.traced.splits[name]] if self.split and name in self.traced.splits else [0]
            layer: Any = net.get_submodule(name)
            replace_module(net, name, Simulated(layer, edges, count, self.ranges, self.rank))
        return self.denoiser.replace(net=net)

    def _wide(self, names: Sequence[str]) -> list[str]:
        """The layers that get 8 bits, a share `eight` of the weights of all that are exchanged."""
        sizes = {name: self.denoiser.net.get_submodule(name).weight.numel() for name in names}

        def error(name: str) -> float:
            return relative_error(self.denoiser, self._rounded({name: self.weights}), self.samples, self.batch, LOOK)

        return most_sensitive(sizes, self.eight * sum(sizes.values()), error)

    @property
    def net(self) -> nn.Module:
        """The network of simulated layers."""
        return self.half.net

    def fit(self) -> None:
        """Find the ranges of the activations."""
        if self.acts is not None:
            fit_activations(self.half, self.net, self.samples, self.groups, self.ranges, self.batch, self.seed)

    def round(self, book: SessionProgress) -> None:
        """Learn the rounding of the weights, block after block."""
        self._pass(ROUNDING, "q", partial(learn_rounding, rate=self.rate), book)

    def learn(self, book: SessionProgress) -> None:
        """Learn the steps of the activations, block after block."""
        if self.acts is not None:
            self._pass(STEPS, "act_scale", learn_steps, book)

    def block(self, name: str, limit: int | None = None) -> Block:
        """A unit with its inputs in the simulated network and its outputs in the other, of all the samples, or of so
        many as memory holds."""
        unit, target = self.net.get_submodule(name), self.float.net.get_submodule(name)
        layers = simulated(self.net).values()
        calls: list[Any] = []
        wanted: list[list[Tensor]] = []
        group: list[int] = []
        for g, batch in self.samples.batches(self.batch, limit):
            for layer in layers:
                layer.group = g
            call, _ = given(self.half, unit, batch)
            _, made = given(self.float, target, batch)
            calls.append(detached(call))
            wanted.append(made)
            rows = len(made[0])
            group += [g] * rows
            if limit is None:
                each = (size(call) + size(made)) // max(rows, 1)
                room = MEMORY // max(each, 1)
                if room < len(self.samples):  # begin again with fewer, evenly over the groups
                    return self.block(name, int(room))
        return Block(unit, Rows(calls), [torch.cat(column) for column in zip(*wanted)], torch.tensor(group))

    def seconds(self, stage: str) -> dict[str, float]:
        """Seconds of one iteration of a pass for every block, tried for a moment."""
        learn, what = {ROUNDING: (learn_rounding, "q"), STEPS: (learn_steps, "act_scale")}[stage]
        found = {}
        for name in self.units:
            block = self.block(name, self.batch)
            kept = state(block.unit, what)
            times: list[float] = []
            learn(block, 3, batch=self.batch, tick=lambda done, loss, times=times: times.append(time.perf_counter()))  # type: ignore[operator,misc]
            restore(block.unit, what, kept)
            found[name] = min(b - a for a, b in zip(times, times[1:]))
        return found

    def _pass(self, stage: str, what: str, learn: Callable[..., dict[str, float]], book: SessionProgress) -> None:
        count = book.iterations[stage]
        for k, name in enumerate(self.units):
            found = book.known(stage, name)
            if found is None:
                inside = partial(book.inside, stage, name)
                tick = lambda done, loss, inside=inside: inside(done, count, loss)  # noqa: E731
                block = self.block(name)
                figures = learn(block, count, batch=self.batch, seed=self.seed * 1009 + k, tick=tick)
                found = state(block.unit, what), figures
                book.keep(stage, name, found)
            else:
                restore(self.net.get_submodule(name), what, found[0])
            book.tick(stage, k + 1, len(self.units), name, found[1])

    def correct(self) -> None:
        """Shift the biases by what rounding adds on average."""
        correct_biases(self.half, self.net, self.samples, self.batch)

    def made(self) -> nn.Module:
        """The network with layers that compute with integers; what was not exchanged is shared with the original."""
        return replace_layers(
            self.denoiser.net, {name: layer.made() for name, layer in simulated(self.net).items()}
        ).eval()


def kept_out(net: nn.Module, layers: Sequence[str], keep: Sequence[str]) -> list[str]:
    """The layers that are to be exchanged: all that ran but those whose names match a pattern of `keep`.

    Raises BadInput for a pattern that names no module of the network, and where nothing is left.
    """
    modules = [name for name, _ in net.named_modules() if name]
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise BadInput(
                f"quantize: keep={pattern} names nothing in {type(net).__name__}: {nearest(pattern, modules)}"
            )
    chosen = [
        name for name in layers
        if not any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in keep) and takes(net.get_submodule(name))
        and _free(net, name)
    ]  # fmt: skip
    if not chosen:
        raise BadInput(
            f"quantize: {type(net).__name__} has no Conv2d or Linear to exchange (those with hooks on their forward, "
            "as offloading has, and the factors of a LoRA are left alone)"
        )
    return chosen


def _free(net: nn.Module, name: str) -> bool:
    """Whether a layer may be exchanged by what is around it: not the low-rank factors of a LoRA, which stay as they are
    beside its `base_layer`, nor what is inside a module whose `forward` was replaced (hooks that offload it)."""
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
    """`sqrt(sum |o - d|^2 / sum |d|^2)` of the clean samples that two denoisers find, over all calls or `limit`."""
    above = below = 0.0
    for _, (x, t, cond) in samples.batches(size, limit):
        a, b = denoiser(x, t, **cond), other(x, t, **cond)
        a, b = a.cpu().double(), b.cpu().double()  # copied, then widened: not every device has float64
        above += float((b - a).square().sum())
        below += float(a.square().sum())
    return (above / below) ** 0.5
