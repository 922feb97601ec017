"""Networks of `diffusers` with split points: the common base class; `unets` and `transformers` have the subclasses.

A split network has the module of `diffusers` as its `net`, unchanged and not copied, and calls its parts. Its calling
convention is that of every network of hasten: `net(x (B, *S), time (B,), **conditions) -> raw (B, *S)`.

Conditions, all with the batch first, have the same names in all subclasses:
    label (B,)                  classes
    text (B, L, D)              output of the text encoder; text_mask (B, L) of 0 and 1
    mask (B, L)                 of the image tokens, 0 and 1
    added_NAME                  further conditions: pooled text, sizes and crops (SDXL), image embeddings
    guidance (B,)               the guidance scale, an input of some distilled networks
    timestep_cond (B, D)        the same, embedded
    down_residual_K, mid_residual    a ControlNet's residuals for skip K and for the middle
    adapter_K                   a T2I-Adapter's residual inside down block K
    null_NAME                   replaces NAME in guidance's unconditional branch; no network reads it
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BadInput, HastenError, nearest
from ...nets.embeddings import Embeddings

__all__ = ["Embeddings", "SideInputs", "SplitNetwork", "dtype_of", "guidance_features"]


class SideInputs:
    """Conditions that reach a network without its callers (ControlNet residuals); copies of the network share them.

    Attributes:
        conditions: by name.
        scale: a `TimeScale`, where the network's time is not the scheduler's timestep.
        table: the scheduler's timesteps.
        timesteps: the same, as numbers.
        output_class: what the network's own `forward` returned last, where that runs.
    """

    def __init__(self) -> None:
        self.conditions: dict[str, Any] = {}
        self.scale: Any = None
        self.table: Any = None
        self.timesteps: list[float] = []
        self.output_class: Any = None

    @contextmanager
    def using(self, conditions: dict[str, Any]) -> Iterator[None]:
        """Within the block the network, and its copies, read these conditions too, whoever evaluates them."""
        before, self.conditions = self.conditions, conditions
        try:
            yield
        finally:
            self.conditions = before

    def __deepcopy__(self, memo: dict[int, Any]) -> SideInputs:
        return self


class SplitNetwork(nn.Module):
    """A network of `diffusers` with hasten's calling convention.

    Args:
        net: the module of `diffusers`, left unchanged.
        with_variance: return all channels, including those of a learned variance, which a denoiser drops.
    """

    def __init__(self, net: nn.Module, with_variance: bool = False) -> None:
        super().__init__()
        self.net = net
        self.with_variance = with_variance
        self.side_inputs = SideInputs()

    @property
    def null_conditions(self) -> bool:
        """Whether guidance's unconditional branch has conditions `null_NAME`: for networks conditioned on text."""
        return hasattr(self.config, "cross_attention_dim") or hasattr(self.config, "joint_attention_dim")

    @property
    def config(self) -> Any:
        """The configuration of the module of `diffusers`."""
        return self.net.config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the network computes; its weights may be stored in another (layer-wise casting)."""
        return dtype_of(self.net)

    @property
    def channels(self) -> int:
        """Channels of the sample."""
        return int(self.config.in_channels)

    @property
    def _parts(self) -> Any:
        """The module of `diffusers`, untyped: its parts are attributes of its class."""
        return self.net

    def _without_variance(self, raw: Tensor) -> Tensor:
        """The output without the channels of a learned variance."""
        return raw if self.with_variance or raw.shape[1] != 2 * self.channels else raw[:, : self.channels]

    def with_learned_variance(self, *inputs: Any, **cond: Any) -> tuple[Tensor, Tensor]:
        """The output and the channels of a learned variance, for networks that have them; arguments of `forward`.

        Raises:
            BadInput: for a network without.
        """
        whole = copy.copy(self)
        whole.with_variance = True
        raw: Tensor = whole(*inputs, **cond)
        if raw.shape[1] != 2 * self.channels:
            raise BadInput(f"{type(self.net).__name__} predicts no variance: take variance=small or large")
        return raw[:, : self.channels], raw[:, self.channels :]

    def _check_conditions(self, cond: dict[str, Any], names: tuple[str, ...], prefixes: tuple[str, ...] = ()) -> None:
        """Refuse conditions that the network would silently ignore."""
        for key in cond:
            if key not in names and not key.startswith(("null_", *prefixes)):
                raise BadInput(f"{type(self.net).__name__} takes no condition {key!r}: {nearest(key, names)}")


def dtype_of(net: nn.Module) -> torch.dtype:
    """The dtype in which a network computes: its `dtype` where it has one, else that of its weights."""
    dtype = getattr(net, "dtype", None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A condition in the dtype of the network: embeddings in half precision for one in float32, and the other way."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def guidance_features(scale: Tensor, width: int) -> Tensor:
    """The embedding of the guidance scale of a latent consistency model.

    Sines, then cosines, of 1000 (s - 1) 10000^(-k / (width/2 - 1)).

    Args:
        scale: (B,), s.
        width: of the embedding, at least 4.

    Returns:
        (B, width), float32.

    Raises:
        HastenError: for a smaller width.

    References:
        Luo et al. 2023, arXiv:2310.04378.
    """
    half = width // 2
    if half < 2:
        raise HastenError(f"a guidance embedding needs a width of at least 4, found {width}")
    rates = torch.exp(torch.arange(half, device=scale.device, dtype=torch.float32) * -(9.210340371976184 / (half - 1)))
    angles = (scale.float()[:, None] - 1) * 1000 * rates[None]
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))
