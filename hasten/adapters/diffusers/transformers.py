"""Split points of the transformers of `diffusers`: `embed`, `blocks`, `run` and `finish`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...errors import BadInput
from .split_network import Embeddings, SplitNetwork, as_dtype

__all__ = ["KINDS", "SplitDiT", "SplitJointDiT"]


class _Transformer(SplitNetwork):
    """A sequence of blocks: forward == finish(run(0, len(blocks), *embed(x, time)), emb)."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks."""
        return self._parts.transformer_blocks

    def embed(self, x: Tensor, time: Tensor, **cond: Any) -> tuple[Tensor, Embeddings]:
        """Tokens (B, L, D) of x (B, *S), and the embeddings that the blocks read."""
        raise NotImplementedError

    def run(self, first: int, last: int, tokens: Tensor, emb: Embeddings) -> Tensor:
        """Apply blocks first to last - 1 to the tokens."""
        raise NotImplementedError

    def finish(self, tokens: Tensor, emb: Embeddings) -> Tensor:
        """The raw output (B, *S) from the tokens after the last block."""
        raise NotImplementedError

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """Raw output (B, *S) at noisy x (B, *S)."""
        tokens, emb = self.embed(x, time, **cond)
        return self.finish(self.run(0, len(self.blocks), tokens, emb), emb)

    def _apply_block(self, block: nn.Module, **inputs: Any) -> Any:
        """The output of a block, recomputed in the backward pass under gradient checkpointing."""
        if torch.is_grad_enabled() and getattr(self.net, "gradient_checkpointing", False):
            return checkpoint(block, use_reentrant=False, **inputs)
        return block(**inputs)

    def _image(self, patches: Tensor, height: int, width: int) -> Tensor:
        """Rearrange tokens (B, h w, p p C) as an image (B, C, h p, w p)."""
        p, channels = int(self.config.patch_size), int(self._parts.out_channels)
        patches = patches.reshape(-1, height, width, p, p, channels)
        image = torch.einsum("nhwpqc->nchpwq", patches)
        return self._without_variance(image.reshape(-1, channels, height * p, width * p))


class SplitDiT(_Transformer):
    """`DiTTransformer2DModel` with split points. Conditions: `label`, of which the last means no class.

    References:
        Peebles, Xie 2023, arXiv:2212.09748.
    """

    @property
    def null_label(self) -> int:
        """The label that means no class, for guidance."""
        return int(self.config.num_embeds_ada_norm)

    def embed(self, x: Tensor, time: Tensor, **cond: Any) -> tuple[Tensor, Embeddings]:
        """Tokens with position embeddings; time and class, which every block embeds itself."""
        self._check_conditions(cond, ("label",))
        label = cond.get("label")
        if label is None:
            raise BadInput(f"{type(self.net).__name__} is conditional: it needs label=, the classes")
        return self._parts.pos_embed(x), Embeddings({"time": time, "label": label})

    def run(self, first: int, last: int, tokens: Tensor, emb: Embeddings) -> Tensor:
        for block in list(self.blocks)[first:last]:
            tokens = self._apply_block(
                block,
                hidden_states=tokens,
                attention_mask=None,
                encoder_hidden_states=None,
                encoder_attention_mask=None,
                timestep=emb["time"],
                cross_attention_kwargs=None,
                class_labels=emb["label"],
            )
        return tokens

    def finish(self, tokens: Tensor, emb: Embeddings) -> Tensor:
        net, block = self._parts, self._parts.transformer_blocks[0]
        conditioning = block.norm1.emb(emb["time"], emb["label"], hidden_dtype=tokens.dtype)
        shift, scale = net.proj_out_1(F.silu(conditioning)).chunk(2, dim=1)
        tokens = net.proj_out_2(net.norm_out(tokens) * (1 + scale[:, None]) + shift[:, None])
        side = int(tokens.shape[1] ** 0.5)
        return self._image(tokens, side, side)


class SplitJointDiT(_Transformer):
    """`SD3Transformer2DModel` with split points. Conditions: `text`, `added_text_embeds` (pooled).

    Tokens are those of the text followed by those of the image.

    References:
        Esser et al. 2024, arXiv:2403.03206.
    """

    def embed(self, x: Tensor, time: Tensor, **cond: Any) -> tuple[Tensor, Embeddings]:
        """Tokens of text and image; the embedding of time and pooled text."""
        self._check_conditions(cond, ("text", "added_text_embeds"))
        text, pooled = (as_dtype(cond.get(key), self.dtype) for key in ("text", "added_text_embeds"))
        p = int(self.config.patch_size)
        if text is None or pooled is None:
            raise BadInput(f"{type(self.net).__name__} needs text= (B, L, D) and added_text_embeds= (B, D)")
        tokens = torch.cat([self._parts.context_embedder(text), self._parts.pos_embed(x)], dim=1)
        # without a batch: the number of text tokens and the sides of the image in patches
        layout = {"length": text.shape[1], "sides": (x.shape[-2] // p, x.shape[-1] // p)}
        return tokens, Embeddings({"time": self._parts.time_text_embed(time, pooled)}, layout)

    def run(self, first: int, last: int, tokens: Tensor, emb: Embeddings) -> Tensor:
        length = emb.options["length"]
        text, image = tokens[:, :length], tokens[:, length:]
        for block in list(self.blocks)[first:last]:
            output, image = self._apply_block(block, hidden_states=image, encoder_hidden_states=text, temb=emb["time"])
            text = text if output is None else output  # the last block returns None
        return torch.cat([text, image], dim=1)

    def finish(self, tokens: Tensor, emb: Embeddings) -> Tensor:
        image = self._parts.norm_out(tokens[:, emb.options["length"] :], emb["time"])
        return self._image(self._parts.proj_out(image), *emb.options["sides"])


KINDS = {"DiTTransformer2DModel": SplitDiT, "SD3Transformer2DModel": SplitJointDiT}
