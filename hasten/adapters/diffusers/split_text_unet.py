"""Split points of `MobileUNet2DConditionModel`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...errors import BadInput
from .guidance_input import TakesGuidance
from .split_network import Embeddings, as_dtype, guidance_features

__all__ = ["KINDS", "SplitTextUNet"]

CONDITIONS = ("text", "guidance", "timestep_cond")


class SplitTextUNet(TakesGuidance):
    """`MobileUNet2DConditionModel` with split points, which are its own.

    Conditions: `text`; `guidance` or `timestep_cond` where the guidance scale is an input.
    """

    def embed(self, time: Tensor, **cond: Any) -> Embeddings:
        """Embeddings of time (B,) and conditions."""
        cond = {**cond, **self.side_inputs.conditions}
        self._check_conditions(cond, CONDITIONS if self.guidance_range else ("text",))
        if cond.get("text") is None:
            raise BadInput(f"{type(self.net).__name__} needs text=, the text encoder's output for a prompt (B, L, D)")
        timestep_cond = cond.get("timestep_cond")
        if timestep_cond is None and cond.get("guidance") is not None:
            timestep_cond = guidance_features(cond["guidance"], int(self.config.time_cond_proj_dim))
        return Embeddings(self._parts.embed(time, as_dtype(cond["text"], self.dtype), timestep_cond))

    def encode(self, x: Tensor, emb: Embeddings) -> tuple[list[Tensor], Tensor]:
        """The contracting half and the middle block: (skips, middle)."""
        return self._parts.encode(x, emb)

    def decode(self, skips: list[Tensor], middle: Tensor, emb: Embeddings) -> Tensor:
        """The expanding half: raw output from `encode`'s features, with embeddings that may be of another time."""
        return self._parts.decode(skips, middle, emb)

    def shallow_encode(self, x: Tensor, emb: Embeddings) -> list[Tensor]:
        """The finest level of the encoder: the skips of the decoder's last level."""
        return self._parts.shallow_encode(x, emb)

    def deep(self, first: list[Tensor], emb: Embeddings) -> Tensor:
        """Everything deeper: the input of the decoder's last level."""
        return self._parts.deep(first, emb)

    def shallow_decode(self, first: list[Tensor], up_input: Tensor, emb: Embeddings) -> Tensor:
        """The decoder's last level and the output layers: raw output."""
        return self._parts.shallow_decode(first, up_input, emb)

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """Raw output (B, *S) at noisy x (B, *S)."""
        emb = self.embed(time, **cond)
        return self.decode(*self.encode(x, emb), emb)


KINDS = {"MobileUNet2DConditionModel": SplitTextUNet}
