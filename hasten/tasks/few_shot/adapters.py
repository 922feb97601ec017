"""Low-rank adapters of many classes on one network, all evaluated in one batch.

The factors of all classes are stacked, (K, r, in) and (K, out, r), and the network is mapped over the first dimension
by `torch.vmap`: linear layers become one `bmm`, convolutions one grouped convolution, and whatever does not depend on
the class (the encoder, if adapters sit in the decoder only) runs once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...accelerators._caching.split import split_point_of
from ...denoiser import Denoiser
from ...errors import BadInput, check_choice, check_int
from ...nets.lora import LowRank, innermost, lora_layers, target_layers
from ...utils.random import make_generator

__all__ = ["ClassAdapters", "adapted", "layers_of", "memory_left"]

PLACEMENTS = ("all", "decoder", "last")
Factors = dict[str, tuple[Tensor, Tensor]]


@dataclass
class ClassAdapters:
    """The factors of K classes.

    Args:
        factors: by name of the layer: A (K, r, in, ...) and B (K, out, r, ...).
        alpha: the numerator of the scale alpha / r, of all.
    """

    factors: Factors
    alpha: float

    @classmethod
    def start(cls, net: nn.Module, layers: Sequence[str], classes: int, rank: int, seed: int = 0) -> ClassAdapters:
        """Adapters that change nothing: the same random A for every class, B = 0, a scale of 1.

        Args:
            net: the network.
            layers: names of its layers.
            classes: K.
            rank: r.
            seed: of A.

        Raises:
            BadInput: for a rank below 1, and more factors than the memory holds.
        """
        check_int("the rank of a LoRA", rank, 1)
        modules, factors = dict(innermost(net).named_modules()), Factors()
        weights = {name: modules[name].get_parameter("weight") for name in layers}
        each = 4 * rank * sum(w.shape[0] + math.prod(w.shape[1:]) for w in weights.values())
        device = next(iter(weights.values())).device
        needed, free = 4 * classes * each, memory_left(device)  # factors, their gradients and two moments of Adam
        if free is not None and needed > 0.8 * free:
            raise BadInput(
                f"the adapters of {classes} classes need {needed / 2**30:.3g} GiB to train, {free / 2**30:.3g} GiB are "
                f"free: at most {int(0.8 * free / (4 * each))} classes of rank {rank}, or a lower rank or fewer layers "
                "(placement='last')"
            )
        generator = make_generator(seed)
        for name, weight in weights.items():
            down = torch.empty(rank, *weight.shape[1:])
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            up = torch.zeros(classes, weight.shape[0], rank, *[1] * (weight.ndim - 2))
            factors[name] = down.expand(classes, *down.shape).to(device).contiguous(), up.to(device)
        return cls(factors, float(rank))

    @property
    def rank(self) -> int:
        """r."""
        return int(next(iter(self.factors.values()))[0].shape[1])

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def __len__(self) -> int:
        """K."""
        return len(next(iter(self.factors.values()))[0])

    def select(self, classes: Tensor) -> Factors:
        """The factors of some classes, by index."""
        return {name: (down[classes], up[classes]) for name, (down, up) in self.factors.items()}

    def low_rank(self, k: int) -> dict[str, LowRank]:
        """The factors of one class by name of the layer, as LoRA files hold them."""
        return {name: LowRank(down[k], up[k], self.alpha) for name, (down, up) in self.factors.items()}

    def to(self, device: torch.device | str) -> ClassAdapters:
        """The adapters on a device."""
        moved = {name: (down.to(device), up.to(device)) for name, (down, up) in self.factors.items()}
        return ClassAdapters(moved, self.alpha)


@dataclass
class Active:
    """What the adapted layers of a network add at present.

    Args:
        factors: by name of the layer, of one class, or of `groups` classes; none: nothing is added.
        scale: of all.
        groups: number of classes that the batch holds, one after the other; None: `factors` are those of one class.
    """

    factors: Factors = field(default_factory=dict)
    scale: float = 1.0
    groups: int | None = None

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Within the block nothing is added."""
        before, self.factors = self.factors, {}
        try:
            yield
        finally:
            self.factors = before


@contextmanager
def adapted(net: nn.Module, layers: Sequence[str]) -> Iterator[Active]:
    """Within the block layers of a network add what `Active` says; the network is otherwise unchanged.

    Args:
        net: the network; wrappers of hasten are looked into.
        layers: names.
    """
    inner, active = innermost(net), Active()
    modules = dict(inner.named_modules())
    hooks = [modules[name].register_forward_hook(_adding(name, active)) for name in layers]
    # torch.group_norm asks for the memory format of its input, which vmap knows of contiguous tensors only
    norms = [module for module in modules.values() if isinstance(module, nn.GroupNorm)]
    hooks += [module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),)) for module in norms]
    try:
        yield active
    finally:
        for hook in hooks:
            hook.remove()


def _adding(name: str, active: Active) -> Any:
    """A forward hook that adds the change of one layer."""

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if name not in active.factors:
            return output
        down, up = active.factors[name]
        x = inputs[0].to(down.dtype)
        if active.groups is None:
            change = _change(layer, x, down, up)
        else:
            grouped = x.reshape(active.groups, -1, *x.shape[1:])
            change = torch.vmap(lambda *one: _change(layer, *one))(grouped, down, up).flatten(0, 1)
        return output + (active.scale * change).to(output.dtype)

    return add


def _change(layer: Any, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """B (A x)."""
    if down.ndim == 2:
        return F.linear(F.linear(x, down), up)
    return F.conv2d(layer._conv_forward(x, down, None), up)


def layers_of(
    denoiser: Denoiser,
    shape: Sequence[int],
    cond: Mapping[str, Tensor],
    placement: str = "decoder",
    targets: str | Sequence[str] | None = None,
) -> list[str]:
    """The layers that get adapters.

    Args:
        denoiser: of the model.
        shape: (C, H, W) of a sample.
        cond: conditions of one sample.
        placement: `all`; `decoder`: the layers behind the network's split point, where encoder propagation splits it;
            `last`: the last block alone, which reads the finest skip, where DeepCache splits it.
        targets: names and groups of layers, see `nets.lora.target_layers`; None: those of attention where there are
            any at this place, else all.

    Raises:
        BadInput: for a network without that split, one that has a LoRA already, and where nothing remains.
    """
    check_choice("placement", placement, PLACEMENTS)
    net: Any = denoiser.net
    if lora_layers(net):
        raise BadInput("the model has a LoRA that is not merged: merge it first (nets.lora.fold_lora)")
    chosen = list(target_layers(innermost(net), targets))
    everything = chosen if targets is not None else list(target_layers(innermost(net), "all"))
    if placement == "all":
        return chosen
    if placement == "last" and not hasattr(net, "shallow_decode"):
        raise BadInput(f"{type(innermost(net)).__name__} has no last block to split off: use placement='decoder'")
    x, time = denoiser._inputs(torch.zeros(1, *shape, device=_device(net)), None, 0.5)
    ran: list[str] = []
    with torch.no_grad():
        if placement == "last":
            emb = net.embed(time, **cond)
            first = net.shallow_encode(x, emb, 0)
            middle = net.deep(first, emb)
            with _recording(net, ran):
                net.shallow_decode(first, middle, emb)
        else:
            split = split_point_of(net, "few-shot adapters in the decoder", None)
            entry, emb = split.enter(x, time, dict(cond))
            features = split.encode(entry, emb)
            with _recording(net, ran):
                split.decode(features, emb)
    found = [name for name in chosen if name in ran] or [name for name in everything if name in ran]
    if not found:
        raise BadInput(f"no layer of {type(innermost(net)).__name__} to adapt at placement={placement!r}: use 'all'")
    return found


@contextmanager
def _recording(net: nn.Module, names: list[str]) -> Iterator[None]:
    """Within the block the names of the modules that run are appended to a list."""
    modules = innermost(net).named_modules()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: names.append(name))  # type: ignore[misc]
        for name, module in modules
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _device(net: nn.Module) -> torch.device:
    """Of the weights."""
    return next(p.device for p in net.parameters())


def memory_left(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where it does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    file = Path("/proc/meminfo")
    if device.type != "cpu" or not file.is_file():
        return None
    found = [line.split()[1] for line in file.read_text().splitlines() if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None
