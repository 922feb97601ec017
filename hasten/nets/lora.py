"""Low-rank adaptation (LoRA) of linear and convolutional layers: `W + (alpha / rank) B A`, only A and B trained.

A layer keeps its place, name and weights in the network; it gets two further parameters, `lora_A` and `lora_B`:

    linear:       y = W x + b + s B (A x)          A (r, in), B (out, r)
    convolution:  y = W * x + b + s B * (A * x)    A (r, in, kh, kw), B (out, r, 1, 1)

with the stride and padding of the layer in A, and s = alpha / rank times a multiplier. B is zero at the start, so that
the network is at first unchanged.

References:
    Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import BadInput, check_int, nearest
from .prequantized import is_prequantized

# names of layers in the transformers of U-Nets, as diffusers and peft spell them; to_kv: of a `TextUNet`
ATTENTION = ("to_q", "to_k", "to_v", "to_kv", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
GROUPS = ("attention", "conv", "all")


@dataclass(frozen=True)
class LowRank:
    """The change of one layer's weights, `scale B A` with scale = alpha / rank.

    Args:
        down: A, (r, in) of a linear layer, (r, in, kh, kw) of a convolution.
        up: B, (out, r) or (out, r, 1, 1).
        alpha: the numerator of the scale.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """The change of the weights, float32, of the shape of the weights."""
        change = self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))
        return change.reshape(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the layer's weights."""
        return (int(self.up.shape[0]), *(int(n) for n in self.down.shape[1:]))


class LoRALayer(nn.Module):
    """What `LoRALinear` and `LoRAConv2d` have in common."""

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_alpha: float
    lora_scale: float
    lora_merged: bool

    def low_rank(self) -> LowRank:
        """The factors, detached."""
        return LowRank(self.lora_A.detach(), self.lora_B.detach(), self.lora_alpha)

    def merge_weights(self) -> None:
        """Add the factors to the weights; nothing where they are merged."""
        if not self.lora_merged:
            self._add(self.lora_scale)
            self.lora_merged = True

    def unmerge_weights(self) -> None:
        """Subtract the factors from the weights again, exact up to rounding."""
        if self.lora_merged:
            self._add(-self.lora_scale)
            self.lora_merged = False

    def _add(self, scale: float) -> None:
        """Replace the weights, which copies of the network may share, by those with `scale` times the change."""
        with torch.no_grad():
            weight = add_delta(self.weight, self.low_rank(), scale)
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)

    def _factor(self) -> float:
        """The factor of B A."""
        return self.lora_scale * self.lora_alpha / self.lora_A.shape[0]


class LoRALinear(nn.Linear, LoRALayer):
    """A linear layer with low-rank factors."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = F.linear(x, self.weight, self.bias)
        if self.lora_merged:
            return y
        return y + (self._factor() * F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)).to(y.dtype)


class LoRAConv2d(nn.Conv2d, LoRALayer):
    """A convolution with low-rank factors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W')."""
        y = self._conv_forward(x, self.weight, self.bias)
        if self.lora_merged:
            return y
        low = self._conv_forward(x.to(self.lora_A.dtype), self.lora_A, None)
        return y + (self._factor() * F.conv2d(low, self.lora_B)).to(y.dtype)


KINDS: dict[type, type] = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d}


def add_delta(weight: Tensor, change: LowRank, scale: float = 1.0) -> Tensor:
    """Weights plus `scale` times a low-rank change, computed in float32, in their own dtype."""
    delta = change.delta().to(weight.device).reshape(weight.shape)
    return (weight.detach().float() + scale * delta).to(weight.dtype)


def innermost(net: nn.Module) -> nn.Module:
    """The network that hasten's wrappers (split points of diffusers' networks, ...) have inside: its names count."""
    while type(net).__module__.startswith("hasten.") and isinstance(inner := getattr(net, "net", None), nn.Module):
        net = inner
    return net


def adaptable(layer: nn.Module) -> bool:
    """Whether a layer can have low-rank factors: linear, or a 2D convolution without groups, of torch's own class."""
    return type(layer) in KINDS and getattr(layer, "groups", 1) == 1 and not is_prequantized(layer)


def parse_targets(targets: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """The names and groups of a comma-separated text, or of a sequence; None: the default."""
    if targets is None:
        return None
    names = targets.split(",") if isinstance(targets, str) else targets
    return tuple(name.strip() for name in names if name.strip())


def target_layers(net: nn.Module, targets: str | Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The layers that get factors, by name.

    Args:
        net: the network.
        targets: names of modules (`to_q` is every module of that name, also `attn1.to_q`), and of groups: `attention`,
            the linear layers of diffusers' transformer blocks (`ATTENTION`); `conv`, the other convolutions of more
            than one pixel; `all`, every linear and convolutional layer. None: `attention` where the network has such
            layers, else `all`.

    Raises:
        BadInput: for a name that no layer has, and where no layer can be adapted.
    """
    layers = {name: layer for name, layer in net.named_modules() if adaptable(layer)}
    names = parse_targets(targets)
    if names is None:
        names = ("attention",) if any(ends_with(name, ATTENTION) for name in layers) else ("all",)
    chosen: set[str] = set()
    for target in names:
        found = {name for name, layer in layers.items() if is_target(name, layer, target)}
        if not found:
            last = sorted({name.rpartition(".")[2] for name in layers})
            raise BadInput(
                f"{type(net).__name__} has no linear layer or convolution {target!r} that a LoRA can adapt: "
                f"{nearest(target, [*GROUPS, *last])}"
            )
        chosen |= found
    if not chosen:
        raise BadInput(f"{type(net).__name__} has no layer that a LoRA can adapt: it adapts linear layers and Conv2d")
    return {name: layer for name, layer in layers.items() if name in chosen}


def is_target(name: str, layer: nn.Module, target: str) -> bool:
    """Whether a layer belongs to a group, or has a name."""
    if target == "all":
        return True
    if target == "attention":
        return ends_with(name, ATTENTION)
    if target == "conv":
        return isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1
    return ends_with(name, (target,))


def ends_with(name: str, targets: Iterable[str]) -> bool:
    """Whether the last parts of a module's name are one of the targets."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def add_lora(
    net: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: str | Sequence[str] | None = None,
    seed: int = 0,
) -> list[str]:
    """Give layers of a network low-rank factors, in place, and freeze everything else.

    The network's `state_dict` has the factors and buffers only from then on, and `load_state_dict` asks for no others:
    checkpoints are small.

    Args:
        net: the network; wrappers of hasten are looked into.
        rank: r, at least 1.
        alpha: numerator of the scale. None: `rank`, a scale of 1.
        targets: see `target_layers`.
        seed: of the initial A, uniform as a linear layer's weights (Kaiming); B is zero.

    Returns:
        The names of the layers.

    Raises:
        BadInput: for a rank below 1, unknown targets, and a network with factors.
    """
    rank, net = check_int("the rank of a LoRA", rank, 1), innermost(net)
    if next(iter(lora_layers(net)), None) is not None:
        raise BadInput(f"{type(net).__name__} has a LoRA already: merge it first")
    chosen = target_layers(net, targets)
    net.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in chosen.values():
        weight: Tensor = layer.get_parameter("weight")
        down = torch.empty(rank, *weight.shape[1:])
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        up = torch.zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2))
        attach(layer, LowRank(down, up, float(rank if alpha is None else alpha)))
    register_hooks(net)
    return list(chosen)


def attach_lora(net: nn.Module, factors: Mapping[str, LowRank]) -> None:
    """Give layers of a network these factors, by name, to train them further; in place, and as `add_lora` else.

    Raises:
        BadInput: for a layer that cannot have factors, and a network with factors.
    """
    net = innermost(net)
    if next(iter(lora_layers(net)), None) is not None:
        raise BadInput(f"{type(net).__name__} has a LoRA already: merge it first")
    modules = dict(net.named_modules())
    if unknown := [name for name in factors if name not in modules or not adaptable(modules[name])]:
        raise BadInput(f"{type(net).__name__} has no linear layer or convolution {unknown[0]} that a LoRA can adapt")
    net.requires_grad_(False)
    for name, one in factors.items():
        shape = tuple(modules[name].get_parameter("weight").shape)  # 1x1 convolutions may have a linear layer's factors
        down, up = one.down.reshape(one.rank, *shape[1:]), one.up.reshape(shape[0], one.rank, *[1] * (len(shape) - 2))
        attach(modules[name], LowRank(down, up, one.alpha))
    register_hooks(net)


def attach(layer: nn.Module, factors: LowRank) -> None:
    """Make a layer one with factors, in place: hooks, names and weights stay. The factors are float32."""
    weight: Tensor = layer.get_parameter("weight")
    layer.__class__ = KINDS[type(layer)]
    assert isinstance(layer, LoRALayer)
    layer.lora_A = nn.Parameter(factors.down.to(weight.device, torch.float32))
    layer.lora_B = nn.Parameter(factors.up.to(weight.device, torch.float32))
    layer.lora_alpha, layer.lora_scale, layer.lora_merged = factors.alpha, 1.0, False


def lora_layers(net: nn.Module) -> dict[str, LoRALayer]:
    """The layers with factors, by name."""
    return {name: layer for name, layer in innermost(net).named_modules() if isinstance(layer, LoRALayer)}


def lora_factors(net: nn.Module) -> dict[str, LowRank]:
    """Copies of the factors by name of the layer, float32 on the CPU."""
    found = {name: layer.low_rank() for name, layer in lora_layers(net).items()}
    return {
        name: LowRank(one.down.float().cpu().clone(), one.up.float().cpu().clone(), one.alpha)
        for name, one in found.items()
    }


def set_lora_scale(net: nn.Module, scale: float) -> None:
    """Multiply the change of the weights by `scale` (0: the network without its LoRA), in place."""
    for layer in lora_layers(net).values():
        merged = layer.lora_merged
        layer.unmerge_weights()
        layer.lora_scale = float(scale)
        if merged:
            layer.merge_weights()


def merge_lora(net: nn.Module) -> None:
    """Add the factors to the weights, in place; `unmerge_lora` takes them out again."""
    for layer in lora_layers(net).values():
        layer.merge_weights()


def unmerge_lora(net: nn.Module) -> None:
    """Take merged factors out of the weights, in place, exact up to rounding."""
    for layer in lora_layers(net).values():
        layer.unmerge_weights()


def remove_lora(net: nn.Module) -> dict[str, LowRank]:
    """Make the layers plain ones again, in place, with the weights that they have now (merged or not).

    Returns:
        The factors.
    """
    factors = lora_factors(net)
    plain = {new: old for old, new in KINDS.items()}
    for layer in lora_layers(net).values():
        for name in ("lora_A", "lora_B", "lora_alpha", "lora_scale", "lora_merged"):
            delattr(layer, name)
        layer.__class__ = plain[type(layer)]
    root = innermost(net)
    for hooks in (root._state_dict_hooks, root._load_state_dict_pre_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) in (drop_frozen, keep_frozen)]:
            del hooks[key]
    return factors


def fold_lora(net: nn.Module) -> dict[str, LowRank]:
    """Merge the factors into the weights and make the layers plain ones, in place; returns the factors."""
    merge_lora(net)
    return remove_lora(net)


def merge_factors(net: nn.Module, factors: Mapping[str, LowRank], scale: float = 1.0) -> None:
    """Add `scale` times low-rank changes to the weights of layers, by name, in place.

    Raises:
        BadInput: for a layer that the network does not have, or of another shape.
    """
    net = innermost(net)
    modules = dict(net.named_modules())
    for name, change in factors.items():
        layer = modules.get(name)
        if layer is None or not isinstance(weight := getattr(layer, "weight", None), Tensor):
            raise BadInput(f"{type(net).__name__} has no layer {name}, which the LoRA changes")
        if trimmed(tuple(weight.shape)) != trimmed(change.shape):
            raise BadInput(
                f"the LoRA changes weights {change.shape} of {name}, those of {type(net).__name__} are "
                f"{tuple(weight.shape)}"
            )
        with torch.no_grad():
            merged = add_delta(weight, change, scale)
        layer.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)


def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a 1x1 convolution as that of a linear layer; others unchanged."""
    return shape[:2] if shape[2:] in ((1, 1), ()) else shape


def register_hooks(net: nn.Module) -> None:
    """Leave the frozen parameters out of the network's state, and fill them in where a state is loaded."""
    net._register_state_dict_hook(drop_frozen)
    net._register_load_state_dict_pre_hook(keep_frozen, with_module=True)


def base_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are no factors, of all networks with a LoRA in a module: constant while it is trained."""
    networks = [one for one in module.modules() if drop_frozen in one._state_dict_hooks.values()]
    return [p for net in networks for name, p in net.named_parameters() if not is_factor(name)]


def is_factor(name: str) -> bool:
    """Whether a parameter is a low-rank factor."""
    return name.endswith(("lora_A", "lora_B"))


def drop_frozen(net: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Remove the parameters that are no factors from a state."""
    for name, _ in net.named_parameters():
        if not is_factor(name):
            state.pop(prefix + name, None)


def keep_frozen(net: nn.Module, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
    """Complete a state with the network's own parameters that are no factors."""
    for name, parameter in net.named_parameters():
        if not is_factor(name):
            state.setdefault(prefix + name, parameter.detach())
