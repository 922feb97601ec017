"""Seams for transformers of `diffusers`: `embed`, `blocks`, `run` and `finish`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BadInput
from .split_network import Embeddings, SplitNetwork

__all__ = ["KINDS", "SplitDiT", "SplitJointDiT"]


class _Transformer(SplitNetwork):
    """Blocks one after the other: forward == finish(run(0, len(blocks), *embed(x, time)), emb)."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks themselves."""
        return self.net.transformer_blocks  # type: ignore[return-value]

    def embed(self, x: Tensor, time: Tensor, **cond: Any) -> tuple[Tensor, Embeddings]:
        """Tokens (B, L, D) of x (B, *S), and what the blocks read beside them."""
        raise NotImplementedError

    def run(self, first: int, last: int, tokens: Tensor, emb: Embeddings) -> Tensor:
        """Blocks first..last-1: tokens to tokens."""
        raise NotImplementedError

    def finish(self, tokens: Tensor, emb: Embeddings) -> Tensor:
        """The tokens after the last block -> raw (B, *S)."""
        raise NotImplementedError

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """Raw output (B, *S) at noisy x (B, *S)."""
        tokens, emb = self.embed(x, time, **cond)
        return self.finish(self.run(0, len(self.blocks), tokens, emb), emb)

    def _image(self, patches: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, h w, p p C) put together as an image (B, C, h p, w p)."""
        p, channels = int(self.config.patch_size), int(self.net.out_channels)  # type: ignore[arg-type]
        patches = patches.reshape(-1, height, width, p, p, channels)
        image = torch.einsum("nhwpqc->nchpwq", patches)
        return self._kept(image.reshape(-1, channels, height * p, width * p))


class SplitDiT(_Transformer):
    """Seams of `DiTTransformer2DModel`. Conditions: `label`, of which the last is "no class".

    Peebles, Xie 2023, arXiv:2212.09748.
    """

    @property
    def null_label(self) -> int:
        """The label without a class, which guidance needs."""
        return int(self.config.num_embeds_ada_norm)

    def embed(self, x: Tensor, time: Tensor, **cond: Any) -> tuple[Tensor, Embeddings]:
        """Tokens with their positions; time and class, which every block embeds by itself."""
        self._known(cond, ("label",))
        label = cond.get("label")
        if label is None:
            raise BadInput(f"{type(self.net).__name__} is conditional: it needs label=, the classes")
        return self.net.pos_embed(x), Embeddings({"time": time, "label": label})

    def run(self, first: int, last: int, tokens: Tensor, emb: Embeddings) -> Tensor:
        for block in list(self.blocks)[first:last]:
            tokens = block(
                tokens, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
                timestep=emb["time"], cross_attention_kwargs=None, class_labels=emb["label"],
            )  # fmt: skip
        return tokens

    def finish(self, tokens: Tensor, emb: Embeddings) -> Tensor:
        net = self.net
        told = self.blocks[0].norm1.emb(emb["time"], emb["label"], hidden_dtype=tokens.dtype)  # type: ignore
        shift, scale = net.proj_out_1(F.silu(told)).chunk(2, dim=1)
        tokens = net.proj_out_2(net.norm_out(tokens) * (1 + scale[:, None]) + shift[:, None])
        side = int(tokens.shape[1] ** 0.5)
        return self._image(tokens, side, side)


class SplitJointDiT(_Transformer):
    """Seams of `SD3Transformer2DModel`. Conditions: `text`, `added_text_embeds` (pooled).

    Tokens are those of the text and, after them, those of the image. Esser et al. 2024, arXiv:2403.03206.
    """

    def embed(self, x: Tensor, time: Tensor, **cond: Any) -> tuple[Tensor, Embeddings]:
        """Tokens of text and image; the embedding of time and pooled text."""
        self._known(cond, ("text", "added_text_embeds"))
        text, pooled, p = cond.get("text"), cond.get("added_text_embeds"), int(self.config.patch_size)
        if text is None or pooled is None:
            raise BadInput(f"{type(self.net).__name__} needs text= (B, L, D) and added_text_embeds= (B, D)")
        tokens = torch.cat([self.net.context_embedder(text), self.net.pos_embed(x)], dim=1)
        # the sides of the image in patches, and where it begins, as shapes: they have no batch
        where = {"length": text.shape[1], "sides": (x.shape[-2] // p, x.shape[-1] // p)}
        return tokens, Embeddings({"time": self.net.time_text_embed(time, pooled)}, where)

    def run(self, first: int, last: int, tokens: Tensor, emb: Embeddings) -> Tensor:
        length = emb.options["length"]
        text, image = tokens[:, :length], tokens[:, length:]
        for block in list(self.blocks)[first:last]:
            made, image = block(hidden_states=image, encoder_hidden_states=text, temb=emb["time"])
            text = text if made is None else made  # the last block makes none
        return torch.cat([text, image], dim=1)

    def finish(self, tokens: Tensor, emb: Embeddings) -> Tensor:
        image = self.net.norm_out(tokens[:, emb.options["length"] :], emb["time"])
        return self._image(self.net.proj_out(image), *emb.options["sides"])


KINDS = {"DiTTransformer2DModel": SplitDiT, "SD3Transformer2DModel": SplitJointDiT}
