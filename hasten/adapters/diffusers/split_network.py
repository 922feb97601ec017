"""What the networks of `diffusers` have in common once they have hasten's seams; `_unets` and `_transformers` are them.

A network with seams holds the module of `diffusers` as its `net`, unchanged and not copied, and calls its parts. It is
called as every network of hasten is: `net(x (B, *S), time (B,), **conditions) -> raw (B, *S)`.

Conditions, all with the batch first, are named alike in all of them:
    label (B,)                  classes
    text (B, L, D)              what the text encoder says; text_mask (B, L) of 0 and 1
    mask (B, L)                 of the image tokens, 0 and 1
    added_NAME                  more of the kind: pooled text, sizes and crops (SDXL), image embeddings
    guidance (B,)               the guidance scale, of a distilled network that reads one
    timestep_cond (B, D)        the same, embedded already
    down_residual_K, mid_residual    what a ControlNet adds to skip K and to the middle
    adapter_K                   what a T2I-Adapter adds inside down block K
    null_NAME                   what stands for NAME in guidance's unconditional branch; no network reads it
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import BadInput, HastenError, nearest

__all__ = ["Embeddings", "SplitNetwork", "dtype_of", "guidance_features"]


class Embeddings:
    """What a network makes of its time and conditions: tensors by name, the batch first, and options without one.

    `tree_map` of torch's pytree goes over the tensors, so that they can be repeated or parted along the batch.
    """

    def __init__(self, tensors: dict[str, Any], options: dict[str, Any] | None = None) -> None:
        self.tensors = {name: value for name, value in tensors.items() if value is not None}
        self.options = options or {}

    def __getitem__(self, name: str) -> Any:
        return self.tensors.get(name)

    def several(self, name: str) -> list[Any]:
        """name_0, name_1, ... as far as they go."""
        found: list[Any] = []
        while (value := self.tensors.get(f"{name}_{len(found)}")) is not None:
            found.append(value)
        return found


def _flat(emb: Embeddings) -> tuple[list[Any], Any]:
    return list(emb.tensors.values()), (tuple(emb.tensors), emb.options)


def _whole(values: Any, context: Any) -> Embeddings:
    return Embeddings(dict(zip(context[0], values)), context[1])


pytree.register_pytree_node(Embeddings, _flat, _whole)


class SideInputs:
    """Conditions that reach a network past its callers; a copy of the network shares them."""

    def __init__(self) -> None:
        self.conditions: dict[str, Any] = {}

    @contextmanager
    def given(self, conditions: dict[str, Any]) -> Iterator[None]:
        """Within it the network reads these conditions too, also in copies of it and where accelerators ask it."""
        before, self.conditions = self.conditions, conditions
        try:
            yield
        finally:
            self.conditions = before

    def __deepcopy__(self, memo: dict[int, Any]) -> SideInputs:
        return self


class SplitNetwork(nn.Module):
    """A network of `diffusers` under hasten's calling convention.

    Args:
        net: the module of `diffusers`; kept as it is.
        whole: answer all channels, also those of a learned variance, which a denoiser does not want.
    """

    def __init__(self, net: nn.Module, whole: bool = False) -> None:
        super().__init__()
        self.net = net
        self.whole = whole
        self.beside = SideInputs()

    @property
    def null_conditions(self) -> bool:
        """Whether guidance's unconditional branch is given as `null_NAME`: of a network that reads text."""
        return hasattr(self.config, "cross_attention_dim") or hasattr(self.config, "joint_attention_dim")

    @property
    def config(self) -> Any:
        """The configuration of the module of `diffusers`."""
        return self.net.config

    @property
    def dtype(self) -> torch.dtype:
        """In which the network computes; its weights may be stored in fewer bits (layer-wise casting)."""
        return dtype_of(self.net)

    @property
    def channels(self) -> int:
        """Of the sample."""
        return int(self.config.in_channels)

    def _kept(self, raw: Tensor) -> Tensor:
        """The answer without a learned variance."""
        return raw if self.whole or raw.shape[1] != 2 * self.channels else raw[:, : self.channels]

    def _known(self, cond: dict[str, Any], names: tuple[str, ...], prefixes: tuple[str, ...] = ()) -> None:
        """Refuse conditions that the network would silently ignore."""
        for key in cond:
            if key not in names and not key.startswith(("null_", *prefixes)):
                raise BadInput(f"{type(self.net).__name__} takes no condition {key!r}: {nearest(key, names)}")


def dtype_of(net: nn.Module) -> torch.dtype:
    """The dtype in which a network computes: what it says itself (weights may be stored in fewer bits), or theirs."""
    said = getattr(net, "dtype", None)
    if isinstance(said, torch.dtype) and said.is_floating_point:
        return said
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)


def guidance_features(scale: Tensor, width: int) -> Tensor:
    """How a latent consistency model is told its guidance scale (B,): (B, width) sines, then cosines, of 1000 (s - 1).

    Luo et al. 2023, arXiv:2310.04378, with the frequencies of the transformer: 10000^(-k / (width/2 - 1)).
    """
    half = width // 2
    if half < 2:
        raise HastenError(f"a guidance embedding needs a width of at least 4, found {width}")
    rates = torch.exp(torch.arange(half, device=scale.device, dtype=torch.float32) * -(9.210340371976184 / (half - 1)))
    angles = (scale.float()[:, None] - 1) * 1000 * rates[None]
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))
