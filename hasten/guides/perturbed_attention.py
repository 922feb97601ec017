"""Guidance by the network itself with its self-attention switched off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..denoiser import Wrapper
from ..errors import BadInput, check_numbers
from ..nets.layers import Attention
from ..nets.text_unet_blocks import TextAttention
from ._base import Guide
from .cfg import GuidedDenoiser

__all__ = ["PerturbedAttention"]


@dataclass(frozen=True)
class PerturbedAttention(Guide):
    """`x0 = x0_guided + scale (x0_cond - x0_perturbed)`: away from what the network predicts without its attention.

    In the perturbed evaluation the self-attention of some layers passes its values on as they are, as with the identity
    for its attention map, so that the structure of the image suffers. It needs no label and no second model, and adds
    one evaluation a step; with a guidance scale it adds to that.

    Args:
        scale: at least 0, 0 is none; the paper uses 3 to 5.
        layers: part of the names of the layers that are perturbed, such as "mid" or "down_blocks.2". Default: those of
            the middle block, or all where no name has "mid" in it.

    References:
        Ahn, Cho, Min, Jang, Kim, Kim, Park, Jin, Kim 2024, arXiv:2403.17377.
    """

    scale: float = 3.0
    layers: str | None = None
    negative: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise BadInput(f"perturbed_attention needs scale >= 0, found {self.scale:g}")
        check_numbers(self)

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """The guided denoiser.

        Raises:
            BadInput: for a network without self-attention that can be perturbed, or without such layers; where another
                guide stands between this one and the guidance scale.
        """
        if self.scale == 0:
            return denoiser
        if not isinstance(denoiser, GuidedDenoiser) and any(isinstance(m, GuidedDenoiser) for m in denoiser.modules()):
            raise BadInput("perturbed_attention needs the conditional prediction: name it before the other guides")
        return Perturbed(denoiser, self)


class Perturbed(Wrapper):
    """A denoiser under `PerturbedAttention`."""

    def __init__(self, denoiser: nn.Module, guide: PerturbedAttention) -> None:
        super().__init__(denoiser)
        self.guide, self.attention = guide, self_attention(denoiser, guide.layers)

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """x0 (B, *S) under the guidance."""
        inner = self.denoiser
        if isinstance(inner, GuidedDenoiser):
            x0, of_cond = inner.with_cond(x_t, t, **cond)
        else:
            x0 = of_cond = inner(x_t, t, **cond)
        with identity_attention(self.attention):
            if isinstance(inner, GuidedDenoiser):
                perturbed = GuidedDenoiser.branch(inner, x_t, t, **cond)
            else:
                perturbed = inner(x_t, t, **cond)
        return x0 + self.guide.scale * (of_cond - perturbed)


class IdentityProcessor:
    """An attention processor of `diffusers` whose output is that of the identity for its attention map."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The output, of the shape of `hidden_states`: (B, l, D) or (B, C, h, w)."""
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        shape = x.shape
        x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        x = attn.to_out[1](attn.to_out[0](attn.to_v(x)))
        x = x.transpose(1, 2).reshape(shape) if len(shape) == 4 else x
        return (x + hidden_states if attn.residual_connection else x) / attn.rescale_output_factor


def self_attention(denoiser: Any, layers: str | None) -> list[nn.Module]:
    """The self-attention modules of a denoiser's network that can be perturbed and have `layers` in their names.

    Raises:
        BadInput: where there are none.
    """
    net = getattr(denoiser, "net", None)
    found = {name: m for name, m in net.named_modules() if can_perturb(m)} if isinstance(net, nn.Module) else {}
    if not found:
        kind = type(denoiser if net is None else net).__name__
        raise BadInput(f"perturbed_attention: {kind} has no self-attention that it can switch off")
    part = ("mid" if any("mid" in name for name in found) else "") if layers is None else layers
    chosen = [m for name, m in found.items() if part in name]
    if not chosen:
        raise BadInput(f"perturbed_attention: no layer has {part!r} in its name; there are {', '.join(found)}")
    return chosen


def can_perturb(module: nn.Module) -> bool:
    """Whether it is self-attention of hasten's or of diffusers' U-Nets and single-stream transformers."""
    if isinstance(module, (Attention, TextAttention)):
        return not getattr(module, "cross", False)
    names = ("to_v", "to_out", "set_processor", "residual_connection", "group_norm", "spatial_norm")
    if not all(hasattr(module, name) for name in names) or getattr(module, "is_cross_attention", False):
        return False
    attn: Any = module
    if getattr(attn, "add_k_proj", None) is not None or attn.to_v is None or not isinstance(attn.to_out, nn.ModuleList):
        return False
    return len(attn.to_out) == 2 and getattr(attn.to_v, "out_features", 0) == getattr(attn.to_out[0], "in_features", -1)


@contextlib.contextmanager
def identity_attention(modules: list[nn.Module]) -> Iterator[None]:
    """Within the block these modules have the identity for their attention map."""
    restored: list[Any] = []
    try:
        for module in modules:
            attn: Any = module
            if isinstance(module, (Attention, TextAttention)):
                attn.identity = True
                restored.append(lambda attn=attn: setattr(attn, "identity", False))
            else:
                before = attn.processor
                attn.set_processor(IdentityProcessor())
                restored.append(lambda attn=attn, before=before: attn.set_processor(before))
        yield
    finally:
        for restore in restored:
            restore()
