"""Attention on a patch of an image: queries of this rank's rows, keys and values of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BadInput
from .exchange import Exchange

__all__ = ["PatchAttention", "PatchProcessor", "TextVersion", "gather_keys"]

PLAIN = ("AttnProcessor", "AttnProcessor2_0")  # of diffusers: what `PatchProcessor` computes on one rank


def gather_keys(exchange: Exchange, own: Tensor) -> Tensor:
    """Keys and values of all rows in their order.

    Args:
        exchange: of the ranks.
        own: (B, l, D), this rank's.

    Returns:
        (B, L, D): this rank's as they are, the others' as exchanged.
    """
    if exchange.mode == "naive":
        return own
    counts, me = exchange.partition.counts(own.shape[1]), exchange.partition.me
    sent = own if exchange.keys_dtype is None or own.element_size() <= 2 else own.to(exchange.keys_dtype)
    sent = sent if exchange.partition.even else F.pad(sent, (0, 0, 0, max(counts) - own.shape[1]))
    received, before = exchange.gather("keys", sent)
    keys = own.new_empty((len(own), sum(counts), own.shape[2]))
    for j, (count, part) in enumerate(zip(counts, keys.split(counts, dim=1))):
        if j == me:
            part.copy_(own)
        else:
            exchange.extrapolate(received[j, :, :count], None if before is None else before[j, :, :count], out=part)
    return keys


class PatchAttention(nn.Module):
    """hasten's residual self-attention, (B, C, h, W) -> (B, C, h, W).

    Args:
        attention: the module that it replaces, whose layers it uses.
        exchange: of the ranks.
    """

    def __init__(self, attention: Any, exchange: Exchange) -> None:
        super().__init__()
        self.heads = attention.heads
        self.norm, self.qkv, self.out = attention.norm, attention.qkv, attention.out
        self.exchange = exchange

    def forward(self, x: Tensor) -> Tensor:
        """This rank's rows of the output."""
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x).flatten(2).transpose(1, 2))
        keys = gather_keys(self.exchange, qkv[:, :, c:])
        q = qkv[:, :, :c].view(b, h * w, self.heads, -1).transpose(1, 2)
        k, v = keys.view(b, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return x + self.out(mixed).transpose(1, 2).view(b, c, h, w)


class TextVersion:
    """Counts the changes of the conditions, by which cross-attention knows whether its cached keys are valid."""

    version = 0


class PatchProcessor:
    """An attention processor of `diffusers`, called with the `Attention` module and its hidden states.

    Self-attention reads the keys and values of all ranks. Those of a text, which does not depend on rows, are computed
    once and cached until the text changes.

    Args:
        attention: the `Attention` module.
        exchange: of the ranks.
        text: counts the changes of the text.
        where: the module's name, for messages.

    Raises:
        BadInput: for an attention that does more than to project, to attend and to project.
    """

    def __init__(self, attention: Any, exchange: Exchange, text: TextVersion, where: str) -> None:
        processor = type(attention.processor).__name__
        if processor not in PLAIN:
            raise BadInput(
                f"patch_parallel does not know the attention processor of {where}, a {processor}: set {PLAIN[1]}"
            )
        for name in ("spatial_norm", "add_k_proj", "to_add_out"):
            if getattr(attention, name, None) is not None:
                raise BadInput(f"patch_parallel does not know {where}, an attention with {name}")
        if attention.to_k.out_features != attention.to_q.out_features:
            raise BadInput(
                f"patch_parallel does not know {where}, an attention with fewer heads of keys than of queries"
            )
        if getattr(attention, "fused_projections", False):
            raise BadInput(f"patch_parallel does not know the fused projections of {where}: unfuse them")
        self.exchange, self.text = exchange, text
        self._cache: tuple[int, Tensor] | None = None  # version of the text, keys and values

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The output, of the shape of `hidden_states`: (B, l, D) or (B, C, h, W)."""
        x, shape = hidden_states, hidden_states.shape
        x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        q = attn.to_q(x)
        if encoder_hidden_states is None:
            keys = gather_keys(self.exchange, torch.cat([attn.to_k(x), attn.to_v(x)], dim=-1))
        else:
            keys = self._of_text(attn, encoder_hidden_states)
        B, L = keys.shape[:2]
        q, k, v = (
            each.view(B, -1, attn.heads, q.shape[-1] // attn.heads).transpose(1, 2) for each in (q, *keys.chunk(2, -1))
        )
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, L, B)
            attention_mask = attention_mask.view(B, attn.heads, -1, attention_mask.shape[-1])
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=attn.scale)
        x = attn.to_out[0](mixed.transpose(1, 2).flatten(2).to(q.dtype))
        x = attn.to_out[1](x)
        x = x.transpose(1, 2).reshape(shape) if len(shape) == 4 else x
        return (x + hidden_states if attn.residual_connection else x) / attn.rescale_output_factor

    def _of_text(self, attn: Any, text: Tensor) -> Tensor:
        """Keys and values (B, L, D) of a text, cached."""
        if self._cache is None or self._cache[0] != self.text.version:
            states = attn.norm_encoder_hidden_states(text) if attn.norm_cross else text
            self._cache = self.text.version, torch.cat([attn.to_k(states), attn.to_v(states)], dim=-1)
        return self._cache[1]
