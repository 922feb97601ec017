"""Conditions of networks that read text: of a batch, of guidance's unconditional branch, of captions by index.

A batch has the conditions of its samples by name (`text`, `added_text_embeds`, ...). What replaces them in the
unconditional branch is the same for all samples and is not in the batch: the guided teacher has it itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Wrapper
from ..train.sources import Data

DIGEST_ROWS = 64  # captions whose conditions are hashed, where there is no text


class NullConditions(Wrapper):
    """A guided denoiser that gets the conditions of its unconditional branch without its callers.

    Args:
        denoiser: that reads `null_NAME`, see `guides.cfg`.
        null: what takes the place of each condition, (1, ...) by name.
    """

    def __init__(self, denoiser: nn.Module, null: Mapping[str, Tensor]) -> None:
        super().__init__(denoiser)
        self.names = tuple(null)
        for name, value in null.items():
            self.register_buffer(f"null_{name}", value.detach().clone())

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The inner denoiser's x0 (B, *S)."""
        x0: Tensor = self.denoiser(x_t, t, **self._with(len(x_t), cond))
        return x0

    def raw(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The inner denoiser's `raw`."""
        raw: Tensor = self.denoiser.raw(x_t, t, **self._with(len(x_t), cond))
        return raw

    def features(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The inner denoiser's `features`."""
        middle, finish = self.denoiser.features(x_t, t, **self._with(len(x_t), cond))
        return middle, finish

    def _with(self, n: int, cond: dict[str, Any]) -> dict[str, Any]:
        """The conditions of both branches of n samples; those that the caller gives come first."""
        buffers = dict(self.named_buffers(recurse=False))
        return {**{key: value.expand(n, *value.shape[1:]) for key, value in buffers.items()}, **cond}


class ConditionSource:
    """The conditions of captions, by index: `source(indices) -> {name: (n, ...)}`.

    Args:
        data: with `conditions`.
    """

    def __init__(self, data: Data) -> None:
        assert data.conditions is not None
        self.data, self.fetch = data, data.conditions
        self.names = tuple(self.fetch([0]))

    def __len__(self) -> int:
        return len(self.data)

    def __call__(self, indices: Tensor) -> dict[str, Tensor]:
        return self.fetch(indices.tolist())

    def digest(self) -> str:
        """A fingerprint of the captions, 16 hexadecimal digits; without texts, of some of their conditions."""
        digest = hashlib.sha256()
        if self.data.captions is not None:
            for text in self.data.captions:
                digest.update(f"{len(text)} {text}".encode())
            return digest.hexdigest()[:16]
        rows = torch.linspace(0, len(self.data) - 1, DIGEST_ROWS).round().long()
        for name, value in sorted(self(rows).items()):
            digest.update(name.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def condition_source(batches: Any) -> ConditionSource | None:
    """The captions of the data of `Batches`; None where it has none."""
    data: Any = getattr(batches, "data", None)
    return ConditionSource(data) if getattr(data, "conditions", None) is not None else None


def unconditional(cond: Mapping[str, Tensor], null_label: int | None, null: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The conditions of the unconditional branch: null label, null embeddings, and the others as they are.

    Args:
        cond: of B samples, by name; `null_NAME` among them is what takes the place of NAME.
        null_label: in place of every label, where there is one.
        null: in place of other conditions, (1, ...) by name.
    """
    out = {}
    for key, value in cond.items():
        if key.startswith("null_"):
            continue
        if f"null_{key}" in cond:
            out[key] = cond[f"null_{key}"]
        elif key == "label" and null_label is not None:
            out[key] = torch.full_like(value, null_label)
        elif key in null:
            out[key] = null[key].to(value.device, value.dtype).expand_as(value)
        else:
            out[key] = value
    return out


def both_branches(
    evaluate: Callable[..., Tensor], z: Tensor, t: Tensor, cond: Mapping[str, Tensor], null: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """A network under two sets of conditions, in one batch of 2 B.

    Args:
        evaluate: `evaluate(z, t, **cond) -> (B, *S)`.
        z: (B, *S).
        t: (B,).
        cond, null: of B rows; `null` names the conditions.

    Returns:
        Both outputs, each (B, *S).
    """
    both = {key: torch.cat([cond[key], value]) for key, value in null.items()}
    first, second = evaluate(torch.cat([z, z]), torch.cat([t, t]), **both).chunk(2)
    return first, second
